"""What an embedding declares of its arrays: counting, planning, making and saving them follow from it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from robe.backend import Backend
from robe.config import CODE_BITS, EmbeddingConfig, TrainConfig
from robe.kernels.parts.codes import Form, row_bytes
from robe.optim import RULES, rounded_rule, touched_step


class Array(NamedTuple):
    """An array of this shape and dtype, full of `fill`.

    item: the line of `robe plan` that counts its bytes.
    kept: whether a checkpoint holds it.
    """

    shape: tuple[int, ...]
    dtype: str
    item: str
    kept: bool = True
    fill: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def make(self, xp) -> Any:
        # Pages of zeros take no memory before they are written to.
        return xp.full(self.shape, self.fill, self.dtype) if self.fill else xp.zeros(self.shape, self.dtype)


def group_form(config: EmbeddingConfig, length: int) -> Form | None:
    """How groups of `length` weights are stored, and rounded where codes alone are trained; None where
    weights are floats."""
    stochastic = config.master == "none" and config.rounding == "stochastic"
    return Form(CODE_BITS[config.memory], stochastic, length) if config.memory in CODE_BITS else None


@dataclass(frozen=True)
class Weights:
    """The weights of one ArrayEmbedding: tables of `rows` (T,) rows of `width` weights, one behind the other.

    group: how many weights share a scale where they are stored in codes; default: those of a row.
    block: how many weights of a vector lie side by side; default: those of a row.
    chunks: rows that make a vector.
    """

    rows: np.ndarray
    width: int
    group: int = 0
    block: int = 0
    chunks: int = 1

    @property
    def count(self) -> int:
        return int(sum(self.rows)) * self.width

    @property
    def summable(self) -> bool:
        """Whether a step on a GPU may sum the gradients of these weights while it makes them."""
        return self.chunks == 1

    def arrays(self, config: TrainConfig, dtype="float32") -> dict[str, Array]:
        """Name -> each array that these weights and their optimizer take; dtype: of floats but halves."""
        count, halves = self.count, config.embedding.memory == "fp16"
        lean, name = config.embedding.master == "none", config.optimizer.optimizer
        rule = rounded_rule(config.optimizer) if halves or lean else RULES[name]
        memory = Array((count,), dtype, "embedding weights")
        group = self.group or self.width
        form, master, sums = group_form(config.embedding, group), {}, count
        if rule.grouped:
            sums = -(-count // group)
        if form is not None:
            groups = -(-count // form.width)
            memory = memory._replace(shape=(groups, row_bytes(form)), dtype="uint8")
            if lean:
                sums = groups
            elif rule.dense:  # it is trained, and not for inference
                master = {"master": Array((groups, form.width), "float32", "embedding master weights")}
        elif halves:
            memory = memory._replace(dtype="float16")
        read = "float32" if halves or form else dtype
        summed = bool(rule.dense if halves else touched_step(config.optimizer)[0]) and not lean
        return {
            "memory": memory,
            **master,
            **{
                state: Array(
                    (sums * (state in rule.state),), read, "embedding optimizer state", state in rule.state
                )
                # half_step and code_step take an accumulator, an empty one for SGD.
                for state in dict.fromkeys((*rule.state, "accumulator"))
            },
            "gradient": Array((count * summed,), read, "embedding gradient scratch", kept=False),
        }


class Declared:
    """What follows from `arrays` of an embedding, each of which is its attribute of that name."""

    arrays: dict[str, Array]
    backend: Backend
    carried: ClassVar[tuple[str, ...]] = ()  # arrays besides the weights that `convert` copies as they are

    def make_arrays(self) -> None:
        """Make all arrays but those that have been given."""
        for name, array in self.arrays.items():
            if name not in vars(self):
                setattr(self, name, array.make(self.backend.xp))

    def halfway(self) -> None:
        pass

    def scratch(self, name: str, look_ups: int) -> Any:
        """The array of that name, which has a place for each look-up of a batch, cut to so many.

        It is made for one id of each feature in a row; bags may hold more, and then it grows.
        """
        array = getattr(self, name)
        if array.shape[-1] < look_ups:
            array = self.backend.empty((*array.shape[:-1], look_ups), array.dtype)
            setattr(self, name, array)
        return array[..., :look_ups]

    def state(self) -> dict[str, Any]:
        """Name -> array, everything of it that a checkpoint must hold."""
        return {f"embedding.{name}": getattr(self, name) for name, array in self.arrays.items() if array.kept}

    def bytes(self) -> dict[str, int]:
        """Item -> bytes."""
        return by_item((array.item, getattr(self, name).nbytes) for name, array in self.arrays.items())


def by_item(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Item -> the sum of its sizes, from (item, size)."""
    found = {}
    for item, size in sizes:
        found[item] = found.get(item, 0) + size
    return found
