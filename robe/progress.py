"""A progress bar on a terminal, nothing in a pipe."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Update = Callable[..., None]


@contextmanager
def progress_bar(description: str, unit: str) -> Iterator[Update]:
    """Gives `update(done, total, note="")`, cheap enough to call at every step.

    Shows the rate in `unit` per second and the remaining time.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(description, rate="", note="", total=None)
        shown = 0.0

        def update(done: int, total: int, note: str = "") -> None:
            nonlocal shown
            if progress.disable or (done < total and time.monotonic() < shown + 0.1):
                return
            shown = time.monotonic()
            speed = progress.tasks[task].speed
            rate = f"{speed:,.0f} {unit}/s" if speed else ""
            progress.update(task, completed=done, total=total, rate=rate, note=note)

        yield update
