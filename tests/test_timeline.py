"""The timeline of training."""

import json
import time

import numpy as np
from test_model import batch, make

from robe.timeline import Timeline


def test_phases_are_timed_in_order(tmp_path):
    waited = []
    timeline = Timeline(lambda: waited.append(1))
    for _ in range(3):
        with timeline("short"):
            pass
        with timeline("long"):
            time.sleep(0.01)
    assert len(waited) == 6
    lines = timeline.text().splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["short", "3"], ["long", "3"]]
    # The sleeps take 30 ms, the empty phases microseconds.
    assert float(lines[2].split()[-1].rstrip("%")) > 90
    timeline.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [event["name"] for event in events] == ["short", "long"] * 3
    assert all(event["dur"] >= 10_000 for event in events if event["name"] == "long")
    ends = [event["ts"] + event["dur"] for event in events]
    assert all(end <= event["ts"] + 1 for end, event in zip(ends, events[1:], strict=False))


def test_a_timed_step_is_the_same_step():
    plain, timed = make(), make()
    timeline = Timeline(lambda: None)
    plain.step(*batch(), 0.1)
    timed.step(*batch(), 0.1, timeline)
    assert [name for name, _, _ in timeline.events] == ["forward", "backward", "update"]
    for name, array in plain.state().items():
        np.testing.assert_array_equal(array, timed.state()[name])
