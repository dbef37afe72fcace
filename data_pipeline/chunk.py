"""What the readers of logs yield: rows as NumPy arrays, and the lines that hold none."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from data_pipeline.bags import IdsOfRows

BadRows = Literal["error", "skip"]  # what becomes of lines that hold no row


@dataclass(frozen=True)
class Chunk:
    """Some consecutive rows of a log.

    line: (n,) int64, the number of each row's line, from 1 on, not counting a header; without gaps unless
        lines were rejected.
    label: (n,) int32, 0 or 1, or None if the log has no label column.
    dense: (n, number of dense columns) float32, transformed; missing values are those of the schema.
    clipped: (n, number of dense columns) bool, which of them were below 0 and became 0.
    ids: (n, number of categorical columns) uint32, 0 where missing; bags where the schema has any.
    position: how many bytes of the file, as it lies on disk, have been read so far.
    weight: (n,) float32, finite and at least 0; None if the schema has none, or labels are not read.
    split: (n,) uint8, the values of `schema.SPLIT_DAYS`; None in the same way.
    """

    line: np.ndarray
    label: np.ndarray | None
    dense: np.ndarray
    clipped: np.ndarray
    ids: IdsOfRows
    position: int
    weight: np.ndarray | None = None
    split: np.ndarray | None = None


class Rejected(NamedTuple):
    """A line that breaks the rules.

    line: its number, as in `Chunk`.
    where: the same in words, as an error names it.
    text: the line without its end; of a table the fields as they were read, with tabs between them.
    """

    line: int
    where: str
    reason: str
    text: bytes


# What a reader yields: the rows of a part of the log, and the lines of that part that are none.
Parsed = tuple[Chunk, list[Rejected]]
