"""The timeline of training."""

import dataclasses
import json

import numpy as np
import pytest
from test_model import batch, make

from robe.backend import select
from robe.kernels.parts.cost import Cost, Limits
from robe.timeline import Timeline


@pytest.fixture
def clock(monkeypatch):
    """The time, in seconds: a list of one number, which tests turn on."""
    now = [0.0]
    monkeypatch.setattr("robe.timeline.time.perf_counter", lambda: now[0])
    return now


def test_phases_are_timed_in_order(tmp_path, clock):
    waited = []
    timeline = Timeline(lambda: waited.append(1))
    for _ in range(3):
        with timeline("short"):
            clock[0] += 0.001
        with timeline("long"):
            clock[0] += 0.009
    assert len(waited) == 6
    lines = timeline.text(Limits(1.0, 1.0)).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["short", "3"], ["long", "3"]]
    assert lines[2].split()[2:] == ["9.000", "ms", "90.0%"]
    timeline.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [event["name"] for event in events] == ["short", "long"] * 3
    np.testing.assert_allclose([event["dur"] for event in events], [1000, 9000] * 3)
    np.testing.assert_allclose([event["ts"] for event in events], [0, 1000, 10_000, 11_000, 20_000, 21_000])


def test_a_timed_step_is_the_same_step():
    plain, timed = make(), make()
    timeline = Timeline(lambda: None)
    plain.step(*batch(), 0.1)
    timed.step(*batch(), 0.1, timeline)
    assert [event.name for event in timeline.events] == [
        *("forward", "backward, top", "backward, embedding", "backward, bottom", "update")
    ]
    for name, array in plain.state().items():
        np.testing.assert_array_equal(array, timed.state()[name])


def test_costs_are_those_of_the_calls(monkeypatch):
    timeline = Timeline(lambda: None)
    monkeypatch.setattr("test_model.select", lambda name: timeline.counted(select(name)))
    model = make()
    model.step(*batch(), 0.1, timeline)
    forward, top, embedding, bottom, update = (event.cost for event in timeline.events)
    # B = 6; layers 3-6-4 and 10-5-1, and 6 pairs of vectors of 4; two operations a product and sum.
    products = 2 * 6 * (3 * 6 + 6 * 4 + 10 * 5 + 5 * 1)
    rectified, pairs, elements = 2 * 6 * (6 + 4 + 5), 2 * 6 * 6 * 4, 6 * 3 * 4
    assert forward.flops == products + rectified + pairs + elements
    # Twice the products, but no gradient by the dense values; and some operations a row for the loss.
    loss = top.flops + bottom.flops - (2 * products - 2 * 6 * 3 * 6 + rectified)
    assert 0 < loss < 6 * 20
    assert bottom.flops == 2 * 6 * (3 * 6 + 2 * 6 * 4) + 2 * 6 * (6 + 4)
    assert embedding.flops == 2 * pairs + 2 * elements
    # Of 8 bytes: 4 vectors of 4 and 10 of d_out are read, 4 gradients written, 3 read; weights read, written.
    assert embedding.bytes_moved == 8 * 6 * (2 * 4 * 4 + 10) + 6 * 3 * 4 + 3 * 8 * elements
    parameters = model.dense_parameters.size
    assert update == (3 * 8 * parameters, 2 * parameters)


def test_a_product_with_what_is_beside_it_counts_once():
    """As the product, if it was done; if not, the backend goes on to calls that count."""
    timeline, a = Timeline(lambda: None), np.zeros((2, 3), np.float32)
    kinds = {"rectified": True, "gradient": False}
    backend = dataclasses.replace(select("cpu"), fused=lambda kind, *arrays: kinds[kind])
    for kind, done in kinds.items():
        with timeline(kind):
            assert (
                timeline.counted(backend).fused(kind, a, a.T, np.zeros((2, 2), np.float32), a[0], None)
                is done
            )
    assert [event.cost for event in timeline.events] == [Cost(24 + 24 + 16, 2 * 2 * 3 * 2), Cost(0, 0)]


def test_limits_are_told(clock):
    timeline = Timeline(lambda: None)
    with timeline("outer"):
        timeline.costs[-1].append(Cost(300, 40))
        clock[0] += 0.01
        with timeline("inner"):
            timeline.costs[-1].append(Cost(1, 2))
            clock[0] += 0.03
    assert [event.cost for event in timeline.events] == [Cost(1, 2), Cost(300, 40)]
    # 300 bytes at 100,000 a second and 40 operations at 20,000: 5 ms of the 10 that are not the inner's.
    line = timeline.text(Limits(1e5, 2e4)).splitlines()[2].split()
    assert line[2:] == ["10.000", "ms", "25.0%", "5.000", "ms", "50%"]
    assert [event.length for event in timeline.events] == pytest.approx([0.03, 0.04])
