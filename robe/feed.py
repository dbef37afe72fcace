"""Batches to the device and results back while it computes.

Two slots take turns, each a pinned array on the host and an array on the device for every part of a batch.
Copies run in a stream of their own. The host only queues work, so while the device computes step t the
copy of batch t + 1 is queued behind nothing but a free slot, and no batch has to be asked for early.

    host       waits for `copied` of the slot before it fills the pinned arrays anew
    copies     wait for `used` of the slot before they overwrite the arrays on the device
    compute    waits for `copied` before the step reads the arrays

A part of a batch may be a tuple of arrays (bags.py), of which each has a length of its own.

The streams, events and arrays are CuPy's; tests put in a device of their own that runs what is queued as
late and in as odd an order as it may.
"""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from robe.timeline import Phase, no_phase

SLOTS = 2


@dataclass(frozen=True)
class Streams:
    """What feeding needs of a device.

    empty, pinned: (shape, dtype) -> an array on the device, or on the host where the device can read it.
    event: a new event, with `record(stream)` and `synchronize()`. Nobody waits for one that was never
        recorded.
    compute, copies: streams, with `wait_event(event)`.
    """

    empty: Callable[[tuple[int, ...], np.dtype], Any]
    pinned: Callable[[tuple[int, ...], np.dtype], np.ndarray]
    event: Callable[[], Any]
    compute: Any
    copies: Any


class Slot:
    """Room for one batch of up to `rows` rows, on both sides."""

    def __init__(self, arrays, room: list[int], streams: Streams):
        self.pinned: list[np.ndarray] = []
        self.arrays: list[Any] = []
        self.copied, self.used = streams.event(), streams.event()
        self.make(arrays, room, streams)

    def make(self, arrays, room: list[int], streams: Streams) -> None:
        """Make arrays of these lengths like those given, once no copy reads those that were there before."""
        kinds = [((n, *array.shape[1:]), array.dtype) for n, array in zip(room, arrays, strict=True)]
        self.pinned = [streams.pinned(shape, dtype) for shape, dtype in kinds]
        self.arrays = [streams.empty(shape, dtype) for shape, dtype in kinds]
        # Work that is still queued may read what lay in this memory before.
        self.used.record(streams.compute)

    def holds(self, arrays) -> bool:
        """Whether there is room for these."""
        return all(len(array) <= len(there) for array, there in zip(arrays, self.pinned, strict=True))


def flat(parts) -> list:
    """The arrays of a batch, with those of tuples among its parts."""
    return [array for part in parts for array in (part if isinstance(part, tuple) else (part,))]


def room_for(parts, rows: int) -> list[int]:
    """The length to make each of these arrays in, with room for longer ones of tuples to come."""
    longer = (tuple(max(rows, 2 * len(a)) for a in p) if isinstance(p, tuple) else rows for p in parts)
    return flat(longer)


def nested(arrays: list, parts) -> tuple:
    """As many arrays as `flat` made of the parts, with tuples where these have some."""
    left = iter(arrays)
    return tuple(tuple(next(left) for _ in p) if isinstance(p, tuple) else next(left) for p in parts)


def feed(streams: Streams, batches: Generator, rows: int, phase: Phase = no_phase) -> Generator:
    """Yield each (tag, arrays from the host) as (tag, arrays on the device), valid until the next.

    rows: the most rows (size of the first axis) a batch has. Nothing is allocated after the second batch, but
    where the arrays of a tuple are longer than any before.
    """
    slots: list[Slot] = []
    with closing(batches):
        try:
            for turn, (tag, parts) in enumerate(batches):
                arrays = flat(parts)
                with phase("copy"):
                    if turn < SLOTS:
                        slots.append(Slot(arrays, room_for(parts, rows), streams))
                    slot = slots[turn % SLOTS]
                    slot.copied.synchronize()
                    if not slot.holds(arrays):
                        slot.make(arrays, room_for(parts, rows), streams)
                    streams.copies.wait_event(slot.used)
                    fed = []
                    for array, pinned, there in zip(arrays, slot.pinned, slot.arrays, strict=True):
                        pinned, there = pinned[: len(array)], there[: len(array)]
                        pinned[...] = array
                        there.set(pinned, stream=streams.copies)
                        fed.append(there)
                    slot.copied.record(streams.copies)
                    streams.compute.wait_event(slot.copied)
                yield tag, nested(fed, parts)
                slot.used.record(streams.compute)
        finally:
            # Pinned memory goes back to its pool here, and must not be written to while it is still read.
            for slot in slots:
                slot.copied.synchronize()


def fetch(streams: Streams, results: Generator, rows: int) -> Generator:
    """Yield each (tag, array on the device) as (tag, array on the host), valid until the next.

    Results come one late: the work for the next is queued before the host waits for this one.
    """
    slots: list[tuple] = []
    late = None
    with closing(results):
        try:
            for turn, (tag, array) in enumerate(results):
                if turn < SLOTS:
                    pinned = streams.pinned((rows, *array.shape[1:]), array.dtype)
                    slots.append((pinned, streams.event()))
                pinned, copied = slots[turn % SLOTS]
                host = pinned[: len(array)]
                array.get(stream=streams.compute, out=host, blocking=False)
                copied.record(streams.compute)
                if late is not None:
                    yield _arrived(*late)
                late = tag, host, copied
            if late is not None:
                yield _arrived(*late)
        finally:
            for _, copied in slots:
                copied.synchronize()


def _arrived(tag, host, copied):
    copied.synchronize()
    return tag, host
