"""Ranks that compute on GPUs, each on a card of its own: arrays there travel by NCCL.

MPI starts, leads and ends the processes as ever, and brings together what lies on the host (ranks.py). All
that NCCL does is queued on one stream beside the one that computes:

    exchange   waits until compute has come to where an array was handed over
    compute    waits, behind `finish` and all that is not begun but done, for what exchange has queued

NCCL wants its calls in the same order on all ranks. They are, as all run the same program.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from itertools import accumulate
from types import ModuleType, SimpleNamespace
from typing import Any

from robe.errors import RobeError
from robe.feed import Streams
from robe.ranks import TRIPS, Mpi


class CardsError(RobeError):
    """Cards that NCCL cannot connect."""


def on_device(method: Callable) -> Callable:
    """The method for arrays of the device; for those of the host that of Mpi is called instead."""

    @wraps(method)
    def call(self: "Nccl", *arrays: Any, **known: Any) -> Any:
        first = arrays[0][0] if isinstance(arrays[0], Sequence) else arrays[0]
        if isinstance(first, self.kind):
            return method(self, *arrays, **known)
        return getattr(super(Nccl, self), method.__name__)(*arrays, **known)

    return call


class Nccl(Mpi):
    """The ranks of a communicator of mpi4py, with arrays on the host and on cards.

    nccl: the module cupy.cuda.nccl; kind: the class of arrays on a card, in one piece each where they travel;
    streams: of feed.py, of which `copies` is for exchange alone.
    """

    def __init__(self, comm: Any, nccl: ModuleType, kind: type, streams: Streams):
        super().__init__(comm)
        self.nccl, self.kind, self.streams = nccl, kind, streams
        self.cards: Any = None  # NCCL's communicator

    def _connected(self) -> Any:
        """`cards`, made where something travels first: there all ranks are, and not before."""
        if self.cards is not None:
            return self.cards
        try:
            found = self.told(self.nccl.get_unique_id)
            self.cards = self.nccl.NcclCommunicator(self.size, found, self.rank)
            return self.cards
        except Exception as error:  # CuPy has no name for some of NCCL's, and raises a KeyError
            told = f"NCCL cannot connect the GPUs of {self.size} processes ({type(error).__name__}: {error})"
            remedy = "NCCL_DEBUG=INFO has it tell why, and --backend cpu does without"
            raise CardsError(f"{told}; {remedy}") from None

    @on_device
    def add(self, array: Any) -> None:
        self.moved += TRIPS * self._of_a_trip([array])
        self._queued([partial(self._sum, array, None)])()

    @on_device
    def begin(self, array: Any) -> None:
        self.moved += TRIPS * self._of_a_trip([array])
        self.begun.append(SimpleNamespace(Wait=self._queued([partial(self._sum, array, None)])))

    @on_device
    def reduced(self, parts: Sequence[Any]) -> None:
        self.moved += self._of_a_trip(parts)
        self._queued(partial(self._sum, part, rank) for rank, part in enumerate(parts))()

    @on_device
    def spread(self, parts: Sequence[Any]) -> None:
        self.moved += self._of_a_trip(parts)
        self._queued(partial(self._share, part, rank) for rank, part in enumerate(parts))()

    @on_device
    def joined(self, *arrays: Any, counts: list[int] | None = None) -> tuple:
        counts = counts or self.numbers(len(arrays[0]))
        stops, wholes, sent = list(accumulate(counts)), [], []
        for number, array in enumerate(arrays):
            shape = stops[-1], *array.shape[1:]
            whole = self._room(f"card {number}", shape, array.dtype, self.streams.empty)
            parts = [whole[stop - count : stop] for stop, count in zip(stops, counts, strict=True)]
            parts[self.rank][...] = array
            wholes.append(whole)
            sent += [partial(self._share, part, rank) for rank, part in enumerate(parts)]
        self.moved += self._of_a_trip(wholes)
        self._queued(sent)()
        return tuple(wholes)

    def _queued(self, calls: Iterable[Callable[[Any, int], None]]) -> Callable[[], None]:
        """Queue what these call NCCL's communicator for, as one; returns what has compute wait for it."""
        cards, streams = self._connected(), self.streams
        handed, done = streams.event(), streams.event()
        handed.record(streams.compute)
        streams.copies.wait_event(handed)
        self.nccl.groupStart()
        for call in calls:
            call(cards, streams.copies.ptr)
        self.nccl.groupEnd()
        done.record(streams.copies)
        return partial(streams.compute.wait_event, done)

    def _sum(self, array: Any, rank: int | None, cards: Any, stream: int) -> None:
        """Add an array up in place: on one rank, or for None on all."""
        if array.size:
            held = getattr(self.nccl, f"NCCL_{array.dtype.name.upper()}")
            what = array.data.ptr, array.data.ptr, array.size, held, self.nccl.NCCL_SUM
            if rank is None:
                cards.allReduce(*what, stream)
            else:
                cards.reduce(*what, rank, stream)

    def _share(self, array: Any, rank: int, cards: Any, stream: int) -> None:
        """Send an array, as bytes, from one rank to all."""
        if array.size:
            cards.bcast(array.data.ptr, array.nbytes, self.nccl.NCCL_UINT8, rank, stream)
