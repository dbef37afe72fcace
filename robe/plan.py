"""How many bytes a configuration needs, item by item, without allocating any of them."""

import math

import numpy as np

from robe.config import CODE_BITS, METHODS, DataSpec, TrainConfig, used_data
from robe.embeddings import Weights, declared, declared_arrays, planned_bytes
from robe.embeddings.sketched import SketchedWeights
from robe.model import (
    EVALUATION_BATCH,
    INTERACTIONS,
    averaged_shapes,
    buffer_rows,
    layer_shapes,
    parameter_shapes,
)
from robe.optim import RULES

FLOAT, INT, SUM = 4, 4, 8


def plan(config: TrainConfig, data: DataSpec, rows: int) -> dict[str, dict[str, int]]:
    """Store (`memory`, `checkpoint` or `disk`) -> item -> bytes, for a resolved configuration.

    Bags are taken to hold one id each; where they hold more, what is counted for a look-up grows with them.

    config: its backend `auto` counts as a CPU.
    rows: rows of the data set, for the shards on disk.
    """
    layers = [shape for part in layer_shapes(config, data).values() for shape in part]
    dense = sum(map(math.prod, parameter_shapes(config, data).values()))
    dense_state = len(RULES[config.optimizer.optimizer].state) * dense
    # Per row: outputs and gradients of inputs of all layers, the interaction, loss and gradient of the logit.
    per_row = sum(n_in + n_out for n_in, n_out in layers)
    features = len(used_data(config, data).cardinalities)
    again = _summed_apart(config, data)
    interaction = INTERACTIONS[config.model.interaction]
    per_row += interaction.activations(features, config.model, again is not None) + 2
    columns = 1 + data.dense + len(data.cardinalities)
    embedding = planned_bytes(config, data)
    if again:
        embedding["embedding gradient scratch"] = again.count * FLOAT
    if config.backend == "cuda" and config.embedding.master == "none":
        embedding["embedding gradient scratch"] = _sums_of_codes(config, data)
    memory = {
        **embedding,
        "dense weights": dense * FLOAT,
        "dense gradient": dense * FLOAT,
        "dense optimizer state": dense_state * FLOAT,
        "activations and their gradients": buffer_rows(config) * per_row * FLOAT,
        **_of_bags(config, data),
        **_of_a_gpu(config, data),
    }
    averaged = sum(math.prod(shape) for shape in averaged_shapes(config, data).values()) * FLOAT
    if averaged:
        memory["averaged weights"] = averaged
    kept = sum(array.nbytes for array in declared_arrays(config, data) if array.kept)
    dictionary = {"dictionary": sum(data.cardinalities) * INT} if data.dialect == "dictionary" else {}
    return {
        "memory": memory,
        "checkpoint": {"weights and optimizer state": kept + (dense + dense_state) * FLOAT}
        | ({"averaged weights": averaged} if averaged else {}),
        "disk": {
            "shards": rows * columns * FLOAT,
            **dictionary,
            **({"probabilities of the teacher": rows * FLOAT} if config.teacher is not None else {}),
        },
    }


def _trained(config: TrainConfig, data: DataSpec) -> dict[str, Weights]:
    """Part -> the weights whose gradients a training sums, by `scatter_add` or with the interaction."""
    if not RULES[config.optimizer.optimizer].dense:
        return {}
    return {part: held for part, held in declared(config, data).items() if isinstance(held, Weights)}


def _summed_apart(config: TrainConfig, data: DataSpec) -> Weights | None:
    """The weights that a step on a GPU gathers twice, if it does."""
    weights = _trained(config, data).get("")
    if config.backend != "cuda" or config.deterministic or config.embedding.memory in CODE_BITS:
        return None
    if data.pooling:
        return None
    if weights is None or not weights.summable:
        return None
    arrays, width = weights.arrays(config), config.model.width
    sizes = width, weights.block or width, weights.count, np.dtype(arrays["memory"].dtype).itemsize
    features = len(used_data(config, data).cardinalities)
    adds = not arrays["gradient"].nbytes
    interaction = INTERACTIONS[config.model.interaction]
    return weights if interaction.gathers_again("gather", config.batch, features, *sizes, adds) else None


def _sums_of_codes(config: TrainConfig, data: DataSpec) -> int:
    """Bytes of what `code_step` keeps on a GPU: sums of whole groups, a list of them, and a bit for each."""
    sizes = 0
    for held in _trained(config, data).values():
        groups = held.arrays(config)["memory"].shape[0]
        sizes += groups * (held.group or held.width) * FLOAT + (groups + groups // 32 + 2) * INT
    return sizes


def _of_bags(config: TrainConfig, data: DataSpec) -> dict[str, int]:
    """The rows that are looked up to be pooled, and their gradients."""
    if (pooling := used_data(config, data).pooling) is None:
        return {}
    look_ups = buffer_rows(config) * len(pooling)
    return {"rows of bags and their gradients, of one id each": 2 * look_ups * config.model.width * FLOAT}


def _of_a_gpu(config: TrainConfig, data: DataSpec) -> dict[str, int]:
    """What a step takes on a GPU besides: sums of integers, and the batches that its graphs read."""
    if config.backend != "cuda":
        return {}
    features, items = len(used_data(config, data).cardinalities), {}
    if config.deterministic:
        # Arrays of one size share their sums.
        sizes = {weights.count for weights in _trained(config, data).values()}
        items["embedding gradients as integers"] = sum(sizes) * SUM
    inputs, learned = data.dense + features, 1 + (config.teacher is not None)
    if used_data(config, data).pooling:  # no graphs
        return items
    captured = METHODS[config.embedding.method].captured
    # A step that asks the host which rows change hands is no graph, but its look-ups alone are.
    sketched = any(isinstance(held, SketchedWeights) for held in declared(config, data).values())
    numbers = EVALUATION_BATCH * inputs * (captured or sketched)
    numbers += config.batch * (learned + inputs) * (captured and not sketched)
    if numbers:
        items["batches of CUDA graphs"] = numbers * FLOAT
    return items
