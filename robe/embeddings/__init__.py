"""Ways to store embeddings, one file each; robe.config.METHODS lists them. A file defines

- `declare(config, data)` -> part -> its weights, whose `count` is how many are stored, and whose
  `arrays(config, dtype)` are the arrays to be (declared.py); a method of one part calls it ""
- `create(config, data, backend, dtype)` -> the embedding, for a resolved configuration

and all embeddings have the same few verbs:

- `lookup(ids, out, features)`: ids (B, F) uint32 -> out (B, F, D); or ids (N, 1) of features (N,), which are
  otherwise None, -> out (N, 1, D)
- `update(ids, d_vectors, rate, features)`: one optimizer step from the gradient (B, F, D) of the vectors
- `begin(number)`: make of it what it is where a pass over the data begins, from 0 on: each has weights of its
  own to begin with, and the optimizer has kept nothing yet
- `halfway()`: do what it does where half of the steps of a pass are made, if anything
- `changing()`: what an update takes that is another number each time, besides the rate; it takes arrays (1,)
  of the device instead that are put in `held`, so that one graph serves all steps (robe/graph.py)
- `check(ids, features)`: refuse ids that have no row, while they are still on the host
- `state()`: name -> array, everything a checkpoint must hold
- `flaw()`: what is wrong with these arrays where they are not what training leaves, in words; else None
- `bytes()`: item -> bytes
- `describe()`: what a summary says of it
- `counts()`: what it has counted in training so far, for the log

Kernels that do more than a look-up or an update at once (robe/interaction.py) ask

- `looks_up_by`, `operands(ids, features)`: the operation that a look-up is, and its arguments before `out`;
  both are None where a look-up takes more than one operation
- `adds`: whether an update only adds to `memory` at `slots(ids, features)`

and of an ArrayEmbedding that is `summable`, whose gradients they sum, `make_sums()` and `step(slots, rate)`

Several processes that take one step (robe/exchange.py) ask `counts_look_ups`: whether an update comes to
something else where the gradients of look-ups of one row were added up before
"""

from importlib import import_module
from types import ModuleType

from robe.backend import Backend
from robe.config import METHODS, ConfigError, DataSpec, TrainConfig, used_data
from robe.embeddings.array import ArrayEmbedding
from robe.embeddings.composed import ComposedEmbedding
from robe.embeddings.declared import Array, Weights, by_item
from robe.embeddings.mixed_precision import CachedTable, MixedPrecisionEmbedding

Embedding = ArrayEmbedding | ComposedEmbedding | MixedPrecisionEmbedding


def create(config: TrainConfig, data: DataSpec, backend: Backend, dtype="float32") -> Embedding:
    """The embedding that a resolved configuration names; raises ConfigError if the data do not fit it."""
    _require_ids(config, data)
    return module(config).create(config, used_data(config, data), backend, dtype)


def module(config: TrainConfig) -> ModuleType:
    """The file of a method."""
    return import_module(f"{__package__}.{METHODS[config.embedding.method].file}")


def _require_ids(config: TrainConfig, data: DataSpec) -> None:
    method = config.embedding.method
    if METHODS[method].categorical and not data.cardinalities:
        raise ConfigError(
            f"--method {method} is for categorical features, and these data have none; train --method none"
        )
    if data.dialect not in METHODS[method].ids:
        raise ConfigError(
            f"--method {method} cannot use the ids of these data ({data.dialect}); prepare them with "
            "`robe prepare FILE --ids dictionary --out DIR`, or train --method robe"
        )


def declared(config: TrainConfig, data: DataSpec) -> dict[str, Weights | CachedTable]:
    """Part -> the weights that it is to store, without making them."""
    _require_ids(config, data)
    return module(config).declare(config, used_data(config, data))


def stored_weights(config: TrainConfig, data: DataSpec) -> int:
    """How many weights it stores, without making it."""
    return sum(weights.count for weights in declared(config, data).values())


def declared_arrays(config: TrainConfig, data: DataSpec) -> list[Array]:
    """All arrays that it is to have, without making them."""
    parts = declared(config, data).values()
    return [array for weights in parts for array in weights.arrays(config).values()]


def declared_state(config: TrainConfig, data: DataSpec) -> dict[str, Array]:
    """The arrays that its `state()` is to have, by the same names, without making them."""
    return {
        ".".join(("embedding", *filter(None, (part,)), name)): array
        for part, weights in declared(config, data).items()
        for name, array in weights.arrays(config).items()
        if array.kept
    }


def planned_bytes(config: TrainConfig, data: DataSpec) -> dict[str, int]:
    """`bytes()` of it, without making it."""
    return by_item((array.item, array.nbytes) for array in declared_arrays(config, data))


__all__ = [
    "ArrayEmbedding",
    "ComposedEmbedding",
    "Embedding",
    "MixedPrecisionEmbedding",
    "create",
    "declared",
    "declared_arrays",
    "declared_state",
    "planned_bytes",
    "stored_weights",
]
