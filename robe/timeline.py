"""Where the time of training goes: the phases of each step, as a table and as a Chrome trace."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

from data_pipeline.whole_files import write_whole
from robe.kernels.operations import version
from robe.kernels.parts.cost import Cost, Limits

# What times a phase: `with phase("forward"): ...`
Phase = Callable[[str], AbstractContextManager]


def no_phase(name: str) -> AbstractContextManager:
    """Times nothing."""
    return nullcontext()


class Event(NamedTuple):
    name: str
    start: float  # seconds since the timeline began
    length: float
    own: float  # what of it was spent in no phase within
    cost: Cost  # what the kernels and products called in it had to do


class Timeline:
    """Collects phases; call it with a name, `with timeline("forward"): ...`.

    synchronize: waits for the device, so that a phase ends when its work does. So phases are timed truly, but
    the GPU cannot work ahead, and the whole runs slower.
    """

    def __init__(self, synchronize: Callable[[], None]):
        self.synchronize = synchronize
        self.origin = time.perf_counter()
        self.events: list[Event] = []
        self.costs: list[list[Cost]] = [[]]  # of the phases that have begun and not ended, the innermost last
        self.within = [0.0]  # seconds of those that ended in each of these

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.costs.append([])
        self.within.append(0.0)
        start = time.perf_counter()
        yield
        self.synchronize()
        length, costs = time.perf_counter() - start, self.costs.pop()
        own = length - self.within.pop()
        self.within[-1] += length
        cost = Cost(sum(c.bytes_moved for c in costs), sum(c.flops for c in costs))
        self.events.append(Event(name, start - self.origin, length, own, cost))

    def counted(self, backend: Any) -> Any:
        """The same backend, whose kernels and products tell here what each of their calls must cost."""

        def counted(function, cost):
            def call(*arguments):
                self.costs[-1].append(cost(*arguments))
                function(*arguments)

            return call

        def product_cost(a, b, out):
            return Cost(a.nbytes + b.nbytes + out.nbytes, 2 * a.size * b.shape[1])

        kernels = {
            name: counted(kernel, version(name, "cost")) for name, kernel in vars(backend.kernels).items()
        }
        matmul = counted(backend.matmul, product_cost)

        def fused(kind, a, b, out, *beside):
            if done := backend.fused(kind, a, b, out, *beside):
                self.costs[-1].append(product_cost(a, b, out))
            return done

        others = {"matmul": matmul, "fused": backend.fused and fused}
        return dataclasses.replace(backend, kernels=SimpleNamespace(**kernels), **others)

    def text(self, limits: Limits) -> str:
        """A table: of each phase the calls, their median time, their share of the whole, and their limit.

        Times are without those of phases within. The limit is the time that the bytes and operations of the
        kernels and products would take at the speed of a plain copy and of a large product; whatever else a
        phase does counts as nothing.
        """
        phases: dict[str, list[Event]] = {}
        for event in self.events:
            phases.setdefault(event.name, []).append(event)
        whole = sum(event.own for event in self.events)
        lines = [f"{'phase':<21}{'calls':>8}{'median':>12}{'share':>8}{'limit':>12}{'of limit':>10}"]
        for name, events in phases.items():
            length = median(event.own for event in events)
            least = median(limits.seconds(event.cost) for event in events)
            share = sum(event.own for event in events) / whole
            line = f"{name:<21}{len(events):>8}{1e3 * length:>9.3f} ms{share:>8.1%}"
            lines.append(line + (f"{1e3 * least:>9.3f} ms{least / length:>10.0%}" if least else ""))
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Write the events in Chrome's trace format; chrome://tracing and ui.perfetto.dev show it."""
        # Complete events ("X"), with times in microseconds.
        events = [
            {"name": e.name, "ph": "X", "ts": 1e6 * e.start, "dur": 1e6 * e.length, "pid": 0, "tid": 0}
            for e in self.events
        ]
        write_whole(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
