"""The steps of a table that several ranks take apart, and when they have to exchange a row.

With `--staleness S` each rank steps the rows that its part of a batch reads, by the gradients of that part
alone. What it has done to a row since the row was last exchanged is its *move*: the difference in weights,
and in the sums that the optimizer keeps. Each row has a clock for each rank, the steps that are in its move.
Before a look-up the ranks tell one another which rows they are to read, so that all have the same clocks, and

    a row is exchanged if a rank is to read it that lacks more than S steps of the others, or whose own move
    of it has more than S

which all find alike. Whoever has moved such a row sends its move; each rank takes the row back to what it was
when it was last exchanged, and adds the moves of all, in the order of the ranks. So all copies of the row are
the same to the bit, and its clocks are 0. `settle` exchanges all rows that have moved.

These are the bounds of HET (Miao et al., 2022, arXiv 2112.07221): a cached row may be read while its clock is
at most S ahead of what it was when it was fetched, and that of the server at most S ahead of it. HET's server
counts the steps that were sent to it. Here those count, too, that were not, so the bound is the stricter.

Of SGD the moves of a step add up to the step of one process by the same gradients. With Adagrad the sums of
squares are those of the ranks' own gradients, which are parts of that of the whole batch, and a rank divides
by what it knows of them. As long as a row is read by one rank at a time that is the same; where all K read it
at once, its steps are up to sqrt(K) times as long, and the first ones up to K times. Other optimizers keep
means, whose moves do not add up.
"""

from collections import Counter
from typing import Any

import numpy as np

from robe.backend import Backend
from robe.config import ConfigError
from robe.embeddings import ArrayEmbedding
from robe.kernels.parts.distinct import distinct
from robe.timeline import Phase, no_phase

AT_ONCE = 2**16  # rows that are exchanged at a time where all are


class Stale:
    """The steps of a table by ranks, each of which may lack `staleness` steps of the others.

    It takes the place of an Exchange; what it is to `update` has to be `ready` before that. Raises
    ConfigError on a GPU.
    """

    def __init__(self, table: ArrayEmbedding, backend: Backend, staleness: int):
        if backend.xp is not np:
            raise ConfigError("--staleness keeps count of rows on CPUs alone; add --backend cpu")
        self.table, self.ranks, self.most = table, backend.ranks, staleness
        self.ways: Counter[str] = Counter()
        self.phase: Phase = no_phase
        self.features = np.arange(table.features)
        rows = table.weights // table.width
        # (R, n) each: weights, and what the optimizer keeps; and what was exchanged last of rows with a move.
        self.arrays = [array.reshape(rows, -1) for array in (table.stepped, *table.sums.values())]
        self.agreed = [np.empty_like(array) for array in self.arrays]
        # A rank may read a row when it has moved it by as many steps as it may lack, and moves it once more.
        self.clocks = np.zeros((rows, self.ranks.size), np.min_scalar_type(staleness + 1))

    def ready(self, ids, features=None) -> None:
        """Exchange what has to be before these ids are looked up, and their rows stepped; ids and features as
        of ArrayEmbedding's `update`, of this rank."""
        of = self.features if features is None else features[:, None]
        own, _ = distinct(self.table.base[of] + ids)
        with self.phase("exchange, ids"):  # where a rank waits for those behind it
            counts = self.ranks.numbers(len(own))
            (told,) = self.ranks.joined(own.astype(self.table.token), counts=counts)
        read = np.split(told.astype(np.intp), np.cumsum(counts)[:-1])
        self._exchange(np.unique(np.concatenate([self._due(rank, rows) for rank, rows in enumerate(read)])))
        rows = read[self.ranks.rank]
        first = rows[self.clocks[rows, self.ranks.rank] == 0]
        for array, agreed in zip(self.arrays, self.agreed, strict=True):
            agreed[first] = array[first]
        for rank, rows in enumerate(read):
            self.clocks[rows, rank] += 1

    def _due(self, rank: int, rows) -> np.ndarray:
        """Of rows (n,) that a rank is to read, those that have to be exchanged before."""
        clocks = self.clocks[rows]
        lacked = clocks.sum(axis=1) - clocks[:, rank]
        return rows[np.maximum(lacked, clocks[:, rank]) > self.most]

    def update(self, ids, d_vectors, rate: float, features=None) -> None:
        """One step of this rank's rows, as one process would take it; arguments as of the table's."""
        self.ways["moves"] += 1
        self.table.update(ids, d_vectors, rate, features)

    def settle(self) -> None:
        """Exchange all rows that have moved, so that all ranks have the same."""
        due = np.flatnonzero(self.clocks.any(axis=1))
        for start in range(0, len(due), AT_ONCE):
            self._exchange(due[start : start + AT_ONCE])

    def _exchange(self, due) -> None:
        """Add the moves of all ranks to the rows due (n,), of which each is there once."""
        if not len(due):
            return
        senders = self.clocks[due] > 0
        own, moves = due[senders[:, self.ranks.rank]], []
        for array, agreed in zip(self.arrays, self.agreed, strict=True):
            moves.append(array[own] - agreed[own])
            array[own] = agreed[own]
        with self.phase("exchange, moves"):
            found: tuple[Any, ...] = self.ranks.joined(*moves)
        stop = 0
        for rank in range(self.ranks.size):
            rows = due[senders[:, rank]]
            start, stop = stop, stop + len(rows)
            for array, sent in zip(self.arrays, found, strict=True):
                array[rows] += sent[start:stop]
        self.clocks[due] = 0
