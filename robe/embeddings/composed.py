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


@dataclass
class ComposedEmbedding:
    """Each of `parts` gives rows (B, F_part, D_part) for ids (B, F); `compose` makes vectors of them.

    compose: (rows of each part, out (B, F, D))
    gradients: (rows of each part, d_vectors (B, F, D)) -> the gradient of each part's rows
    shared: the parts whose rows all ids have in common, so B is 1.
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
    steps: int = field(init=False, default=0)
    held: Sequence = field(init=False, default=())

    looks_up_by: ClassVar[str | None] = None
    operands: ClassVar[Callable[..., tuple] | None] = None
    adds: ClassVar[Literal[False]] = False

    def begin(self, number: int) -> None:
        for part in self.parts.values():
            part.begin(number)

    def check(self, ids: np.ndarray) -> None:
        check_rows(ids, self.rows)

    def lookup(self, ids, out) -> None:
        self.compose(self._rows(ids), out)

    def update(self, ids, d_vectors, rate: float) -> None:
        # All gradients are those of the rows before the step.
        found = self.gradients(self._rows(ids), d_vectors)
        for name, gradient in zip(self.parts, found, strict=True):
            self.parts[name].update(self._ids(name, ids), gradient, rate)

    def changing(self) -> tuple:
        return ()  # none of the parts is rounded at random

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
        return {
            name.replace("embedding", f"embedding.{part}"): array
            for part, embedding in self.parts.items()
            for name, array in embedding.state().items()
        }

    def flaw(self) -> str | None:
        return next(filter(None, (part.flaw() for part in self.parts.values())), None)

    def bytes(self) -> dict[str, int]:
        return by_item(size for part in self.parts.values() for size in part.bytes().items())

    def counts(self) -> dict[str, int]:
        return {}

    def describe(self) -> dict:
        parts = self.parts.values()
        return description(self, sum(p.weights for p in parts), sum(int(p.memory.nbytes) for p in parts))


def composed(
    config: TrainConfig,
    data: DataSpec,
    backend: Backend,
    parts: dict[str, ArrayEmbedding],
    compose: Callable[[Sequence, Any], None],
    gradients: Callable[[Sequence, Any], Sequence],
    shared: Sequence[str] = (),
) -> ComposedEmbedding:
    """The embedding of a configuration whose method makes vectors of these parts."""
    return ComposedEmbedding(
        method=config.embedding.method,
        parts=parts,
        compose=compose,
        gradients=gradients,
        features=len(data.cardinalities),
        width=config.model.width,
        backend=backend,
        shared=shared,
        **whole(config, data),
    )
