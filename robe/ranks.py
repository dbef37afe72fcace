"""Processes that train one model together, and all that they exchange.

Each rank holds the whole model. Every batch is cut into consecutive parts, in the order of the ranks:

    forward, backward    each rank its own part; the loss is the mean over the whole batch
    dense gradients      are added up, those of an MLP while the pass goes on behind it
    gradients of the vectors that were looked up    travel as exchange.py says

Then every rank takes the step of one process by the whole batch. So an embedding knows nothing of ranks, a
weight in few bits is rounded once a step, and all copies stay the same to the bit. They differ from those of
one process by the order in which floats are added up.

`Alone` is one process, and says what each method means. Another way to exchange is another such class.
"""

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from math import prod
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
# Up to so many ranks send arrays to each other in turn, each to one at a time. Two on one machine, by MPICH
# 5.0.2, join 14 MB each in a quarter of the time of its Allgatherv so, and add up 104 MB in half of that of
# its Allreduce.
PAIRS = 16
TRIPS = 2  # of an array that is added up: a share of it from each other rank, then the sums of their shares
LINGER = 0.5  # seconds in which mpiexec may read what was said, before it is asked to end all


class Alone:
    """The one process of a training that is not shared: it has nothing to exchange."""

    rank, size = 0, 1
    moved = 0.0  # bytes that each rank has received so far, on average and at least

    def part(self, rows: int) -> slice:
        """Which rows of a batch of so many are this rank's."""
        first, stop = (rows * rank // self.size for rank in (self.rank, self.rank + 1))
        return slice(first, stop)

    def add(self, array: Any) -> None:
        """Make of an array, which each rank has, the sum over all ranks, in place."""

    def begin(self, array: Any) -> None:
        """Begin what `add` does. It is done after the next `finish`; until then nobody touches the array."""

    def finish(self, phase: Callable[[str], AbstractContextManager]) -> None:
        """Wait for all that was begun; phase: times it, as of timeline.py."""

    def joined(self, *arrays: Any) -> tuple:
        """Arrays of one length, each with those of the other ranks in front and behind, along the first axis;
        valid until the next call."""
        return arrays

    def numbers(self, number: int) -> list[int]:
        """The number that each rank gives, an int64."""
        return [number]

    def told(self, find: Callable[[], T]) -> T:
        """What `find` finds on rank 0, where alone it is called."""
        return find()

    def lead(self, *task: Any) -> None:
        """Tell the other ranks what there is to do. From here on an error of one rank ends all."""

    def end(self, error: BaseException) -> None:
        """End the other ranks, as this one ends by `error`, which it has told unless that does."""


class Mpi(Alone):
    """The ranks of a communicator of mpi4py, with arrays on the host."""

    def __init__(self, comm: Any):
        self.comm, self.rank, self.size, self.at_work = comm, comm.rank, comm.size, False
        self.rooms: dict[Any, np.ndarray] = {}  # where arrays of others lie
        self.begun: list[Any] = []  # requests

    def add(self, array: Any) -> None:
        self.moved += self._of_a_sum(array)
        if self.size > PAIRS:
            self.comm.Allreduce(None, array)  # in place
            return
        shares = np.array_split(array, self.size)
        own = shares[self.rank]
        found = self._room("share", own.shape, own.dtype)
        for to, source in self._others():
            self.comm.Sendrecv(shares[to], to, 0, found, source, 0)
            own += found
        self._spread(shares)

    def _others(self) -> Iterator[tuple[int, int]]:
        """To whom, and from whom, to send at a time, so that all send and receive at once."""
        for distance in range(1, self.size):
            yield (self.rank + distance) % self.size, (self.rank - distance) % self.size

    def _spread(self, parts: Sequence[Any]) -> None:
        """Send the part that is this rank's to the others, and get theirs."""
        for to, source in self._others():
            self.comm.Sendrecv(parts[self.rank], to, 0, parts[source], source, 0)

    def begin(self, array: Any) -> None:
        self.moved += self._of_a_sum(array)
        self.begun.append(self.comm.Iallreduce(None, array))

    def finish(self, phase: Callable[[str], AbstractContextManager]) -> None:
        with phase("exchange, dense"):
            while self.begun:
                self.begun.pop(0).Wait()

    def _of_a_sum(self, array: Any) -> float:
        """Bytes that each rank receives as an array is added up."""
        return TRIPS * array.nbytes * (self.size - 1) / self.size

    def joined(self, *arrays: Any) -> tuple:
        counts = self.numbers(len(arrays[0]))
        return tuple(self._joined(number, array, counts) for number, array in enumerate(arrays))

    def _joined(self, number: int, array: Any, counts: list[int]) -> np.ndarray:
        whole = self._room(number, (sum(counts), *array.shape[1:]), array.dtype)
        self.moved += whole.nbytes * (self.size - 1) / self.size
        parts = np.split(whole, np.cumsum(counts)[:-1])
        parts[self.rank][...] = array
        if self.size > PAIRS:
            self.comm.Allgatherv(None, [whole, [part.size for part in parts]])  # in place
        else:
            self._spread(parts)
        return whole

    def _room(self, name: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of this rank's own, the same memory for a name."""
        size = prod(shape) * dtype.itemsize
        if name not in self.rooms or len(self.rooms[name]) < size:
            self.rooms[name] = np.empty(size, np.uint8)
        return self.rooms[name][:size].view(dtype).reshape(shape)

    def numbers(self, number: int) -> list[int]:
        found = np.empty(self.size, np.int64)
        self.comm.Allgather(np.array([number], np.int64), found)
        return found.tolist()

    def told(self, find: Callable[[], T]) -> T:
        return self.comm.bcast(find() if self.rank == 0 else None)

    def lead(self, *task: Any) -> None:
        self.at_work = True
        self._send(task)

    def _send(self, word: Any) -> None:
        for rank in range(1, self.size):
            self.comm.send(word, rank)

    def follow(self) -> tuple:
        """The task that rank 0 gives to `lead`; ends this process as rank 0 ends where it gives none."""
        while not self.comm.iprobe(0):  # which takes no core from rank 0 meanwhile, as to wait by MPI would
            time.sleep(0.01)
        task = self.comm.recv(source=0)
        if isinstance(task, int):
            sys.exit(task)
        self.at_work = True
        return task

    def end(self, error: BaseException) -> None:
        ended = error.code if isinstance(error, SystemExit) else error
        code = ended if isinstance(ended, int) else int(ended is not None)
        if not self.at_work:
            if self.rank == 0:
                self._send(code)
        elif code:
            # Python would say it only after this.
            if ended is error:
                traceback.print_exception(error)
            elif isinstance(ended, str):
                print(ended, file=sys.stderr)
            sys.stdout.flush()
            time.sleep(LINGER)
            self.comm.Abort(code)


ALONE = Alone()
