"""Processes that train one model together, and all that they exchange.

Each rank holds the whole model. Every batch is cut into consecutive parts, in the order of the ranks:

    forward, backward    each rank its own part; the loss is the mean over the whole batch
    dense gradients      are added up
    gradients of the vectors that were looked up, and their ids    are joined to those of the whole batch

Then every rank takes the step of one process by the whole batch. So an embedding knows nothing of ranks, a
weight in few bits is rounded once a step, and all copies stay the same to the bit. They differ from those of
one process by the order in which floats are added up.

`Alone` is one process, and says what each method means. Another way to exchange is another such class.
"""

import sys
import time
import traceback
from collections.abc import Callable
from math import prod
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
LINGER = 0.5  # seconds in which mpiexec may read what was said, before it is asked to end all


class Alone:
    """The one process of a training that is not shared: it has nothing to exchange."""

    rank, size = 0, 1

    def part(self, rows: int) -> slice:
        """Which rows of a batch of so many are this rank's."""
        first, stop = (rows * rank // self.size for rank in (self.rank, self.rank + 1))
        return slice(first, stop)

    def place(self, rows: int) -> tuple[int, int]:
        """How many rows of a batch stand in front of this rank's, which are so many, and how many all are."""
        return 0, rows

    def add(self, array: Any) -> None:
        """Make of an array, which each rank has, the sum over all ranks, in place."""

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
        self.rooms: dict[int, np.ndarray] = {}  # where joined arrays lie

    def place(self, rows: int) -> tuple[int, int]:
        counts = self.numbers(rows)
        return sum(counts[: self.rank]), sum(counts)

    def add(self, array: Any) -> None:
        self.comm.Allreduce(None, array)  # in place

    def joined(self, *arrays: Any) -> tuple:
        counts = self.numbers(len(arrays[0]))
        return tuple(self._joined(number, array, counts) for number, array in enumerate(arrays))

    def _joined(self, number: int, array: Any, counts: list[int]) -> np.ndarray:
        shape = sum(counts), *array.shape[1:]
        size = prod(shape) * array.itemsize
        if number not in self.rooms or len(self.rooms[number]) < size:
            self.rooms[number] = np.empty(size, np.uint8)
        whole, each = self.rooms[number][:size].view(array.dtype).reshape(shape), prod(shape[1:])
        self.comm.Allgatherv(np.ascontiguousarray(array), [whole, [count * each for count in counts]])
        return whole

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
