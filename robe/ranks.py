"""Processes that train one model together, and all that they exchange.

Each rank holds the whole model. Every batch is cut into consecutive parts, in the order of the ranks:

    forward, backward    each rank its own part; the loss is the mean over the whole batch
    dense gradients      are added up, those of an MLP while the pass goes on behind it
    gradients of the vectors that were looked up    travel as exchange.py says

Then the step of one process by the whole batch is taken, by every rank or by one for all. So an embedding
knows nothing of ranks, a weight in few bits is rounded once a step, and all copies stay the same to the bit.
They differ from those of one process by the order in which floats are added up.

`Alone` is one process, and says what each method means. Another way to exchange is another such class.
"""

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import pairwise
from math import prod
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
# Up to so many ranks send arrays to each other in turn, each to one at a time. Two on one machine, by MPICH
# 5.0.2, join 14 MB each in a quarter of the time of its Allgatherv so, and add up 104 MB in half of that of
# its Allreduce; a step of `kaggle` takes a hundredth less than with its Iallreduce.
PAIRS = 16
TRIPS = 2  # of an array that is added up: a share of it from each other rank, then the sums of their shares
LINGER = 0.5  # seconds in which mpiexec may read what was said, before it is asked to end all


class Alone:
    """The one process of a training that is not shared: it has nothing to exchange."""

    rank, size = 0, 1
    moved = 0.0  # bytes that each rank has received so far, on average and at least

    def part(self, rows: int) -> slice:
        """Which rows of a batch of so many are this rank's."""
        return self.parts(rows)[self.rank]

    def parts(self, count: int) -> list[slice]:
        """So many rows or weights, cut into consecutive parts, one for each rank."""
        bounds = [count * rank // self.size for rank in range(self.size + 1)]
        return [slice(*pair) for pair in pairwise(bounds)]

    def add(self, array: Any) -> None:
        """Make of an array, which each rank has, the sum over all ranks, in place."""

    def reduced(self, parts: Sequence[Any]) -> None:
        """Make of the part that is this rank's, of one array, the sum over all ranks, in place.

        parts: as many as ranks, in their order; the others are lost.
        """

    def spread(self, parts: Sequence[Any]) -> None:
        """Make of each part, of one array, what the rank has that it belongs to, in place."""

    def begin(self, array: Any) -> None:
        """Begin what `add` does. It is done after the next `finish`; until then nobody touches the array."""

    def finish(self, phase: Callable[[str], AbstractContextManager]) -> None:
        """Wait for all that was begun; phase: times it, as of timeline.py."""

    def joined(self, *arrays: Any, counts: list[int] | None = None) -> tuple:
        """Arrays of one length, each with those of the other ranks in front and behind, along the first axis;
        valid until the next call. counts: the lengths of all ranks, where these know them."""
        return arrays

    def numbers(self, number: int) -> list[int]:
        """The number that each rank gives, an int64."""
        return [number]

    def told(self, find: Callable[[], T]) -> T:
        """What `find` finds on rank 0, where alone it is called."""
        return find()

    def asked(self, find: Callable[[Any], T]) -> list[T]:
        """What `find`, which gets these ranks, finds on each; asked by rank 0, while the others `follow`."""
        return [find(self)]

    def beside(self, value: T) -> tuple[list[T], int]:
        """What each rank on this machine gives, and the place of this one among them."""
        return [value], 0

    def lead(self, *task: Any) -> None:
        """Tell the other ranks what there is to do. From here on an error of one rank ends all."""

    def end(self, error: BaseException) -> None:
        """End the other ranks, as this one ends by `error`, which it has told unless that does."""


class Mpi(Alone):
    """The ranks of a communicator of mpi4py, with arrays on the host."""

    def __init__(self, comm: Any):
        self.comm, self.rank, self.size, self.at_work = comm, comm.rank, comm.size, False
        self.rooms: dict[Any, Any] = {}  # where arrays of others lie
        self.begun: list[Any] = []  # requests, or what has a `Wait` like one

    def add(self, array: Any) -> None:
        if self.size > PAIRS:
            self.moved += TRIPS * self._of_a_trip([array])
            self.comm.Allreduce(None, array)  # in place
            return
        parts = [array[part] for part in self.parts(len(array))]
        self.reduced(parts)
        self.spread(parts)

    def reduced(self, parts: Sequence[Any]) -> None:
        own = parts[self.rank]
        found = self._room("part", own.shape, own.dtype)
        for to, source in self._others():
            self.comm.Sendrecv(parts[to], to, 0, found, source, 0)
            own += found
        self.moved += self._of_a_trip(parts)

    def spread(self, parts: Sequence[Any]) -> None:
        for to, source in self._others():
            self.comm.Sendrecv(parts[self.rank], to, 0, parts[source], source, 0)
        self.moved += self._of_a_trip(parts)

    def _others(self) -> Iterator[tuple[int, int]]:
        """To whom, and from whom, to send at a time, so that all send and receive at once."""
        for distance in range(1, self.size):
            yield (self.rank + distance) % self.size, (self.rank - distance) % self.size

    def begin(self, array: Any) -> None:
        if self.size > PAIRS:
            self.moved += TRIPS * self._of_a_trip([array])
            self.begun.append(self.comm.Iallreduce(None, array))
            return
        parts, pairs, tag = [array[part] for part in self.parts(len(array))], [], 1 + len(self.begun)
        for to, source in self._others():
            found = self._room((tag, source), parts[self.rank].shape, array.dtype)
            requests = self.comm.Irecv(found, source, tag), self.comm.Isend(parts[to], to, tag)
            pairs.append((found, requests))
        self.moved += self._of_a_trip(parts)
        self.begun.append(SimpleNamespace(Wait=partial(self._add_up, parts, pairs)))

    def _add_up(self, parts: Sequence[Any], pairs: list) -> None:
        """Do what was begun: add what comes from the others to the part of this rank, and spread it."""
        for found, requests in pairs:
            for request in requests:
                request.Wait()
            parts[self.rank][...] += found
        self.spread(parts)

    def finish(self, phase: Callable[[str], AbstractContextManager]) -> None:
        with phase("exchange, dense"):
            while self.begun:
                self.begun.pop(0).Wait()

    def _of_a_trip(self, parts: Sequence[Any]) -> float:
        """Bytes that each rank receives as each sends its part of an array to all, or all theirs to each."""
        return sum(part.nbytes for part in parts) * (self.size - 1) / self.size

    def joined(self, *arrays: Any, counts: list[int] | None = None) -> tuple:
        counts = counts or self.numbers(len(arrays[0]))
        return tuple(self._joined(number, array, counts) for number, array in enumerate(arrays))

    def _joined(self, number: int, array: Any, counts: list[int]) -> np.ndarray:
        whole = self._room(number, (sum(counts), *array.shape[1:]), array.dtype)
        parts = np.split(whole, np.cumsum(counts)[:-1])
        parts[self.rank][...] = array
        if self.size > PAIRS:
            self.moved += self._of_a_trip(parts)
            self.comm.Allgatherv(None, [whole, [part.size for part in parts]])  # in place
        else:
            self.spread(parts)
        return whole

    def _room(
        self, name: Any, shape: tuple[int, ...], dtype: Any, empty: Callable[..., Any] = np.empty
    ) -> Any:
        """An array of this rank's own, the same memory for a name; empty: makes it."""
        size = prod(shape) * dtype.itemsize
        if name not in self.rooms or len(self.rooms[name]) < size:
            self.rooms[name] = empty(size, np.uint8)
        return self.rooms[name][:size].view(dtype).reshape(shape)

    def numbers(self, number: int) -> list[int]:
        found = np.empty(self.size, np.int64)
        self.comm.Allgather(np.array([number], np.int64), found)
        return found.tolist()

    def told(self, find: Callable[[], T]) -> T:
        return self.comm.bcast(find() if self.rank == 0 else None)

    def asked(self, find: Callable[[Any], T]) -> list[T]:
        if self.rank == 0:
            self._send(find)
        self.at_work = True  # so that an error of one ends all
        found = self.comm.allgather(find(self))
        self.at_work = False
        return found

    def beside(self, value: T) -> tuple[list[T], int]:
        mpi = sys.modules[type(self.comm).__module__]  # mpi4py.MPI
        here = self.comm.Split_type(mpi.COMM_TYPE_SHARED)
        return here.allgather(value), here.rank

    def lead(self, *task: Any) -> None:
        self.at_work = True
        self._send(task)

    def _send(self, word: Any) -> None:
        for rank in range(1, self.size):
            self.comm.send(word, rank)

    def follow(self) -> tuple:
        """The task that rank 0 gives to `lead`, behind what it has `asked`; ends this process as rank 0 ends
        where it gives none."""
        while callable(task := self._word()):
            self.asked(task)
        if isinstance(task, int):
            sys.exit(task)
        self.at_work = True
        return task

    def _word(self) -> Any:
        """What rank 0 sends."""
        while not self.comm.iprobe(0):  # which takes no core from rank 0 meanwhile, as to wait by MPI would
            time.sleep(0.01)
        return self.comm.recv(source=0)

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
