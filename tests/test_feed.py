"""Feeding a device: what the consumer sees, on a device that runs its work late and in any legal order."""

import random
import types
from pathlib import Path

import numpy as np
import pytest

from robe import feed as feeding

SOURCE = Path(feeding.__file__).read_text()
ORDERING = (".record(", ".synchronize()", ".wait_event(")
WAITS = [i for i, line in enumerate(SOURCE.splitlines()) if any(call in line for call in ORDERING)]


class Device:
    """Streams are queues, run by chance: a head that waits for an event stays until that was recorded."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.lazy = self.random.choice([1, 3, 10, 30])
        self.compute, self.copies = Stream(self), Stream(self)
        self.free, self.taken = {}, []

    def streams(self):
        return feeding.Streams(
            lambda *place: Array(self.take("device", *place)),
            lambda *place: self.take("pinned", *place),
            lambda: Event(self),
            self.compute,
            self.copies,
        )

    def take(self, *key):
        """Memory from a pool, with what was last written there."""
        free = self.free.setdefault(key, [])
        array = free.pop() if free else np.zeros(*key[1:])
        self.taken.append((key, array))
        return array

    def give_back(self):
        self.random.shuffle(self.taken)
        for key, array in self.taken:
            self.free[key].append(array)
        self.taken = []

    def some(self):
        """Run what may have been done since the last look: mostly nothing, on a lazy device."""
        self.run(self.random.choice([0] * self.lazy + [1, 2, 5]))

    def run(self, steps):
        """Run a few operations, each of a stream that can go on; returns whether all could be run."""
        for _ in range(steps):
            able = [s for s in (self.compute, self.copies) if s.queue and s.queue[0][0]()]
            if not able:
                return False
            self.random.choice(able).queue.pop(0)[1]()
        return True


class Stream:
    def __init__(self, device):
        self.device, self.queue = device, []

    def add(self, action, ready=lambda: True):
        self.queue.append((ready, action))
        self.device.some()

    def wait_event(self, event):
        number = event.recorded
        self.add(lambda: None, lambda: event.done >= number)


class Event:
    def __init__(self, device):
        self.device, self.recorded, self.done = device, 0, 0

    def record(self, stream):
        self.recorded += 1
        number = self.recorded
        stream.add(lambda: setattr(self, "done", number))

    def synchronize(self):
        while self.done < self.recorded:
            assert self.device.run(1), "the host waits for what never comes"


class Array:
    """Memory on the device, which the host cannot read."""

    def __init__(self, values):
        self.values = values
        self.shape, self.dtype = values.shape, values.dtype

    def __len__(self):
        return len(self.values)

    def __getitem__(self, rows):
        return Array(self.values[rows])

    def set(self, host, stream):
        assert host.shape == self.shape
        stream.add(lambda: np.copyto(self.values, host))

    def get(self, stream, out, blocking):
        assert not blocking
        stream.add(lambda: np.copyto(out, self.values))


def rows_of(number):
    """The first batch is a short one, as where a run was resumed."""
    return 2 if number % 7 == 0 else 4


def batches(numbers):
    for number in numbers:
        n = rows_of(number)
        bags = np.full(bag_size(number), number, np.uint32), np.full(1, number)
        yield number, (np.full(n, number, np.float32), np.full((n, 2), number, np.uint32), bags)


def bag_size(number):
    """Most batches hold more than any before, some nothing."""
    return number * (number % 7 != 3)


def steps(device, fed, seen):
    """A step reads its batch twice, late, and makes a result of it."""
    for number, (a, b, (c, d)) in fed:
        result = Array(np.zeros(len(a), np.float32))
        for _ in range(2):
            arrays = a, b, c, d
            device.compute.add(
                lambda arrays=arrays, n=number: seen.append(
                    (n, *(x for a in arrays for x in a.values.ravel()))
                )
            )
        device.compute.add(lambda r=result, a=a: np.copyto(r.values, 2 * a.values))
        yield number, result


def right(module, seed):
    """Four passes, each in memory that others had before, some of them left early: is every value right?"""
    device, seen, expected = Device(seed), [], []
    for turn in range(4):
        numbers = range(7 * turn, 7 * turn + 7)
        left_after = device.random.choice(range(1, 9))
        results = steps(device, module.feed(device.streams(), batches(numbers), 4), seen)
        wants_results = device.random.choice([False, True])
        if wants_results:
            results = module.fetch(device.streams(), results, 4)
        for count, (number, result) in enumerate(results, 1):
            device.some()
            if wants_results and list(result) != [2 * number] * rows_of(number):
                return False
            if count == left_after:
                break
        results.close()
        begun = numbers[: left_after + wants_results]
        expected += [(n, *[n] * (3 * rows_of(n) + bag_size(n) + 1)) for n in begun for _ in range(2)]
        device.give_back()
    while device.run(1):
        pass
    return seen == expected and not device.compute.queue and not device.copies.queue


def test_every_order_gives_the_right_values():
    assert all(right(feeding, seed) for seed in range(300))


@pytest.mark.parametrize("line", WAITS)
def test_no_wait_is_needless(line):
    """Without any one of the lines that order the streams, some seed goes wrong."""
    lines = SOURCE.splitlines()
    lines[line] = lines[line].replace(lines[line].strip(), "pass")
    module = types.ModuleType("without_a_wait")
    exec("\n".join(lines), module.__dict__)
    assert not all(right(module, seed) for seed in range(300))


def test_all_lines_that_order_the_streams_are_tried():
    assert len(WAITS) == 10


def test_a_batch_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match="could not broadcast"):
        list(feeding.feed(Device(0).streams(), batches([1]), 3))
