"""How many bytes a configuration needs, item by item, without allocating any of them."""

from robe.config import DataSpec, TrainConfig, used_data
from robe.embeddings import declared_arrays, planned_bytes
from robe.interaction import Interaction
from robe.model import buffer_rows, layer_shapes
from robe.optim import RULES

FLOAT, INT = 4, 4


def plan(config: TrainConfig, data: DataSpec, rows: int) -> dict[str, dict[str, int]]:
    """Store (`memory`, `checkpoint` or `disk`) -> item -> bytes, for a resolved configuration.

    rows: rows of the data set, for the shards on disk.
    """
    layers = [shape for part in layer_shapes(config, data).values() for shape in part]
    dense = sum(n_in * n_out + n_out for n_in, n_out in layers)
    dense_state = len(RULES[config.optimizer.optimizer].state) * dense
    # Per row: outputs and gradients of inputs of all layers, the interaction, loss and gradient of the logit.
    per_row = sum(n_in + n_out for n_in, n_out in layers)
    features = len(used_data(config, data).cardinalities)
    per_row += Interaction.activations(features, config.model.width) + 2
    columns = 1 + data.dense + len(data.cardinalities)
    memory = {
        **planned_bytes(config, data),
        "dense weights": dense * FLOAT,
        "dense gradient": dense * FLOAT,
        "dense optimizer state": dense_state * FLOAT,
        "activations and their gradients": buffer_rows(config) * per_row * FLOAT,
    }
    kept = sum(array.nbytes for array in declared_arrays(config, data) if array.kept)
    dictionary = {"dictionary": sum(data.cardinalities) * INT} if data.dialect == "dictionary" else {}
    return {
        "memory": memory,
        "checkpoint": {"weights and optimizer state": kept + (dense + dense_state) * FLOAT},
        "disk": {
            "shards": rows * columns * FLOAT,
            **dictionary,
            **({"probabilities of the teacher": rows * FLOAT} if config.teacher is not None else {}),
        },
    }
