"""Size against iterations: what is cached, what goes on after a kill, and verdicts that can fail."""

import dataclasses
import json

import numpy as np
import pytest
from trainings_made import trained

from analysis import tradeoff
from analysis.trainings import synthetic_data
from data_pipeline.manifest import Manifest
from robe.config import ConfigError
from robe.model import DLRM

TINY = dataclasses.replace(tradeoff.QUICK, rows=16_000, seeds=2, batch=320, timed=1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder with the trainings of the tiny study, and its rows."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, measure(folder)


def measure(folder, **changes):
    study = dataclasses.replace(TINY, **changes)
    return tradeoff.measure(study=study, cache=folder, say=lambda text: None)


def lasting(rows):
    return [row for row in rows if row["kind"] != "step_ms"]


def test_what_is_there_is_not_trained_again(cache, monkeypatch):
    folder, rows = cache
    made = trained(monkeypatch)
    assert lasting(measure(folder)) == lasting(rows)
    assert made == []


def test_a_point_or_a_seed_more_trains_that_alone(cache, monkeypatch):
    folder, _ = cache
    made = trained(monkeypatch)
    measure(folder, variants=(tradeoff.PUBLISHED, "Z = 4"))
    assert [config.embedding.block for config in made] == [4, 4]
    made.clear()
    measure(folder, seeds=3)
    assert {config.seed for config in made} == {3}
    assert len(made) == 6


def test_other_rows_are_other_trainings(cache, monkeypatch):
    """Even where the configuration and all that a model knows of its data are the same."""
    folder, _ = cache
    made = trained(monkeypatch)
    manifest = Manifest.load(synthetic_data(TINY, folder))
    first, *days = manifest.days
    other = dataclasses.replace(manifest, days=(dataclasses.replace(first, sha256={"labels": "0"}), *days))
    for rows, count in ((manifest, 0), (other, 1)):
        of = tradeoff.PointTrainings(rows, TINY.batch, folder, lambda text: None)
        point = next(tradeoff.plan(TINY, of.spec))
        of.run(point, 0.03, 1, TINY.passes)
        assert len(made) == count


def test_seeds_draw_the_hash_too(cache):
    folder, _ = cache
    manifest = Manifest.load(synthetic_data(TINY, folder))
    of = tradeoff.PointTrainings(manifest, TINY.batch, folder, print)
    *_, mix, affine = tradeoff.plan(TINY, of.spec)
    assert [of.config(mix, 0.1, seed, 1).embedding.hash_seed for seed in (1, 2)] == [1, 2]
    assert [of.config(affine, 0.1, seed, 1).embedding.hash_seed for seed in (1, 2)] == [1024, 1025]


def test_all_points_are_seen_at_the_same_steps(cache):
    """A pass has 45 steps; the odd ones, and so the last of a training of one pass, are not seen."""
    _, rows = cache
    assert set(tradeoff.curve(rows, tradeoff.PUBLISHED)[0]) == set(range(2, 45, 2))
    assert set(tradeoff.curve(rows, "100x")[0]) == set(range(2, 91, 2))


def test_a_killed_training_goes_on_and_ends_the_same(cache, tmp_path, monkeypatch):
    folder, rows = cache
    data = synthetic_data(TINY, folder)
    steps_per_pass = -(-TINY.rows * 9 // 10 // TINY.batch)
    kill_at, steps, step = steps_per_pass + 5, [], DLRM.step

    def counted(*batch, **options):
        if len(steps) == kill_at:
            raise KeyboardInterrupt
        steps.append(1)
        return step(*batch, **options)

    monkeypatch.setattr(DLRM, "step", counted)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, data=data)
    steps.clear()
    kill_at = None
    assert lasting(measure(tmp_path, data=data)) == lasting(rows)
    # All passes of all trainings but the one that was done, and the steps that were timed.
    assert len(steps) == (2 * (5 * 2 + 1) - 1) * steps_per_pass + 6 * 2 * 6
    assert not list(tmp_path.glob("*/checkpoints"))


def test_every_point_is_tuned_alike_and_by_the_validation_half(cache, monkeypatch):
    folder, _ = cache
    made = trained(monkeypatch)
    rows = measure(folder, rates=(0.001, 0.03))
    assert {config.seed for config in made} == {tradeoff.TUNING_SEED}
    found = {}
    for row in rows:
        if row["kind"] == "validation_auc":
            found.setdefault(row["point"], {})[row["rate"]] = row["value"]
    assert {tuple(rates) for rates in found.values()} == {(0.001, 0.03)}
    for row in rows:
        if row["kind"] == "test_auc":
            assert row["rate"] == max(found[row["point"]], key=found[row["point"]].get)


def test_figure_and_tables_tell_what_was_measured(cache, tmp_path):
    _, rows = cache
    tradeoff.plot(rows).savefig(tmp_path / "figure.png")
    summary = json.loads(json.dumps(tradeoff.summarise(rows)))
    table = tradeoff.tables(summary).splitlines()
    assert table[0].startswith("14,400 training and 800 test rows, 2 seeds; the best possible test AUC is 0.")
    last = [row for row in rows if row["kind"] == "test_auc" and row["point"] == "100x"]
    last = [row["value"] for row in last if row["step"] == last[-1]["step"]]
    cells = next(line for line in table if line.startswith("| 100x")).split(" | ")
    assert (
        cells[5] == f"{np.mean(last):.4f} ± {12.7062 * abs(last[0] - last[1]) / 2:.4f}"
    )  # Student's t for two
    # A seed that does not get there is told of.
    target = next(target for target in summary["targets"] if target["passes"] == tradeoff.REACHED)
    target["steps"] |= {"100": [4.0, None], "1000": [None, None], "10000": [4.0, 6.0]}
    ends = [line.split(" | ")[7] for line in tradeoff.tables(summary).splitlines()[6:9]]
    assert ends[:2] == ["with 1 of 2 seeds", "never"]
    assert ends[2].startswith("5 in ")


def test_a_study_without_intervals_or_with_too_few_ids_is_refused(cache):
    folder, _ = cache
    with pytest.raises(ConfigError, match="2 seeds"):
        measure(folder, seeds=1)
    with pytest.raises(ConfigError, match="must hold a block"):
        measure(folder, rows=200)


@pytest.mark.parametrize(
    ("target", "step"),
    [(0.55, 10), (0.6, 10), (0.75, 19.375), (0.76, 20), (0.78, 45), (0.8, 50), (0.81, np.inf)],
)
def test_steps_to_a_target_in_a_fixed_log(target, step):
    steps, auc = np.array([10, 20, 30, 40, 50]), np.array([0.6, 0.76, 0.7, 0.76, 0.8])
    assert tradeoff.steps_to(steps, auc, target) == pytest.approx(step)


GOOD = {1: 0.80, 10: 0.80, 100: 0.79, 1000: 0.77, 10000: 0.74}


def planted(auc=GOOD, overfits=(1, 10), published=0.77):
    """Rows of sizes with that AUC after a pass, of which some lose a tenth in two passes more."""
    sizes = [(f"{compression}x", compression, final, 3) for compression, final in auc.items()]
    rows = []
    for point, compression, final, passes in [*sizes, (tradeoff.PUBLISHED, 1000, published, 1)]:
        for seed in range(3):
            for step in range(1, 10 * passes + 1):
                done = step / 10
                value = 0.5 + (final - 0.5) * min(1, done) ** 0.1 + 1e-4 * np.sin(seed + final)
                if done > 1 and compression in overfits:
                    value -= 0.05 * (done - 1)
                where = {"kind": "test_auc", "point": point, "compression": compression}
                rows.append(where | {"seed": seed, "step": step, "passes": done, "value": value})
    return rows


def test_the_verdict_accepts_what_the_claim_says():
    verdict = tradeoff.verdict(planted())
    assert verdict.holds
    assert len(verdict.checks) == 5


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("size", {"auc": GOOD | {1000: 0.795}}),
        ("size", {"auc": dict.fromkeys(GOOD, 0.79)}),
        ("iterations", {"auc": GOOD | {100: 0.775}}),
        ("limit", {"auc": GOOD | {10000: 0.79}}),
        ("repetition", {"overfits": ()}),
        ("repetition", {"overfits": (10000,)}),
        ("hash", {"published": 0.775}),
    ],
)
def test_the_verdict_refuses_a_planted_wrong_result(part, wrong):
    verdict = tradeoff.verdict(planted(**wrong))
    assert not verdict.holds
    assert part in [check.what.split(":")[0] for check in verdict.checks if not check.holds]
