"""The study of recipes: what it trains and keeps, its verdict, its table."""

import dataclasses

import numpy as np
import pytest
from trainings_made import trained

from analysis import recipes
from analysis.recipes import ADAM, BEST, MEAN, ONE_PASS, PLAIN, RECIPES, TAUGHT
from robe.config import ConfigError

TINY = dataclasses.replace(recipes.QUICK, rows=4000, recipes=(PLAIN, TAUGHT), sizes=(100,))


def test_each_training_is_made_once_and_a_teacher_for_each_seed(tmp_path, monkeypatch):
    made = trained(monkeypatch)
    rows = recipes.measure(study=TINY, cache=tmp_path, say=lambda text: None)
    teachers = [config for config in made if config.embedding.method == "full"]
    assert [config.seed for config in teachers] == [1, 2]
    assert all(config.fresh_embeddings and config.optimizer.lr == 0.03 for config in teachers)
    others = [config for config in made if config.embedding.method == "robe"]
    assert [(config.seed, config.teacher is not None) for config in others] == [
        (seed, taught) for seed in (1, 2) for taught in (False, True, False)
    ]
    assert {config.embedding.memory for config in others} == {"int3"}
    assert {config.average for config in made} == {0.9}
    assert [(row["seed"], row["way"]) for row in rows] == [
        (seed, way + of) for seed in (1, 2) for way in (PLAIN, TAUGHT, ADAM) for of in ("", MEAN)
    ]
    assert len({row["log_loss"] for row in rows}) == 12  # a mean is no last weights, and a teacher tells more
    assert not list(tmp_path.glob("*/averaged"))
    assert recipes.measure(study=TINY, cache=tmp_path, say=lambda text: None) == rows
    assert len(made) == 8
    with pytest.raises(ConfigError, match="'SGD' is no recipe of this study"):
        recipes.measure(study=TINY, recipes=("SGD",), cache=tmp_path)


def test_rates_are_tuned_for_each_recipe_but_that_of_a_teacher():
    class Fake:
        def runs(self, tasks, jobs):
            self.tasks = list(tasks)
            best = {PLAIN: 0.1, ADAM: 0.001}
            return [
                {"": {"validation": {"auc": 0.8 - abs(rate - best[name])}}}
                for name, _, rate, *_ in self.tasks
            ]

    fake, study = Fake(), dataclasses.replace(recipes.Sizes(), recipes=(ADAM, TAUGHT))
    assert recipes.tuned(fake, study, 1) == {PLAIN: 0.1, ADAM: 0.001, TAUGHT: 0.1}
    assert {(name, size, seed) for name, size, _, seed, _ in fake.tasks} == {
        (name, 100, 0) for name in (PLAIN, ADAM)
    }


def planted(**changes):
    auc = dict.fromkeys((name + of for name in RECIPES for of in ("", MEAN)), 0.788)
    auc |= {ONE_PASS: 0.784, BEST: 0.79, TAUGHT: 0.792, TAUGHT + MEAN: 0.792} | changes
    rng = np.random.default_rng(0)
    return [
        {"way": way, "compression": size, "rate": 0.03, "seed": seed, "first_stage": True, "synthetic": True}
        | {"auc": value + 1e-4 * rng.standard_normal(), "log_loss": 0.45}
        for seed in range(4)
        for size in recipes.SIZES
        for way, value in auc.items()
        if size > 1 or recipes.alone(way)
    ]


def test_the_verdict_accepts_what_the_claim_says(tmp_path):
    verdict = recipes.verdict(planted())
    assert verdict.holds, verdict.text
    assert len(verdict.checks) == len(recipes.SIZES) + 2
    summary = recipes.summarise(planted())
    lines = recipes.table(summary).splitlines()
    assert len(lines) == 4 + 2 * len(RECIPES)
    assert [line.split(" | ")[0] for line in lines if "**" in line] == [f"| {TAUGHT}", f"| {TAUGHT}{MEAN}"]
    recipes.plot(planted()).savefig(tmp_path / "figure.png")


@pytest.mark.parametrize(
    ("told", "wrong"),
    [
        ("best: at ", {ADAM: 0.791}),
        ("known: a second pass", {ONE_PASS: 0.789}),
        ("known: a teacher", {TAUGHT: 0.787}),
    ],
)
def test_the_verdict_refuses_a_planted_wrong_result(told, wrong):
    failed = [check.what for check in recipes.verdict(planted(**wrong)).checks if not check.holds]
    assert failed
    assert all(what.startswith(told) for what in failed)
