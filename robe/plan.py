"""How many bytes a configuration needs, item by item, without allocating any of them."""

from robe.config import CODE_BITS, DataSpec, TrainConfig
from robe.embeddings import stored_bytes, stored_weights
from robe.embeddings.mixed_precision import planned
from robe.kernels.interaction import out_width
from robe.model import buffer_rows, layer_shapes

FLOAT, INT = 4, 4


def plan(config: TrainConfig, data: DataSpec, rows: int) -> dict[str, dict[str, int]]:
    """Place (`memory`, `checkpoint`, `disk`) -> item -> bytes, for a resolved configuration.

    rows: rows of the data set, for the shards on disk.
    """
    method, width = config.embedding.method, config.model.width
    weights = stored_weights(config, data)
    stored = stored_bytes(config, data)
    layers = [shape for part in layer_shapes(config, data).values() for shape in part]
    dense = sum(n_in * n_out + n_out for n_in, n_out in layers)
    optimizer, stores = config.optimizer.optimizer, config.embedding.memory
    adagrad = optimizer == "adagrad"
    kept_sums = adagrad and stores not in CODE_BITS
    summed = kept_sums or (stores == "fp16" and optimizer != "none")  # gradients, before a step
    vectors = 1 + (0 if method == "none" else len(data.cardinalities))
    # Per row: outputs and gradients of inputs of all layers, vectors and their gradients, what the
    # interaction writes, loss and gradient of the logit.
    activations = sum(n_in + n_out for n_in, n_out in layers)
    activations += 2 * vectors * width + out_width(vectors, width) + 2
    columns = 1 + data.dense + len(data.cardinalities)
    embedding = {
        "embedding weights": stored,
        "embedding optimizer state": kept_sums * weights * FLOAT,
        "embedding gradient scratch": summed * weights * FLOAT,
    }
    kept = stored + kept_sums * weights * FLOAT
    if method == "mixed_precision":
        embedding, kept = planned(config, data)
    memory = {
        **embedding,
        "dense weights": dense * FLOAT,
        "dense gradient": dense * FLOAT,
        "dense optimizer state": adagrad * dense * FLOAT,
        "activations and their gradients": buffer_rows(config) * activations * FLOAT,
    }
    dictionary = {"dictionary": sum(data.cardinalities) * INT} if data.dialect == "dictionary" else {}
    return {
        "memory": memory,
        "checkpoint": {"weights and optimizer state": kept + (1 + adagrad) * dense * FLOAT},
        "disk": {"shards": rows * columns * FLOAT} | dictionary,
    }
