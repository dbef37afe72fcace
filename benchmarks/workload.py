"""What is measured on: tables of the presets' sizes, and batches that look like click logs.

NumPy only, so that a peer's process can draw the same batches without loading our kernels.
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipeline.schema import CRITEO_KAGGLE_CARDINALITIES, CRITEO_TB_CARDINALITIES
from robe.config import PRESETS, DataSpec

# Real logs repeat their frequent values. With this exponent, 10,000 rows on Criteo Kaggle's tables have
# 46,000 distinct values; 10,000 real ones have 43,600.
ZIPF = 1.1
# Distinct batches in rotation: a batch that is measured again and again finds its rows in the cache.
ROTATION = 4
DENSE = 13


class Batch(NamedTuple):
    label: np.ndarray  # (B,) float32
    dense: np.ndarray  # (B, 13) float32
    ids: np.ndarray  # (B, F) uint32


@dataclass(frozen=True)
class Workload:
    """Tables, and the law of the ids that look into them.

    tables: `kaggle`, `tb10m` or `mlperf`, the preset's tables, with ids from a Zipf law; or `uniform`, 26
        equal tables as wide as mlperf's, with uniform ids.
    table_bytes: the largest tables are cut, all to as many rows, until they fill no more bytes in all, as the
        DLRM's --max-ind-range does.
    """

    tables: str
    table_bytes: float

    @property
    def preset(self) -> str:
        return "mlperf" if self.tables == "uniform" else self.tables

    @property
    def width(self) -> int:
        return PRESETS[self.preset].width

    @property
    def cardinalities(self) -> tuple[int, ...]:
        published = {"kaggle": CRITEO_KAGGLE_CARDINALITIES, "uniform": (2**31,) * 26}
        published = published.get(self.tables, CRITEO_TB_CARDINALITIES)
        rows = self.table_bytes / (4 * self.width)
        caps = range(1, max(published) + 1)
        cap = max(1, bisect_right(caps, rows, key=lambda cap: sum(min(n, cap) for n in published)))
        return tuple(min(n, cap) for n in published)

    @property
    def full_bytes(self) -> int:
        return 4 * self.width * sum(self.cardinalities)

    def data(self) -> DataSpec:
        return DataSpec(DENSE, self.cardinalities, "dictionary", "", f"{self.tables}, for measurements")

    def draw(self, rows: int) -> list[Batch]:
        """ROTATION batches, the same each time."""
        rng = np.random.default_rng([rows, len(self.tables)])
        return [
            Batch(
                (rng.random(rows) < 0.25).astype(np.float32),
                rng.random((rows, DENSE), np.float32),
                self._ids(rng.random((rows, len(self.cardinalities)))),
            )
            for _ in range(ROTATION)
        ]

    def _ids(self, u: np.ndarray) -> np.ndarray:
        """Ids (B, F) from uniform numbers in [0, 1)."""
        n = np.array(self.cardinalities)
        if self.tables == "uniform":
            return (u * n).astype(np.uint32)
        # The inverse of the law's distribution function, taken as continuous, from rank 1 to n.
        rank = ((((n + 1.0) ** (1 - ZIPF) - 1) * u + 1) ** (1 / (1 - ZIPF))).astype(np.uint64)
        # Frequent values do not lie together: an odd prime spreads them, one to one unless it divides n.
        return ((np.minimum(rank, n) - 1) * 2654435761 % n).astype(np.uint32)
