"""Embeddings whose vectors are computed from the rows of several arrays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from robe.backend import Backend
from robe.config import DataSpec, TrainConfig
from robe.embeddings.array import ArrayEmbedding, check_rows, description
from robe.embeddings.declared import by_item
from robe.embeddings.tables import whole
from robe.optim import corrections

INDEX = "embedding index"  # the line of `robe plan` that counts the bytes of what is beside the weights


@dataclass
class ComposedEmbedding:
    """Each of `parts` gives rows (B, F_part, D_part) for ids (B, F); `compose` makes vectors of them.

    compose: (rows of each part, out (B, F, D))
    gradients: (rows of each part, d_vectors (B, F, D)) -> the gradient of each part's rows
    shared: the parts whose rows all ids have in common, so B is 1.
    beside: what is stored besides weights, as an index; part and name -> array.
    """

    method: str
    parts: dict[str, ArrayEmbedding]
    compose: Callable[[Sequence, Any], None]
    gradients: Callable[[Sequence, Any], Sequence]
    features: int
    width: int
    backend: Backend
    table_weights: int
    table_note: str
    rows: np.ndarray | None = None  # (F,)
    shared: Sequence[str] = ()
    beside: dict[str, Any] = field(default_factory=dict)
    steps: int = field(init=False, default=0)
    held: Sequence = field(init=False, default=())

    looks_up_by: ClassVar[str | None] = None
    operands: ClassVar[Callable[..., tuple] | None] = None
    adds: ClassVar[Literal[False]] = False

    def begin(self, number: int) -> None:
        for part in self.parts.values():
            part.begin(number)

    def halfway(self) -> None:
        pass

    def check(self, ids: np.ndarray) -> None:
        check_rows(ids, self.rows)

    def lookup(self, ids, out) -> None:
        self.compose(self._rows(ids), out)

    def update(self, ids, d_vectors, rate: float) -> None:
        # All gradients are those of the rows before the step.
        found, held = self.gradients(self._rows(ids), d_vectors), self.held or self.changing()
        for (name, part), gradient in zip(self.parts.items(), found, strict=True):
            part.held = held
            part.update(self._ids(name, ids), gradient, rate)
        self.steps += 1

    def changing(self) -> tuple:
        """The corrections of the optimizer, for all parts; none of them is rounded at random."""
        part = next(iter(self.parts.values()))
        return corrections(part.optimizer, self.steps + 1, part.stepped.dtype)

    def _rows(self, ids) -> list:
        rows = []
        for name, part in self.parts.items():
            its_ids = self._ids(name, ids)
            rows.append(self.backend.empty((len(its_ids), part.features, part.width), part.dtype))
            part.lookup(its_ids, rows[-1])
        return rows

    def _ids(self, name: str, ids):
        """What a part looks up for `ids` (B, F)."""
        if name not in self.shared:
            return ids
        return self.backend.xp.zeros((1, self.parts[name].features), "uint32")

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
    compose: Callable[[Sequence, Any], None],
    gradients: Callable[[Sequence, Any], Sequence],
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
