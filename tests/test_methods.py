"""The comparison of methods: what is trained, what is kept, what cannot be had, and the table."""

import dataclasses

import numpy as np
import pytest
from trainings_made import trained

from analysis import trainings
from benchmarks import measure, methods
from benchmarks.measure import QUICK
from robe.config import ConfigError, OptimizerConfig
from robe.optim import learning_rate

CHOSEN = ("full", "none", "robe", "quotient_remainder")
ADAGRAD = OptimizerConfig("adagrad", 0.1)
SIZES = (0.02, 0.001)  # MB; two rows a feature, and fewer weights than quotients and remainders take


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder with the trainings of a tiny study, and its results."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, study(folder)


def study(folder, names=CHOSEN, sizes=SIZES, **changes):
    tiny = dataclasses.replace(methods.TINY, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure.time, "sleep", lambda seconds: None)
        return methods.measure(names, sizes, tiny, QUICK, folder, say=lambda text: None)


def scores(results):
    timed = ("lookup", "step")
    return [{key: value for key, value in row.items() if key not in timed} for row in results["rows"]]


def test_every_method_has_its_sizes_or_its_own(cache):
    _, results = cache
    table = results["table_bytes"]
    found = [(row["method"], row["megabytes"], row["bytes"]) for row in results["rows"]]
    *fixed, large, small = found
    assert fixed == [("full", None, table), ("none", None, 0)]
    assert (large, small) == (("robe", 0.02, 20_000), ("robe", 0.001, 1_000))
    assert [left_out["point"] for left_out in results["left_out"]] == [
        "quotient_remainder in 0.02 MB",
        "quotient_remainder in 0.001 MB",
    ]
    assert "takes at least" in results["left_out"][0]["why"]
    assert [row["dictionary"] for row in results["rows"]] == [True, False, False, False]
    assert results["dictionary_bytes"] > 4 * (table / 64 - 27)


def test_scores_are_those_of_the_test_half(cache):
    _, results = cache
    assert results["test_rows"] == 800
    for row in results["rows"]:
        assert len(row["auc"]) == len(row["log_loss"]) == results["seeds"] == 2
        assert len(set(row["auc"])) == 2
        # The base rate is a quarter: 0.56 nats to who knows that alone.
        assert all(0.45 < loss < 0.7 for loss in row["log_loss"])
        assert row["lookup"]["repeats"] == row["step"]["repeats"] == QUICK.rounds
    by_method = {row["method"]: np.mean(row["auc"]) for row in results["rows"][:3]}
    # 14,400 rows teach something; without categories there is next to nothing.
    assert by_method["none"] < 0.58 < by_method["full"]
    assert by_method["none"] < 0.58 < by_method["robe"]


def test_what_is_there_is_not_trained_again(cache, monkeypatch):
    folder, results = cache
    made = trained(monkeypatch)
    assert scores(study(folder)) == scores(results)
    assert made == []
    more = study(folder, names=(*CHOSEN, "hashing"), sizes=SIZES[:1])
    assert {config.embedding.method for config in made} == {"hashing"}
    assert len(made) == 3  # one to tune, two seeds
    assert scores(more)[:3] == scores(results)[:3]


def test_the_rate_is_tuned_by_the_validation_half_and_another_seed(cache, monkeypatch):
    folder, _ = cache
    made = trained(monkeypatch)
    row = study(folder, names=("robe",), sizes=SIZES[:1], rates=(1e-4, 0.03))["rows"][0]
    assert row["rate"] == 0.03
    assert [(config.seed, config.optimizer.lr) for config in made] == [(0, 1e-4)]


def test_one_half_chooses_the_rate_and_the_other_is_told(cache, monkeypatch):
    """The loop's test half is our validation half, see `Trainings`."""

    def trained(self, config, name):
        rate = config.optimizer.lr
        halves = {"test": {"auc": rate}, "validation": {"auc": 1 - rate, "log_loss": 2 * rate}}
        return halves | {"embedding_bytes": 4}, []

    monkeypatch.setattr(trainings.Trainings, "trained", trained)
    row = study(cache[0], names=("robe",), sizes=SIZES[:1], rates=(0.25, 0.75, 0.5))["rows"][0]
    assert (row["rate"], row["auc"], row["log_loss"]) == (0.75, [0.25, 0.25], [1.5, 1.5])


def test_seeds_draw_the_hash_too():
    embedding = next(methods.plan(("robe",), [1.0])).embedding
    made = [methods.settings(embedding, ADAGRAD, seed, 8, 31) for seed in (1, 2)]
    assert [config.embedding.hash_seed for config in made] == [1, 2]


def test_the_rate_falls_over_the_second_half():
    optimizer = methods.settings(methods.FIXED["full"], ADAGRAD, 1, 8, 31).optimizer
    rates = [learning_rate(optimizer, step) for step in range(31)]
    assert rates[:15] == [0.1] * 15
    assert 0 < rates[30] < 0.001


def test_unknown_methods_are_refused(cache):
    with pytest.raises(ConfigError, match=r"no method 'magic'; choose of full; .*none; robe"):
        study(cache[0], names=("magic",))


def test_the_table_and_the_figure(cache):
    _, results = cache
    lines = methods.table(results).splitlines()
    assert lines[0].startswith("14,400 training and 800 test rows, 2 seeds; the best possible test AUC is 0.")
    full, none, robe, small = lines[4:8]
    assert full.startswith(f"| full * | {results['table_bytes']:,} | 1.0x | 0.")
    assert none.startswith("| none | 0 |  | 0.")
    assert robe.startswith(f"| robe | 20,000 | {results['table_bytes'] / 20_000:.1f}x | 0.")
    assert len({line.count("|") for line in lines[2:8]}) == 1
    assert small.startswith("| robe | 1,000 |")
    assert lines[9] == "Cannot be had: quotient_remainder in 0.02 MB; quotient_remainder in 0.001 MB."
    better = results["rows"][2] | {
        "method": "magic",
        "auc": [auc + 0.01 for auc in results["rows"][2]["auc"]],
    }
    more = methods.table(results | {"rows": [*results["rows"], better]}).splitlines()
    assert more[8].split("|")[5] == " +0.0100 ± 0.0000 "
    assert [line.split("|")[5].strip() for line in more[4:8]] == [""] * 4
    figure = methods.plot(results)
    for axes, kind in zip(figure.axes, ("auc", "log_loss"), strict=True):
        drawn = {c.get_label(): c.lines[0].get_xydata() for c in axes.containers}
        expected = [(row["bytes"], np.mean(row[kind])) for row in results["rows"] if row["method"] == "robe"]
        np.testing.assert_allclose(drawn["robe"], expected)
        assert set(drawn) == {"full", "robe"}
        assert axes.get_xscale() == "log"
