"""Batches to the device and results back while it computes.

Two slots take turns, each a pinned array on the host and an array on the device for every part of a batch.
Copies run in a stream of their own. The host only queues work, so while the device computes step t the
copy of batch t + 1 is queued behind nothing but a free slot, and no batch has to be asked for early.

    host       waits for `copied` of the slot before it fills the pinned arrays anew
    copies     wait for `used` of the slot before they overwrite the arrays on the device
    compute    waits for `copied` before the step reads the arrays

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

    def __init__(self, arrays, rows: int, streams: Streams):
        kinds = [((rows, *array.shape[1:]), array.dtype) for array in arrays]
        self.pinned = [streams.pinned(shape, dtype) for shape, dtype in kinds]
        self.arrays = [streams.empty(shape, dtype) for shape, dtype in kinds]
        self.copied, self.used = streams.event(), streams.event()
        # Work that is still queued may read what lay in this memory before.
        self.used.record(streams.compute)


def feed(streams: Streams, batches: Generator, rows: int, phase: Phase = no_phase) -> Generator:
    """Yield each (tag, arrays from the host) as (tag, arrays on the device), valid until the next.

    rows: the most rows (size of the first axis) a batch has. Nothing is allocated after the second batch.
    """
    slots: list[Slot] = []
    with closing(batches):
        try:
            for turn, (tag, arrays) in enumerate(batches):
                with phase("copy"):
                    if turn < SLOTS:
                        slots.append(Slot(arrays, rows, streams))
                    slot, n = slots[turn % SLOTS], len(arrays[0])
                    slot.copied.synchronize()
                    streams.copies.wait_event(slot.used)
                    for array, pinned, there in zip(arrays, slot.pinned, slot.arrays, strict=True):
                        pinned[:n] = array
                        there[:n].set(pinned[:n], stream=streams.copies)
                    slot.copied.record(streams.copies)
                    streams.compute.wait_event(slot.copied)
                yield tag, tuple(there[:n] for there in slot.arrays)
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
