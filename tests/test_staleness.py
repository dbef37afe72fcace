"""The study of rows that lack steps of others: what it trains, its verdict, its table."""

import importlib.util
from itertools import product

import numpy as np
import pytest

from analysis import claim, staleness
from analysis.staleness import NEVER, WIDTH, Bounds, Point
from robe import cli
from robe.config import ConfigError


def test_there_are_seeds_where_the_auc_is_judged_and_one_training_without_a_bound():
    found = list(staleness.points(Bounds(seeds=2, staleness=(0, 10))))
    assert found == [
        *(Point(2, WIDTH, bound, seed) for seed, bound in product((1, 2), (0, 10))),
        *(Point(2, 128, bound, 1) for bound in (0, 10)),
        *(Point(4, WIDTH, bound, seed) for seed, bound in product((1, 2), (0, 10, NEVER))),
    ]
    assert staleness.settings(found[1], Bounds(), 70).eval_every == 70


def test_what_is_missing_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^several processes need mpi4py and an mpiexec: pip install "):
        staleness.train_together(2, tmp_path, [])


def planted(saves=0.9, loses=0.0, spread=1e-4, never=-0.01):
    """Of S = 100 on two processes and on four; S = 10 saves half, and S = 1 nothing."""
    rng = np.random.default_rng(0)
    of = {0: (0, 0), 1: (0, 0), 10: (0.5, 0), 30: (0.7, 0), 100: (saves, loses), NEVER: (0.9, never)}
    return [
        point._asdict()
        | {"bytes": 1e6 * (1 - of[point.staleness][0]), "synthetic": True, "seconds": 1.0}
        | {"auc": 0.79 + of[point.staleness][1] + spread * rng.standard_normal()}
        for point in staleness.points(Bounds())
    ]


def test_the_verdict_accepts_what_the_claim_says(tmp_path):
    verdict = staleness.verdict(planted())
    assert verdict.holds, verdict.text
    assert len(verdict.checks) == 5
    lines = staleness.table(staleness.summarise(planted())).splitlines()
    assert len(lines) == 4 + 3 * 5 + 1
    assert [line.split(" | ")[5] for line in lines[4:9]] == ["", "0.0%", "50.0%", "70.0%", "90.0%"]
    staleness.plot(planted()).savefig(tmp_path / "figure.png")


@pytest.mark.parametrize(
    ("told", "wrong"),
    [
        ("bytes", {"saves": 0.87}),
        ("quality", {"loses": -0.0015}),
        ("a bound is needed", {"never": -0.0005}),
        ("theory", {"saves": 0.945}),
    ],
)
def test_the_verdict_refuses_a_planted_wrong_result(told, wrong):
    failed = [check.what for check in staleness.verdict(planted(**wrong)).checks if not check.holds]
    assert failed
    assert all(what.startswith(told) for what in failed)


def test_where_no_processes_can_be_started_the_other_claims_are_held(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claim, "scripts", lambda: ["staleness"])
    monkeypatch.setattr(staleness, "lacking", lambda: "no mpiexec")
    cli.main(["analyze", "--out", str(tmp_path)])
    assert "staleness is left out: no mpiexec" in capsys.readouterr().out
