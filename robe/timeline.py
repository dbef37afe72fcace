"""Where the time of training goes: the phases of each step, as a table and as a Chrome trace."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import median

# What times a phase: `with phase("forward"): ...`
Phase = Callable[[str], AbstractContextManager]


def no_phase(name: str) -> AbstractContextManager:
    """Times nothing."""
    return nullcontext()


class Timeline:
    """Collects phases; call it with a name, `with timeline("forward"): ...`.

    synchronize: waits for the device, so that a phase ends when its work does. That keeps a GPU from working
    ahead: phases are told truly, the whole runs slower than without.
    """

    def __init__(self, synchronize: Callable[[], None]):
        self.synchronize = synchronize
        self.origin = time.perf_counter()
        self.events: list[tuple[str, float, float]] = []  # name, start and length in seconds

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.synchronize()
        self.events.append((name, start - self.origin, time.perf_counter() - start))

    def text(self) -> str:
        """A table: the calls of each phase, their median time, and the phase's share of all of them."""
        phases: dict[str, list[float]] = {}
        for name, _, length in self.events:
            phases.setdefault(name, []).append(length)
        whole = sum(map(sum, phases.values()))
        lines = [f"{'phase':<12}{'calls':>8}{'median':>12}{'share':>8}"]
        for name, times in phases.items():
            lines.append(f"{name:<12}{len(times):>8}{1e3 * median(times):>9.3f} ms{sum(times) / whole:>8.1%}")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Write the events in Chrome's trace format; chrome://tracing and ui.perfetto.dev show it."""
        # Complete events ("X"), with times in microseconds.
        events = [
            {"name": name, "ph": "X", "ts": 1e6 * start, "dur": 1e6 * length, "pid": 0, "tid": 0}
            for name, start, length in self.events
        ]
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
