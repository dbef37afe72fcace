"""A recorder in place of a CUDA graph, and a backend of the simulator whose work it can record.

Arrays are of a class that notes whatever NumPy does with them; kernels are noted where they are launched. As
on a device, nothing is done while it is recorded: what arrays hold then is rubbish, and to read a number of
them is an error. A replay does it all again, with the arguments of then, on what the arrays hold now.
"""

import dataclasses
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import numpy as np

from robe.backend import aligned, select
from robe.feed import Streams, feed, fetch
from robe.kernels.parts import launch

RUBBISH = np.nan
tape = None  # what was recorded, while it is


def plain(value):
    """The value with the arrays in it as NumPy's own."""
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    if type(value) is dict:
        return {name: plain(part) for name, part in value.items()}
    return value.view(np.ndarray) if isinstance(value, Noted) else value


def computed(function, parts):
    """A result that `function` makes, of new memory unless it is a view of one of the parts."""
    found = function()
    if not isinstance(found, np.ndarray):
        require_nothing_read()
        return tuple(part.view(Noted) for part in found) if type(found) is tuple else found
    if tape is not None and not any(isinstance(a, np.ndarray) and np.shares_memory(found, a) for a in parts):
        found.fill(RUBBISH if found.dtype.kind == "f" else 0)  # integers are indices, perhaps
        tape.append(lambda: np.copyto(found, function()))
    return found.view(Noted)


def done(function):
    """Do what changes arrays, or note it."""
    if tape is None:
        function()
    else:
        tape.append(function)


def require_nothing_read():
    if tape is not None:
        raise RuntimeError("the host waits for a number while work is recorded")


class Noted(np.ndarray):
    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        call, parts = getattr(ufunc, method), plain(inputs)
        if method == "at":
            return done(lambda: call(*parts, **plain(options)))
        if out is None:
            return computed(lambda: call(*parts, **plain(options)), parts)
        done(lambda: call(*parts, out=plain(out), **plain(options)))
        return out[0]

    def __array_function__(self, function, types, arguments, options):
        if (out := options.get("out")) is not None:
            done(lambda: function(*plain(arguments), **plain(options)))
            return out
        return computed(lambda: function(*plain(arguments), **plain(options)), plain(arguments))

    def __getitem__(self, index):
        return computed(lambda: plain(self)[plain(index)], [plain(self)])

    def __setitem__(self, index, value):
        done(lambda: plain(self).__setitem__(plain(index), plain(value)))

    def fill(self, number):
        done(lambda: plain(self).fill(number))

    def copies(name):
        def method(self, *arguments, **options):
            return computed(lambda: getattr(plain(self), name)(*arguments, **options), [plain(self)])

        return method

    def reads(name):
        def method(self, *arguments):
            require_nothing_read()
            return getattr(plain(self), name)(*arguments)

        return method

    for _name in ("astype", "copy", "reshape", "ravel"):
        locals()[_name] = copies(_name)
    for _name in ("item", "tolist", "tobytes", "__bool__", "__float__", "__int__", "__index__"):
        locals()[_name] = reads(_name)

    # As arrays on a device, for robe/feed.py and robe/nccl.py.
    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)

    def set(self, host, stream):
        plain(self)[...] = host

    def get(self, stream, out, blocking):
        out[...] = plain(self)


class Recorder:
    """As robe.graph.Graph. made: all that have captured something; replays: how often each did it again."""

    made: ClassVar[list] = []

    def __init__(self):
        self.replays = None

    def capture(self, function):
        global tape
        tape = self.tape = []
        try:
            result = function()
        finally:
            tape = None
        self.replays = 0
        self.made.append(self)
        return result

    def replay(self):
        self.replays += 1
        for action in self.tape:
            action()


class Module:
    """NumPy, whose new arrays are noted."""

    def __getattr__(self, name):
        found = getattr(np, name)
        makes = name in ("arange", "empty", "full", "zeros")
        return (lambda *a, **o: found(*a, **o).view(Noted)) if makes else found


def recording(monkeypatch, **changes):
    """Two backends of the simulator: one with graphs, which recorders are, and the same without.

    One thread does all the work, so that atomic sums have an order.
    """
    monkeypatch.setattr(launch, "BLOCKS", 1)
    monkeypatch.setattr(launch, "THREADS", 1)
    start = launch.start

    def noted(kernel, shape, arguments):
        done(partial(start, kernel, shape, plain(arguments)))

    monkeypatch.setattr(launch, "start", noted)
    monkeypatch.setattr(Recorder, "made", [])
    idle = SimpleNamespace(
        record=lambda stream: None, synchronize=lambda: None, wait_event=lambda event: None
    )
    streams = Streams(lambda *place: np.empty(*place).view(Noted), np.empty, lambda: idle, idle, idle)
    with_graphs = dataclasses.replace(
        select("cuda", **changes),
        xp=Module(),
        empty=lambda shape, dtype: aligned(shape, dtype).view(Noted),
        to_device=lambda array: array.copy().view(Noted),
        to_host=lambda array: np.array(plain(array)),
        feed=partial(feed, streams),
        fetch=partial(fetch, streams),
        graph=Recorder,
    )
    return with_graphs, dataclasses.replace(with_graphs, graph=None)
