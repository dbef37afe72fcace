"""A progress bar on a terminal; in a pipe or a file the lines that are worth keeping."""

import math
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Update = Callable[..., None]
Listener = Callable[[dict[str, Any]], None]  # gets each entry of a run's metrics.jsonl


def unwatched(done: int, total: int | None, note: str = "", line: str | None = None) -> None:
    """An `update` that shows nothing."""


def unheard(entry: dict[str, Any]) -> None:
    """A listener that does nothing."""


@contextmanager
def progress_bar(description: str, unit: str) -> Iterator[Update]:
    """Gives `update(done, total, note="", line=None)`, which is cheap enough to call at every step.

    The bar shows the rate in `unit` per second and, where the total is known, the remaining time. A line is
    printed where the output, or the bar, is not on a terminal.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    console, output = Console(stderr=True), sys.stdout  # which a bar has print above it
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(description, rate="", note="", total=None)
        shown = 0.0

        def update(done: int, total: int | None, note: str = "", line: str | None = None) -> None:
            nonlocal shown
            if line is not None and (progress.disable or not output.isatty()):
                print(line, file=output, flush=True)
            if progress.disable or (done < (total or math.inf) and time.monotonic() < shown + 0.1):
                return
            shown = time.monotonic()
            speed = progress.tasks[task].speed
            rate = f"{speed:,.0f} {unit}/s" if speed else ""
            progress.update(task, completed=done, total=total, rate=rate, note=note)

        yield update


class Watched:
    """Rows whose batches move a progress bar; `pace` tells how long their reader waited for them."""

    def __init__(self, batches: Callable[..., Generator], count: int | None, update: Update):
        self.open, self.count, self.update = batches, count, update

    def batches(self, *arguments, **options) -> Generator:
        self.started, self.waited, self.read = time.perf_counter(), 0.0, 0
        with closing(self.open(*arguments, **options)) as batches:
            while True:
                asked = time.perf_counter()
                batch = next(batches, None)
                self.waited += time.perf_counter() - asked
                if batch is None:
                    return
                yield batch
                self.read += len(batch[0])
                self.update(self.read, self.count, f"{self.pace()['busy']:.0%} busy")

    def pace(self) -> dict[str, float]:
        """Rows per second so far, and `busy`, the share of the time that the reader did not wait for rows.

        While it waits, a GPU may still work on what is queued.
        """
        seconds = time.perf_counter() - self.started
        return {"rows_per_second": self.read / seconds, "busy": 1 - self.waited / seconds}
