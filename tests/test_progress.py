"""How reading is watched."""

import io
import sys
from types import SimpleNamespace

import pytest

from robe.progress import Watched


def test_waiting_is_told_from_working(monkeypatch):
    """Each batch of five takes three seconds to come and one to use."""
    now, told = [0.0], []
    monkeypatch.setattr("robe.progress.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def batches(size, count):
        for _ in range(count):
            now[0] += 3
            yield [0] * size, None

    watched = Watched(batches, 20, lambda *values: told.append(values))
    for number, (label, _) in enumerate(watched.batches(5, count=4)):
        assert len(label) == 5
        assert len(told) == number
        now[0] += 1
    assert told == [(rows, 20, "25% busy") for rows in (5, 10, 15, 20)]
    assert watched.pace() == {"rows_per_second": 20 / 16, "busy": 0.25}


def test_closing_reaches_what_is_watched():
    closed = []

    def batches():
        try:
            yield [0]
            yield [0]
        finally:
            closed.append(True)

    watched = batches()
    reader = Watched(lambda: watched, None, lambda *values: None).batches()
    next(reader)
    reader.close()
    assert closed


def test_an_unknown_total_is_no_error(monkeypatch):
    from rich.console import Console

    from robe import progress

    monkeypatch.setattr(progress, "Console", lambda **options: Console(force_terminal=True, quiet=True))
    with progress.progress_bar("read", "rows") as update:
        for done in range(3):
            update(done, None, "half busy")


def test_notes_are_no_markup(monkeypatch):
    from rich.console import Console

    from robe import progress

    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=200, color_system=None)
    monkeypatch.setattr(progress, "Console", lambda **options: console)
    with progress.progress_bar("read [red]", "rows") as update:
        update(2, 2, "day [/] [bold]x")
    assert "read [red]" in shown.getvalue()
    assert "day [/] [bold]x" in shown.getvalue()


@pytest.mark.parametrize(("bar", "output", "printed"), [(0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_lines_are_for_who_sees_no_bar(bar, output, printed, monkeypatch):
    """bar, output: whether standard error, where the bar is, and standard output are terminals."""
    from rich.console import Console

    from robe import progress

    written = io.StringIO()
    written.isatty = lambda: bool(output)
    monkeypatch.setattr(progress, "Console", lambda **options: Console(force_terminal=bool(bar), quiet=True))
    monkeypatch.setattr(sys, "stdout", written)
    with progress.progress_bar("train", "rows") as update:
        update(1, 2, "loss 1")
        update(2, 2, "loss 1", "step 2 of 2")
    assert written.getvalue() == "step 2 of 2\n" * printed
