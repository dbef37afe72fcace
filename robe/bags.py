"""Features that hold any number of ids, with weights: what a model of data with pooling takes for ids."""

from typing import Any, NamedTuple

import numpy as np

from robe.errors import ArrayError
from robe.kernels.pool import MAX, POOLINGS

NO_WEIGHTS = np.empty(0, np.float32)  # all are 1


class Bags(NamedTuple):
    """The ids of B rows and F features, bag after bag; any such tuple of three is taken for one.

    values  (N,) uint32: the ids
    offsets (B * F + 1,) int64, from 0 to N, never falling: bag (b, f) is values[offsets[k] : offsets[k + 1]],
        k = b * F + f
    weights (N,) float32; None, or (0,), where all are 1

    Pooled by mean, a vector is the sum of the weighted ones over the number of ids, not over the sum of the
    weights, as FBGEMM has it. An empty bag has the vector 0.
    """

    values: Any
    offsets: Any
    weights: Any = None

    def rows(self, features: int) -> int:
        """B."""
        return (len(self.offsets) - 1) // features

    def features(self, features: int) -> np.ndarray:
        """(N,) the feature of each id, on the host."""
        bags = np.arange(len(self.offsets) - 1) % features
        return bags.repeat(np.diff(self.offsets))

    def require_fit(self, rows: int, features: int) -> None:
        """Raise ArrayError for shapes and types that are not those of bags of B rows, wherever they lie."""
        count = len(self.values)
        shapes = {"values": (count,), "offsets": (rows * features + 1,), "weights": (count,)}
        kinds = {"values": "uint32", "offsets": "int64", "weights": "float32"}
        for name, array in self._asdict().items():
            if name == "weights" and (array is None or array.shape == (0,)):
                continue
            if array.shape != shapes[name]:
                raise ArrayError(
                    f"{name} of the bags: have shape {array.shape}, but must have {shapes[name]}"
                )
            if array.dtype != kinds[name]:
                raise ArrayError(f"{name} of the bags: hold {array.dtype}, but must hold {kinds[name]}")

    def check(self, rows: int, pooling: tuple[str, ...]) -> None:
        """Raise ArrayError unless these, on the host, are bags of B rows, and have weights only where they
        can: a maximum has none."""
        self.require_fit(rows, len(pooling))
        offsets, count = self.offsets, len(self.values)
        if offsets[0] != 0 or offsets[-1] != count or (np.diff(offsets) < 0).any():
            raise ArrayError(
                f"offsets of the bags: must go from 0 to {count}, the number of ids, and never fall"
            )
        if self.weights is None or not len(self.weights):
            return
        if not np.isfinite(self.weights).all():
            raise ArrayError("weights of the bags: must be finite")
        if "max" in pooling:
            by_max = (modes(pooling) == MAX)[self.features(len(pooling))]
            if (self.weights[by_max] != 1).any():
                f = pooling.index("max")
                raise ArrayError(
                    f"weights of the bags: must be 1 where a feature is pooled by max, as {f} is"
                )


def cut(ids: Any, start: int, stop: int, rows: int) -> Any:
    """The ids, (B, F) or bags on the host, of some of B rows."""
    if (bags := bags_of(ids)) is None:
        return ids[start:stop]
    features = (len(bags.offsets) - 1) // rows
    offsets = bags.offsets[start * features : stop * features + 1]
    inside = slice(int(offsets[0]), int(offsets[-1]))
    weighted = bags.weights is not None and len(bags.weights)
    return Bags(bags.values[inside], offsets - offsets[0], bags.weights[inside] if weighted else None)


def modes(pooling: tuple[str, ...]) -> np.ndarray:
    """(F,) uint8: the number of each in POOLINGS, for a kernel."""
    return np.array([POOLINGS.index(name) for name in pooling], np.uint8)


def bags_of(ids: Any) -> Bags | None:
    """The bags that are given for ids; None where that is an array."""
    return Bags(*ids) if isinstance(ids, tuple) else None


def rows_of(ids: Any, features: int) -> int:
    """B, of an array of ids (B, F) or bags."""
    return len(ids) if (bags := bags_of(ids)) is None else bags.rows(features)
