"""Ways to store embeddings, one file each, all with the same few verbs:

- `lookup(ids, out)`: ids (B, F) uint32 -> out (B, F, D)
- `interact(ids, first, out)`: first (B, D) and those vectors interact -> out (B, D + pairs), for inference
- `backward(d_out, vectors, ids, rate, d_vectors)`: one optimizer step from the gradient d_out (B, D + pairs)
  by the interaction of vectors (B, 1 + F, D); the gradient by vector 0 to d_vectors[:, 0]
- `update(ids, d_vectors, rate)`: one optimizer step from the gradient (B, F, D) of the vectors
- `check(ids)`: refuse ids that have no row, while they are still on the host
- `state()`: name -> array, everything a checkpoint must hold
- `bytes()`: item -> bytes
- `describe()`: what a summary says of it
- `counts()`: what it has counted in training so far, for the log
"""

import dataclasses

from robe.backend import Backend
from robe.config import NUMBERED, WEIGHT_BYTES, ConfigError, DataSpec, TrainConfig
from robe.embeddings.array import ArrayEmbedding, group_form
from robe.embeddings.composed import ComposedEmbedding
from robe.embeddings.compositional import compositional_tables
from robe.embeddings.frequency import frequency_tables
from robe.embeddings.full import full_table, full_weights
from robe.embeddings.mixed_precision import MixedPrecisionEmbedding, mixed_precision
from robe.embeddings.modulo import hashed_tables
from robe.embeddings.quotient_remainder import quotient_remainder_tables, quotient_remainder_weights
from robe.embeddings.robe import robe_array, stored_robe_weights
from robe.embeddings.tables import capped_weights
from robe.embeddings.tensor_train import tensor_train_tables, tensor_train_weights, tensor_trains
from robe.kernels.parts.codes import row_bytes
from robe.kernels.parts.groups import GROUP

Embedding = ArrayEmbedding | ComposedEmbedding | MixedPrecisionEmbedding

# Method -> (what makes it, how many weights it stores); both of a resolved configuration.
METHODS = {
    "robe": (robe_array, stored_robe_weights),
    "full": (full_table, full_weights),
    "mixed_precision": (mixed_precision, full_weights),
    "none": (full_table, full_weights),
    "hashing": (hashed_tables, capped_weights),
    "quotient_remainder": (quotient_remainder_tables, quotient_remainder_weights),
    "frequency": (frequency_tables, capped_weights),
    "tensor_train": (tensor_trains, tensor_train_weights),
    "compositional": (compositional_tables, capped_weights),
}


def create(config: TrainConfig, data: DataSpec, backend: Backend, dtype="float32") -> Embedding:
    """The embedding that a resolved configuration names; raises ConfigError if the data do not fit it."""
    method = config.embedding.method
    # The order of ids modulo a number says nothing of their frequency.
    if (method in NUMBERED and data.dialect == "hash") or (method, data.dialect) == ("frequency", "modulo"):
        raise ConfigError(
            f"--method {method} cannot use the ids of these data ({data.dialect}); prepare them with "
            "`robe prepare FILE --ids dictionary --out DIR`, or train --method robe"
        )
    return METHODS[method][0](config, used(method, data), backend, dtype)


def stored_weights(config: TrainConfig, data: DataSpec) -> int:
    """How many weights it stores, without making it."""
    method = config.embedding.method
    return METHODS[method][1](config, used(method, data))


def stored_bytes(config: TrainConfig, data: DataSpec) -> int:
    """In how many bytes it stores them."""
    settings, weights, width = config.embedding, stored_weights(config, data), config.model.width
    if settings.memory in WEIGHT_BYTES:
        return weights * WEIGHT_BYTES[settings.memory]
    if settings.method == "tensor_train":
        groups = tensor_train_tables(config, data)
    else:
        length = {"robe": int(GROUP), "compositional": width // settings.chunks}.get(settings.method, width)
        groups = [(-(-weights // length), length)]
    return sum(rows * row_bytes(group_form(settings, length)) for rows, length in groups)


def used(method: str, data: DataSpec) -> DataSpec:
    """What a method sees of the data."""
    if method == "none":
        return dataclasses.replace(data, cardinalities=(), note="no categorical features")
    return data


__all__ = [
    "ArrayEmbedding",
    "Embedding",
    "MixedPrecisionEmbedding",
    "create",
    "stored_bytes",
    "stored_weights",
]
