"""How reading is watched."""

import time

from robe.progress import Watched


def test_waiting_is_told_from_working():
    def batches(size, count):
        for _ in range(count):
            time.sleep(0.03)
            yield [0] * size, None

    told = []
    watched = Watched(batches, 20, lambda *values: told.append(values))
    for number, (label, _) in enumerate(watched.batches(5, count=4)):
        assert len(label) == 5
        assert len(told) == number
        time.sleep(0.01)
    assert [values[:2] for values in told] == [(5, 20), (10, 20), (15, 20), (20, 20)]
    assert told[-1][2].endswith("% busy")
    pace = watched.pace()
    # 40 ms of work in 160; sleeps are longer than asked for, never shorter.
    assert 0.05 < pace["busy"] < 0.5
    assert 20 / 1.6 < pace["rows_per_second"] < 20 / 0.16


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
