"""Embeddings whose vectors are computed from the rows of several arrays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from robe.backend import Backend
from robe.config import DataSpec, TrainConfig
from robe.embeddings.array import ArrayEmbedding, check_rows, description
from robe.embeddings.declared import by_item
from robe.embeddings.tables import whole
from robe.optim import corrections

INDEX = "embedding index"  # the line of `robe plan` that counts the bytes of what is beside the weights


class Place(NamedTuple):
    """Where the vectors of some features are among those of all.

    axis: 1 of vectors (B, F, D), 0 of those of ids (N, 1); numbers: along it.
    features: of each of these ids, counted among the features in question; None where axis is 1.
    """

    axis: int
    numbers: Any
    features: Any = None

    @property
    def at(self) -> tuple:
        """The index of these vectors."""
        return *(slice(None),) * self.axis, self.numbers

    def take(self, array) -> Any:
        """Those of an array of ids, vectors or gradients."""
        return np.take(array, self.numbers, axis=self.axis)  # CuPy's where the array is


class Chosen:
    """Some of F features, `numbers` (F_part,) ascending."""

    def __init__(self, numbers: np.ndarray, features: int, backend: Backend):
        position = np.full(features, -1)
        position[numbers] = np.arange(len(numbers))
        self.xp = backend.xp
        self.columns, self.position = backend.to_device(numbers), backend.to_device(position)

    def place(self, features=None) -> Place:
        """Theirs among all features, or among ids (N, 1) of features (N,)."""
        if features is None:
            return Place(1, self.columns)
        found = self.position[features]
        numbers = self.xp.flatnonzero(found >= 0)
        return Place(0, numbers, found[numbers])


@dataclass
class ComposedEmbedding:
    """Each of `parts` gives rows (B, F_part, D_part) for ids (B, F); `compose` makes vectors of them.

    compose: (rows of each part, out (B, F, D), places)
    gradients: (rows of each part, d_vectors (B, F, D), places) -> the gradient of each part's rows
        places: part -> Place of its rows among the vectors, for those of `chosen`
    chosen: part -> its features, where these are not all.
    shared: the parts whose rows all ids have in common, so B is 1.
    beside: what is stored besides weights, as an index; part and name -> array.
    """

    method: str
    parts: dict[str, ArrayEmbedding]
    compose: Callable[[Sequence, Any, dict[str, Place]], None]
    gradients: Callable[[Sequence, Any, dict[str, Place]], Sequence]
    features: int
    width: int
    backend: Backend
    table_weights: int
    table_note: str
    rows: np.ndarray | None = None  # (F,)
    chosen: dict[str, Chosen] = field(default_factory=dict)
    shared: Sequence[str] = ()
    beside: dict[str, Any] = field(default_factory=dict)
    steps: int = field(init=False, default=0)
    held: Sequence = field(init=False, default=())

    looks_up_by: ClassVar[str | None] = None
    operands: ClassVar[Callable[..., tuple] | None] = None
    adds: ClassVar[Literal[False]] = False
    counts_look_ups: ClassVar[bool] = False

    def begin(self, number: int) -> None:
        for part in self.parts.values():
            part.begin(number)

    def halfway(self) -> None:
        pass

    def check(self, ids: np.ndarray, features: np.ndarray | None = None) -> None:
        check_rows(ids, self.rows, features)

    def lookup(self, ids, out, features=None) -> None:
        places = self._places(features)
        self.compose(self._rows(self._ids(ids, features, places)), out, places)

    def update(self, ids, d_vectors, rate: float, features=None) -> None:
        # All gradients are those of the rows before the step.
        places = self._places(features)
        ids = self._ids(ids, features, places)
        found, held = self.gradients(self._rows(ids), d_vectors, places), self.held or self.changing()
        for (name, part), gradient in zip(self.parts.items(), found, strict=True):
            part.held = held
            its_ids, of = ids[name]
            part.update(its_ids, gradient, rate, of)
        self.steps += 1

    def changing(self) -> tuple:
        """The corrections of the optimizer, for all parts; none of them is rounded at random."""
        part = next(iter(self.parts.values()))
        return corrections(part.optimizer, self.steps + 1, part.stepped.dtype)

    def _places(self, features) -> dict[str, Place]:
        return {name: chosen.place(features) for name, chosen in self.chosen.items()}

    def _rows(self, ids: dict[str, tuple]) -> list:
        rows = []
        for name, part in self.parts.items():
            its_ids, of = ids[name]
            vectors = len(its_ids), part.features if of is None else 1, part.width
            rows.append(self.backend.empty(vectors, part.dtype))
            part.lookup(its_ids, rows[-1], of)
        return rows

    def _ids(self, ids, features, places: dict[str, Place]) -> dict[str, tuple]:
        """Part -> what it looks up for `ids` (B, F): (its ids, the features of these)."""
        found = {}
        for name, part in self.parts.items():
            if name in self.shared:
                found[name] = self.backend.xp.zeros((1, part.features), "uint32"), None
            elif name in places:
                found[name] = places[name].take(ids), places[name].features
            else:
                found[name] = ids, features
        return found

    def state(self) -> dict[str, Any]:
        weights = {
            name.replace("embedding", f"embedding.{part}"): array
            for part, embedding in self.parts.items()
            for name, array in embedding.state().items()
        }
        return weights | {f"embedding.{name}": array for name, array in self.beside.items()}

    def flaw(self) -> str | None:
        return next(filter(None, (part.flaw() for part in self.parts.values())), None)

    def bytes(self) -> dict[str, int]:
        weights = by_item(size for part in self.parts.values() for size in part.bytes().items())
        return weights | ({INDEX: self._bytes_beside()} if self.beside else {})

    def _bytes_beside(self) -> int:
        return sum(int(array.nbytes) for array in self.beside.values())

    def counts(self) -> dict[str, int]:
        return {}

    def describe(self) -> dict:
        parts = self.parts.values()
        size = sum(int(p.memory.nbytes) for p in parts) + self._bytes_beside()
        return description(self, sum(p.weights for p in parts), size)


def composed(
    config: TrainConfig,
    data: DataSpec,
    backend: Backend,
    parts: dict[str, ArrayEmbedding],
    compose: Callable[[Sequence, Any, dict[str, Place]], None],
    gradients: Callable[[Sequence, Any, dict[str, Place]], Sequence],
    kind: Callable[..., ComposedEmbedding] = ComposedEmbedding,
    **further: Any,
) -> ComposedEmbedding:
    """The embedding of a configuration whose method makes vectors of these parts.

    kind: of embedding; further: its other fields.
    """
    return kind(
        method=config.embedding.method,
        parts=parts,
        compose=compose,
        gradients=gradients,
        features=len(data.cardinalities),
        width=config.model.width,
        backend=backend,
        **whole(config, data),
        **further,
    )
