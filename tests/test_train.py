"""The loop: repeatability, resuming, stopping, and what is refused. Rows come from memory here."""

import dataclasses
import errno
import itertools
import json
import math
import os
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import VERSIONS, needs_simulator, resolved

from robe import checkpoint, metrics, report
from robe.backend import select
from robe.checkpoint import CheckpointError
from robe.config import ConfigError, DataSpec, EmbeddingConfig, OptimizerConfig
from robe.feed import Streams, feed, fetch
from robe.kernels import half_step
from robe.model import build
from robe.plan import plan
from robe.train import (
    EVALUATION_BATCH,
    Log,
    TrainingError,
    averaged_number,
    predict,
    write_probabilities,
)
from robe.train import train as train_model

DATA = DataSpec(3, (20, 5), "hash", "abc", "test")


class MemoryRows:
    """Rows whose label depends on the ids; `poison` makes the dense values of one batch NaN."""

    def __init__(self, count, seed, poison=None, cardinalities=DATA.cardinalities):
        rng = np.random.default_rng(seed)
        self.count, self.poison = count, poison
        self.ids = np.stack([rng.integers(0, n, count) for n in cardinalities], 1).astype(np.uint32)
        self.dense = rng.random((count, 3), np.float32)
        self.label = (rng.random(count) < np.where(self.ids[:, 0] % 2, 0.8, 0.2)).astype(np.float32)

    def batches(self, batch_size, *, seed=None, epoch=0, start_step=0):
        order = np.arange(self.count)
        if seed is not None:
            order = np.random.default_rng([seed, epoch]).permutation(self.count)
        for step, start in enumerate(range(0, self.count, batch_size)):
            rows = order[start : start + batch_size]
            dense = self.dense[rows] * (np.float32("nan") if step == self.poison else 1)
            if step >= start_step:
                yield self.label[rows], dense, self.ids[rows]


def rows(poison=None):
    sizes = {"train": 500, "validation": 90, "test": 110}
    return {name: MemoryRows(n, n, poison if name == "train" else None) for name, n in sizes.items()}


def config(memory="fp32", **changes):
    base = {"batch": 32, "epochs": 2, "eval_every": 5, "checkpoint_every": 3, "backend": "cpu"} | changes
    embedding = {"weights": 40, "block": 4, "memory": memory}
    return resolved({"width": 4, "bottom": (6,), "top": (6,)}, embedding, **base)


def train(config, data, rows, run, backend=None):
    backend = backend or select(config.backend, config.precision)
    return train_model(build(config, data, backend), config, data, rows, run)


class Prompt(np.ndarray):
    """An array of a device that does at once what it is asked."""

    def set(self, host, stream):
        self[...] = host

    def get(self, stream, out, blocking):
        out[...] = self


def fed_backend():
    """The CPU behind the slots that feed a GPU."""
    idle = SimpleNamespace(
        record=lambda stream: None, synchronize=lambda: None, wait_event=lambda event: None
    )
    streams = Streams(lambda *place: np.empty(*place).view(Prompt), np.empty, lambda: idle, idle, idle)

    def fetched(results, rows):
        return fetch(streams, ((tag, array.view(Prompt)) for tag, array in results), rows)

    return dataclasses.replace(select("cpu"), feed=partial(feed, streams), fetch=fetched)


def weights_of(run):
    return (checkpoint.latest(run) / "weights.safetensors").read_bytes()


def test_two_runs_give_the_same_bytes(tmp_path):
    results = [train(config(), DATA, rows(), tmp_path / name) for name in "ab"]
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    assert results[0]["test"] == results[1]["test"]
    assert results[0]["steps"] == 32  # two epochs of 16 batches
    assert results[0]["rows_trained"] == 1000


def test_it_ends_after_the_steps_it_is_given_and_goes_on_from_there(tmp_path):
    """And it tells each evaluation in a line as it comes."""
    lines = []

    def run(name, **options):
        def told(done, total, note="", line=None):
            lines.extend([line] if line else [])

        model = build(config(), DATA, select("cpu"))
        return train_model(model, config(), DATA, rows(), tmp_path / name, told, **options)

    first = run("parts", max_steps=7)
    assert (first["steps"], first["stopped"]) == (7, "--max-steps 7 reached")
    parts, whole = run("parts"), run("whole")
    assert (parts["steps"], parts["stopped"]) == (32, "all epochs done")
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")
    form = r"step (\d+) of (\d+), ([\d,]+) rows, [\d,]+ rows/s, \d:\d\d:\d\d left, "
    form += ", ".join(f"{name} \\d\\.\\d{{4}}" for name in ("loss", "validation AUC", "log loss"))
    found = [re.fullmatch(form, line).groups() for line in lines]
    assert found[:3] == [("5", "7", "160"), ("7", "7", "224"), ("10", "32", "320")]
    assert found[-1] == ("32", "32", "1,024")
    auc, loss = (whole["validation"][name] for name in ("auc", "log_loss"))
    assert lines[-1].endswith(f"AUC {auc:.4f}, log loss {loss:.4f}")


@pytest.mark.parametrize("memory", ["fp32", "fp16", "int3"])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize("fed", [False, True], ids=["plain", "fed"])
@pytest.mark.parametrize("stop", [1, 4, 15, 16, 17, 31])
def test_a_run_stopped_anywhere_ends_as_if_it_had_not(stop, fed, optimizer, memory, tmp_path):
    """Steps 15 to 17 lie around the end of an epoch, whose last batch is short; a feed may begin with it."""
    schedule = OptimizerConfig(optimizer, 0.1, warmup_steps=4, decay_start=20, decay_steps=15)
    settings = dataclasses.replace(config(memory=memory), optimizer=schedule)
    whole = train(settings, DATA, rows(), tmp_path / "whole")

    with pytest.raises(Stopped):
        train(settings, DATA, rows() | {"train": stopping(stop)}, tmp_path / "part")
    with (tmp_path / "part" / "metrics.jsonl").open("a") as log:
        log.write('{"kind": "tra')  # a line cut short
    resumed = train(settings, DATA, rows(), tmp_path / "part", fed_backend() if fed else None)
    assert weights_of(tmp_path / "part") == weights_of(tmp_path / "whole")
    assert resumed["test"] == whole["test"]

    def log(run):
        entries = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]

    steps = [(entry["kind"], entry["step"]) for entry in log("part")]
    assert len(steps) == len(set(steps))
    assert [e for e in log("part") if e["kind"] == "validation"] == [
        e for e in log("whole") if e["kind"] == "validation"
    ]


RECIPES = {
    "adam": {
        "optimizer": {"optimizer": "adam", "lr": 0.01, "embedding_l2": 1e-3, "weight_decay": 0.01, "l2": 1e-4}
    },
    "momentum": {"optimizer": {"optimizer": "momentum", "lr": 0.05}, "memory": "int3"},
    "adagrad with decay": {"optimizer": {"optimizer": "adagrad", "lr": 0.1, "weight_decay": 0.01}},
    "dropout": {"model": {"dropout": 0.2}},
    "cross": {"average": 0.3, "model": {"interaction": "cross", "cross_layers": 2, "cross_rank": 3}},
    "average": {"average": 0.3},
    "average of codes": {"average": 0.3, "memory": "int3"},
    "row-wise Adagrad": {"optimizer": {"optimizer": "rowwise_adagrad", "lr": 0.1}},
    "plateau": {"optimizer": {"lr": 0.5, "schedule": "plateau"}, "epochs": 4},
    "cosine": {"optimizer": {"lr": 0.1, "embedding_lr": 0.3, "schedule": "cosine", "warmup_steps": 4}},
}


@pytest.mark.parametrize("stop", [4, 17])
@pytest.mark.parametrize("recipe", RECIPES)
def test_any_recipe_stopped_ends_as_if_it_had_not(recipe, stop, tmp_path):
    changes = dict(RECIPES[recipe])
    model, settings = changes.pop("model", {}), config(**changes)
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, **model))
    whole = train(settings, DATA, rows(), tmp_path / "whole")
    with pytest.raises(Stopped):
        train(settings, DATA, rows() | {"train": stopping(stop)}, tmp_path / "part")
    resumed = train(settings, DATA, rows(), tmp_path / "part")
    assert weights_of(tmp_path / "part") == weights_of(tmp_path / "whole")
    assert resumed["test"] == whole["test"]


def test_the_rate_falls_to_a_tenth_where_the_auc_has_not_risen(tmp_path):
    """By what the log says; a training that is stopped between two evaluations, by an evaluation of its own,
    goes on as if it had not been."""
    settings = config(optimizer={"lr": 0.5, "schedule": "plateau"}, epochs=8)
    train(settings, DATA, rows(), tmp_path / "whole")
    told = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    rate, best, rates = 0.5, -1, set()
    for entry in told:
        if entry["kind"] == "train":
            assert entry["lr"] == pytest.approx(rate, rel=1e-12)
            rates.add(round(math.log10(rate), 9))
        elif entry["auc"] > best:
            best = entry["auc"]
        else:
            rate /= 10
    assert len(rates) >= 3
    for until in (12, 43, None):
        model = build(settings, DATA, select("cpu"))
        train_model(model, settings, DATA, rows(), tmp_path / "parts", max_steps=until)
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")


@pytest.mark.parametrize(("average", "total"), [(0.0, 7), (0.5, 32), (0.4, 1003), (1.0, 5), (0.999, 20)])
def test_steps_that_are_averaged(average, total):
    """Numbered from 1 on without a gap, at even distances, at most 200, none too early, and the last one."""
    numbers = {step: averaged_number(config(average=average), step, total) for step in range(1, total + 1)}
    steps = [step for step, number in numbers.items() if number]
    assert [numbers[step] for step in steps] == list(range(1, len(steps) + 1))
    assert steps[-1] == total
    assert steps[0] > average * total - 1
    assert len(set(np.diff(steps))) <= 1
    assert min(200, math.ceil((1 - average) * total)) / 2 <= len(steps) <= 200


@pytest.mark.parametrize("memory", ["fp32", "fp16", "int3"])
def test_the_mean_of_the_last_weights_is_a_model_beside_the_last(memory, tmp_path):
    """By the weights of each step; and the training is the one that it is without."""
    settings, data, kept = config(memory, average=0.8, epochs=1, checkpoint_every=100), rows(), []
    plain = dataclasses.replace(settings, average=None)
    model = build(plain, DATA, select("cpu"))
    for step, batch in enumerate(data["train"].batches(32, seed=0), 1):
        model.step(batch[0], *batch[1:], 0.03)
        if step > 12:  # of 16
            kept.append([model.parameters["top.0.weight"].copy(), model.embedding.stepped.copy()])
    result = train(settings, DATA, data, tmp_path)
    state, named = model.state(), checkpoint.load_model(tmp_path, "cpu")[0].state()
    averages = {name: array for name, array in named.items() if name.startswith("average.")}
    for name in named.keys() - averages.keys():
        np.testing.assert_array_equal(named[name], state[name], err_msg=name)
    assert (
        sum(array.nbytes for array in averages.values())
        == plan(settings, DATA, 1)["memory"]["averaged weights"]
    )
    for name, each in zip(("top.0.weight", "embedding"), zip(*kept, strict=True), strict=True):
        mean = np.mean(np.array(each, float), axis=0)
        np.testing.assert_allclose(named[f"average.{name}"], mean, rtol=1e-5, atol=1e-7)
    averaged, its_config, *_ = checkpoint.load_model(tmp_path / "averaged", "cpu")
    assert its_config.optimizer.optimizer == "none"
    np.testing.assert_array_equal(averaged.parameters["top.0.weight"], named["average.top.0.weight"])
    read = averaged.embedding.read(0, 40)
    np.testing.assert_allclose(
        read, named["average.embedding"], atol={"fp32": 0, "fp16": 2e-4}.get(memory, 0.1)
    )
    assert metrics.summary(*predict(averaged, data["test"])) == result["averaged"]["test"]
    assert result["averaged"]["test"]["log_loss"] != result["test"]["log_loss"]


@needs_simulator
def test_deterministic_training_gives_the_same_bytes_and_learns_what_a_cpu_does(tmp_path):
    """The simulator's threads add in another order each time; twice they come to the same bits."""
    losses = []
    for name, backend in (("a", "cuda"), ("b", "cuda"), ("c", "cpu")):
        settings, run = config(backend=backend, epochs=1), tmp_path / name
        few = {kind: MemoryRows(64 if kind == "train" else 8, 64) for kind in rows()}
        train(settings, DATA, few, run, select(backend, deterministic=True))
        told = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses.append([entry.get("loss", entry.get("log_loss")) for entry in told])
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    assert None not in losses[0]
    assert len(losses[0]) >= 2
    np.testing.assert_allclose(losses[0], losses[2], rtol=1e-5)  # float32 sums in another order


def test_a_log_is_not_rewritten_in_place(tmp_path, monkeypatch):
    """What resuming takes out of it is gone only once the rest is whole."""
    train(config(epochs=1), DATA, rows(), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as raised:
        Log(tmp_path / "metrics.jsonl", 3)
    assert raised.value.filename == str(tmp_path / "metrics.jsonl")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    monkeypatch.undo()
    Log(tmp_path / "metrics.jsonl", 3)
    assert len((tmp_path / "metrics.jsonl").read_bytes()) < len(before)


def test_a_log_that_never_comes_takes_no_room(tmp_path):
    assert train(config(epochs=1, eval_every=10**15), DATA, rows(), tmp_path)["steps"] == 16


def test_it_learns(tmp_path):
    """The first feature decides: 0.8 against 0.2, so the best AUC is near 0.8."""
    result = train(config(epochs=20), DATA, rows(), tmp_path / "run")
    assert result["test"]["auc"] > 0.7
    assert result["stopped"] == "all epochs done"


def test_logged_losses_are_means_per_row_since_the_last_log(tmp_path):
    """Every other step is logged; the last one has a short batch. Against the steps by themselves."""
    settings, data = config(epochs=1, eval_every=10, checkpoint_every=100), rows()
    train(settings, DATA, data, tmp_path)
    model, losses, means = build(settings, DATA, select("cpu")), [], {}
    for step, (label, dense, ids) in enumerate(data["train"].batches(32, seed=0), 1):
        losses.append(model.step(label, dense, ids, settings.optimizer.lr).astype(float))
        if step % 2 == 0:
            means[step], losses = np.concatenate(losses).mean(), []
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = {entry["step"]: entry["loss"] for entry in log if entry["kind"] == "train"}
    assert logged == pytest.approx(means, rel=1e-12)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_it_learns_in_less_precision(precision, tmp_path):
    """Near what float32 reaches, with other weights; and a run keeps to its precision."""
    results = {
        p: train(config(epochs=20, precision=p), DATA, rows(), tmp_path / p) for p in ("fp32", precision)
    }
    auc = {p: result["test"]["auc"] for p, result in results.items()}
    assert auc[precision] > 0.7
    assert auc[precision] == pytest.approx(auc["fp32"], abs=0.03)
    assert weights_of(tmp_path / precision) != weights_of(tmp_path / "fp32")
    assert f"{precision} emulated" in results[precision]["backend"]
    assert "emulated" not in results["fp32"]["backend"]
    with pytest.raises(ConfigError, match="other settings"):
        train(config(epochs=20), DATA, rows(), tmp_path / precision)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_it_learns_with_weights_in_half_precision(optimizer, tmp_path):
    """The AUC of 110 rows moves with every rounding: 0.001 (sgd) and 0.011 (adagrad) apart when measured."""
    schedule, auc = OptimizerConfig(optimizer, 0.1), {}
    for memory in ("fp32", "fp16"):
        settings = dataclasses.replace(config(memory, epochs=40, eval_every=1000), optimizer=schedule)
        auc[memory] = train(settings, DATA, rows(), tmp_path / memory)["test"]["auc"]
    assert auc["fp32"] > 0.7
    assert auc["fp16"] == pytest.approx(auc["fp32"], abs=0.03)


@pytest.mark.parametrize(
    ("draw", "least", "most"),
    [(None, 0.05, 0.3), (2**12, 0.6, 1), (0, 2, np.inf)],
    ids=["random", "nearest", "down"],
)
def test_halves_go_where_floats_go(draw, least, most, monkeypatch):
    """960 steps of about 5e-6, for weights whose ulp is 2e-4: how far from float32's way, as a share of it.

    Rounded at random, a weight is off by the root of its draws. To the nearest, most never move; down, all
    go towards 0.
    """
    if draw is not None:
        monkeypatch.setattr(half_step, "random_bits", lambda key, slot: np.uint32(draw))
    ways = {}
    for memory in ("fp32", "fp16"):
        settings = dataclasses.replace(config(memory), optimizer=OptimizerConfig("sgd"))
        model = build(settings, DATA, select("reference"))
        start = model.embedding.memory.astype(float)
        for epoch in range(60):
            for label, dense, ids in rows()["train"].batches(32, seed=0, epoch=epoch):
                model.step(label, dense, ids, 0.003)
        ways[memory] = model.embedding.memory.astype(float) - start
    off = np.linalg.norm(ways["fp16"] - ways["fp32"]) / np.linalg.norm(ways["fp32"])
    assert least < off < most


@pytest.mark.kernels
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_twenty_steps_are_those_of_the_reference(optimizer, version, tmp_path):
    """The whole loop: losses, evaluation and weights. In the simulator, this is the way a GPU takes."""
    sizes = {"train": 160, "validation": 12, "test": 12}
    runs = []
    for backend in ("reference", version):
        settings = dataclasses.replace(
            config(batch=8, epochs=1, eval_every=10, checkpoint_every=20, backend=backend),
            optimizer=OptimizerConfig(optimizer, 0.1),
        )
        memory = {name: MemoryRows(n, n) for name, n in sizes.items()}
        result = train(settings, DATA, memory, tmp_path / backend)
        log = [json.loads(line) for line in (tmp_path / backend / "metrics.jsonl").read_text().splitlines()]
        model = build(settings, DATA, select("reference"))
        checkpoint.load_weights(checkpoint.latest(tmp_path / backend), model)
        runs.append((result, [e.get("loss", e.get("log_loss")) for e in log], model.state()))
    (expected, losses, weights), (found, found_losses, found_weights) = runs
    assert found["steps"] == 20
    assert len(losses) > 10
    # Twenty steps of some hundred float32 operations on values of order 1, each step on the one before.
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(found_losses, losses, **tolerance)
    np.testing.assert_allclose(found["test"]["log_loss"], expected["test"]["log_loss"], **tolerance)
    for name, array in weights.items():
        np.testing.assert_allclose(found_weights[name], array, **tolerance, err_msg=name)


def test_it_stops_at_the_target(tmp_path):
    result = train(config(epochs=50, target_auc=0.7), DATA, rows(), tmp_path / "run")
    assert result["stopped"] == "target AUC reached"
    assert result["validation"]["auc"] >= 0.7
    assert result["steps"] < 50 * 16
    again = train(config(epochs=50, target_auc=0.7), DATA, rows(), tmp_path / "run")
    assert again["steps"] == result["steps"]


def patient(**changes):
    return config(**{"epochs": 30, "eval_every": 4, "patience": 3} | changes)


def told(run):
    """The log of a run without times, and the validation AUC of each step that has one."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    aucs = {entry["step"]: entry["auc"] for entry in entries if entry["kind"] == "validation"}
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries], aucs


class Stopped(Exception):
    pass


def stopping(stop, whole=None):
    """Training rows that end the process at a batch."""
    whole, given = whole or rows()["train"], itertools.count(1)

    def batches(*args, **kwargs):
        for batch in whole.batches(*args, **kwargs):
            if next(given) > stop:
                raise Stopped
            yield batch

    return SimpleNamespace(count=whole.count, batches=batches)


@pytest.mark.parametrize("patience", [1, 3, 10**6])
def test_patience_ends_a_training_at_its_best(patience, tmp_path):
    """The last is longer than the training: then all of it is done, and the best is kept all the same."""
    settings = patient(patience=patience, epochs=6)
    result = train(settings, DATA, rows(), tmp_path)
    (entries, aucs), steps = told(tmp_path), result["steps"]
    best = max(aucs, key=aucs.get)
    assert [step for step in aucs if step > best] == [
        best + 4 * n for n in range(1, 1 + min(patience, 99)) if best + 4 * n <= 96
    ]
    assert (steps, best < steps) == (max(aucs), True)
    ending = {1: "no better validation AUC in 1 evaluation", 3: "no better validation AUC in 3 evaluations"}
    assert result["stopped"] == ending.get(patience, "all epochs done")
    assert result["best_step"] == best
    assert result["validation"]["auc"] == aucs[best]
    assert checkpoint.latest(tmp_path) == checkpoint.of_step(tmp_path, best)
    model = checkpoint.load_model(tmp_path, "cpu")[0]
    assert metrics.summary(*predict(model, rows()["test"])) == result["test"]
    weights = weights_of(tmp_path)
    assert train(settings, DATA, rows(), tmp_path) == result  # resumed, with nothing left to do
    assert (weights_of(tmp_path), told(tmp_path)) == (weights, (entries, aucs))


def test_what_is_told_and_drawn_is_the_best(tmp_path, monkeypatch):
    result = train(patient(patience=1), DATA, rows(), tmp_path) | {"bayes": None, "data": "data of a test"}
    best, auc = result["best_step"], result["validation"]["auc"]
    assert f"validation AUC {auc:.4f} (of step {best})" in report.text(result)
    drawn = []
    monkeypatch.setattr(report, "write_figure", lambda path, figure, dpi: drawn.append(figure))
    report.draw_curves(tmp_path, result)
    *by_step, reliability = drawn[0].axes
    for axes in by_step:
        (line,) = (line for line in axes.lines if line.get_label() == "the model kept")
        assert set(line.get_xdata()) == {best}
    assert len(by_step) == 2
    found = reliability.lines[0].get_xydata().tolist()
    assert found == [[part["probability"], part["base_rate"]] for part in result["reliability"]]
    assert sum(part["rows"] for part in result["reliability"]) == 110


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory):
    """The folder of a run that its patience ended, and its summary."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(patient(), DATA, rows(), folder)


@pytest.mark.parametrize("stop", [-9, 1, 5, 9, 11, "removing"])
def test_a_run_stopped_within_its_patience_ends_as_if_it_had_not(stop, unstopped, tmp_path, monkeypatch):
    """Around the best step, up to the last one, and while the checkpoints after the best are removed."""
    folder, whole = unstopped
    best = whole["best_step"]
    assert 9 < best < whole["steps"] == best + 12 < 480
    remove = checkpoint._remove

    def removed(folder):
        remove(folder)
        if folder.name == f"step_{best + 12:08d}":
            raise Stopped

    data = rows() | {"train": stopping(math.inf if stop == "removing" else best + stop)}
    monkeypatch.setattr(checkpoint, "_remove", removed)
    with pytest.raises(Stopped):
        train(patient(), DATA, data, tmp_path)
    monkeypatch.undo()
    resumed = train(patient(), DATA, rows(), tmp_path)
    assert weights_of(tmp_path) == weights_of(folder)
    assert checkpoint.latest(tmp_path).name == checkpoint.latest(folder).name
    for name in ("test", "validation", "stopped", "steps", "best_step", "training_loss"):
        assert resumed[name] == whole[name], name
    assert told(tmp_path)[1] == told(folder)[1]


def test_patience_cannot_judge_by_rows_of_one_class(tmp_path):
    data = rows()
    data["validation"].label[:] = 0
    result = train(patient(patience=1, epochs=1), DATA, data, tmp_path)
    assert (result["stopped"], result["best_step"], result["steps"]) == ("all epochs done", 16, 16)


def taught_rows(whole):
    """Training rows with a teacher that knows what decides."""

    def batches(*args, **kwargs):
        for label, dense, ids in whole.batches(*args, **kwargs):
            yield label, np.where(ids[:, 0] % 2, 0.8, 0.2).astype(np.float32), dense, ids

    return SimpleNamespace(count=whole.count, batches=batches)


def test_a_teacher_teaches_and_a_stopped_run_ends_as_if_it_had_not(tmp_path):
    settings = config(teacher="digest", teacher_weight=0.75)
    data = rows()
    data["train"] = taught_rows(data["train"])
    result = train(settings, DATA, data, tmp_path / "whole")
    model, means = build(settings, DATA, select("cpu")), {}
    for epoch in range(2):
        for step, (label, p, dense, ids) in enumerate(data["train"].batches(32, seed=0, epoch=epoch), 1):
            target = label + np.float32(0.75) * (p - label)
            losses = model.step(label, dense, ids, settings.optimizer.lr, target=target)
            means[16 * epoch + step] = losses.mean(dtype=float)
    trained = checkpoint.load_model(tmp_path / "whole", "cpu")[0].state()
    assert all(np.array_equal(trained[name], array) for name, array in model.state().items())
    logged = {e["step"]: e["loss"] for e in told(tmp_path / "whole")[0] if e["kind"] == "train"}
    assert logged == pytest.approx({step: means[step] for step in logged}, rel=1e-6)
    with pytest.raises(Stopped):
        train(settings, DATA, data | {"train": stopping(17, data["train"])}, tmp_path / "part")
    assert train(settings, DATA, data, tmp_path / "part")["test"] == result["test"]
    assert weights_of(tmp_path / "part") == weights_of(tmp_path / "whole")


def test_a_model_without_categories_is_not_taught(tmp_path):
    """Its rows are those of the model that is."""
    data = rows()
    train(config(epochs=1), DATA, data, tmp_path / "plain")
    train(config(epochs=1), DATA, data | {"train": taught_rows(data["train"])}, tmp_path / "taught")
    assert weights_of(tmp_path / "plain") == weights_of(tmp_path / "taught")


FRESH = {
    "fp16": {"weights": 40, "block": 4, "memory": "fp16"},
    "mixed_precision": {"method": "mixed_precision", "bits": 8, "cache": 1.0},
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("embedding", FRESH)
def test_fresh_embeddings_are_drawn_once_a_pass(embedding, version, tmp_path):
    """Against the steps by themselves; and stopped around the end of a pass, which has a checkpoint."""
    size = {"width": 4, "bottom": (6,), "top": (6,)}
    settings = resolved(
        size, FRESH[embedding], batch=32, epochs=3, fresh_embeddings=True, checkpoint_every=1, backend=version
    )
    data = dataclasses.replace(DATA, dialect="dictionary")
    few = {name: MemoryRows(70 if name == "train" else 20, 1) for name in rows()}  # 3 steps a pass
    model = build(settings, data, select(version))
    for epoch in range(3):
        if epoch:
            model.embedding.begin(epoch)
        for label, dense, ids in few["train"].batches(32, seed=0, epoch=epoch):
            model.step(label, dense, ids, settings.optimizer.lr)
    train(settings, data, few, tmp_path / "whole")
    trained = checkpoint.load_model(tmp_path / "whole", version)[0].state()
    for name, array in model.state().items():
        # On a GPU sums of floats are added up in any order.
        np.testing.assert_allclose(trained[name], array, rtol=0 if version == "cpu" else 1e-3, err_msg=name)
    if version == "cpu":
        for stop in (2, 3, 4, 7):
            stopped = few | {"train": stopping(stop, few["train"])}
            with pytest.raises(Stopped):
                train(settings, data, stopped, tmp_path / f"part{stop}")
            train(settings, data, few, tmp_path / f"part{stop}")
            assert weights_of(tmp_path / f"part{stop}") == weights_of(tmp_path / "whole")


def test_a_nan_stops_training_and_spares_the_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match=r"loss became nan in step 8; .*step_00000006.*lower --lr"):
        train(config(), DATA, rows(poison=7), tmp_path / "run")
    model = build(config(), DATA, select("cpu"))
    checkpoint.load_weights(checkpoint.latest(tmp_path / "run"), model)
    assert all(np.isfinite(array).all() for array in model.state().values())


def test_a_rate_that_is_too_high_is_noticed(tmp_path):
    settings = dataclasses.replace(config(), optimizer=OptimizerConfig("sgd", 1e30))
    with pytest.raises(TrainingError, match="lower --lr"):
        train(settings, DATA, rows(), tmp_path / "run")


class Spikes:
    """A learning rate that spoils the weights from step 40 on: finite at first, then not."""

    def __init__(self, monkeypatch, nan_at):
        rates = {40: 1e3, nan_at: math.inf}
        monkeypatch.setattr("robe.train.learning_rate", lambda _, step, *of: rates.get(step + 1, 0.1))


def test_the_last_good_checkpoint_is_one_that_predicts(tmp_path, monkeypatch):
    """Two newer checkpoints are finite but of no use, so they do not drive out the good one."""
    Spikes(monkeypatch, nan_at=56)
    every = config(epochs=20, eval_every=5, checkpoint_every=5)
    with pytest.raises(
        TrainingError, match=r"last good checkpoint is .*step_00000035 \(delete the newer ones"
    ):
        train(every, DATA, rows(), tmp_path)
    assert [path.name for path in checkpoint.saved(tmp_path)] == [
        "step_00000035",
        "step_00000050",
        "step_00000055",
    ]
    model = build(every, DATA, select("cpu"))
    checkpoint.load_weights(checkpoint.saved(tmp_path)[0], model)
    assert metrics.trouble(metrics.summary(*predict(model, rows()["validation"]))) is None
    checkpoint.load_weights(checkpoint.saved(tmp_path)[1], model)
    assert metrics.trouble(metrics.summary(*predict(model, rows()["validation"]))) is not None


def test_a_checkpoint_after_the_last_evaluation_is_not_called_good(tmp_path, monkeypatch):
    """The weights are spoilt in step 40, evaluated in 39, saved in 39 and 42."""
    Spikes(monkeypatch, nan_at=43)
    with pytest.raises(TrainingError, match=r"last good checkpoint is .*step_00000039 \(delete the newer"):
        train(config(epochs=20, eval_every=39, checkpoint_every=3), DATA, rows(), tmp_path)


def test_a_run_that_learned_says_nothing(tmp_path):
    result = train(config(epochs=20), DATA, rows(), tmp_path)
    assert result["warnings"] == []
    assert result["diverged"] is False


def test_one_prediction_for_all_rows_is_told(tmp_path):
    """A rate of next to nothing, from weights that make the rectifiers deaf to their input."""
    settings = config(epochs=1)
    model = build(settings, DATA, select("cpu"))
    for name, array in model.parameters.items():
        if name.startswith("top.0"):
            array[...] = -1
    result = train_model(model, settings, DATA, rows(), tmp_path)
    assert result["test"]["lowest_probability"] == result["test"]["highest_probability"]
    assert not result["diverged"]
    (line,) = result["warnings"]
    assert line.startswith("test rows: every row gets the probability 0.")
    assert "nothing was learned: try another --lr (it was 0.03), wider layers" in line


def test_losses_that_grew_are_told(tmp_path, monkeypatch):
    """No weight is infinite, so training goes on to its end."""
    monkeypatch.setattr("robe.train.learning_rate", lambda _, step, *of: 100.0 if step % 2 else 0.01)
    settings = dataclasses.replace(config(epochs=1), optimizer=OptimizerConfig("adagrad", 0.03))
    result = train(settings, DATA, rows(), tmp_path)
    assert result["diverged"]
    (line,) = result["warnings"]
    assert "is no better than" in line
    assert "the training diverged, no checkpoint up to the newest" in line
    assert train(settings, DATA, rows(), tmp_path)["warnings"] == [line]  # resumed, with nothing left to do


def test_an_absurd_loss_of_the_test_rows_is_enough(tmp_path, monkeypatch):
    """The last step alone spoils the weights, after its loss was taken."""
    monkeypatch.setattr("robe.train.learning_rate", lambda _, step, *of: 1e4 if step == 31 else 0.1)
    result = train(config(), DATA, rows(), tmp_path)
    assert result["training_loss"] < 1
    assert result["diverged"]


def test_rows_that_were_learned_by_heart_are_told_apart(tmp_path):
    """The labels of the test rows are turned around: what was learned is wrong for them."""
    data = rows()
    data["test"].label = 1 - data["test"].label
    result = train(config(epochs=20), DATA, data, tmp_path)
    (line,) = result["warnings"]
    assert "of the training rows something was learned" in line
    assert not result["diverged"]


def test_a_test_of_one_class_is_no_reproach(tmp_path):
    data = rows()
    data["test"].label[:] = 0
    assert train(config(epochs=20), DATA, data, tmp_path)["warnings"] == []


def test_probabilities_that_are_all_the_same_are_noticed(tmp_path):
    model, heard = build(config(), DATA, select("cpu")), []
    write_probabilities(model, rows()["test"].batches(50), tmp_path / "p.txt", heard.append)
    assert heard == []
    model.parameters["top.1.weight"][...] = 0
    write_probabilities(model, rows()["test"].batches(50), tmp_path / "p.txt", heard.append)
    assert len(heard) == 1
    assert heard[0].startswith("all 110 rows get the probability")


def test_a_probability_that_is_not_finite_is_not_written(tmp_path):
    model, data = build(config(), DATA, select("cpu")), rows()["test"]
    data.dense[60] = np.nan
    with pytest.raises(TrainingError, match=r"row 60 \(from 0\): its probability is not finite"):
        write_probabilities(model, data.batches(50), tmp_path / "p.txt")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """The loss of step 6 is still fine: it was taken before the step that spoils the weights."""
    monkeypatch.setattr("robe.train.learning_rate", lambda _, step, *of: 0.1 if step < 5 else math.inf)
    with pytest.raises(TrainingError, match=r"holds a value that is not finite in step 6; .*step_00000003"):
        train(config(eval_every=100), DATA, rows(), tmp_path / "run")
    assert checkpoint.latest(tmp_path / "run").name == "step_00000003"


def test_ids_that_a_table_does_not_have_stop_training(tmp_path):
    few = dataclasses.replace(DATA, cardinalities=(20, 3), dialect="dictionary")
    full = dataclasses.replace(config(), embedding=EmbeddingConfig("full"))
    with pytest.raises(ConfigError, match=r"feature 1 has 3 rows, but an id of the data is [34]"):
        train(full, few, rows(), tmp_path / "run")


def test_other_settings_do_not_go_on_with_a_run(tmp_path):
    train(config(epochs=1), DATA, rows(), tmp_path / "run")
    with pytest.raises(ConfigError, match="other settings or data"):
        train(config(epochs=1, seed=5), DATA, rows(), tmp_path / "run")


def test_predictions_are_written_in_order(tmp_path):
    model = build(config(), DATA, select("cpu"))
    data = rows()["test"]
    label, logits = predict(model, data)
    np.testing.assert_array_equal(label, data.label)
    for batch, error in (
        (EVALUATION_BATCH, 5e-9),  # nine digits are written
        (50, 1e-5),  # matrix products of another batch size may round otherwise
    ):
        count = write_probabilities(model, data.batches(batch), tmp_path / "p.txt")
        written = [float(line) for line in (tmp_path / "p.txt").read_text().splitlines()]
        assert count == len(written) == 110
        np.testing.assert_allclose(written, [1 / (1 + math.exp(-x)) for x in logits.tolist()], rtol=error)


def test_a_prediction_that_fails_leaves_no_file(tmp_path):
    model = build(config(), DATA, select("cpu"))

    def broken():
        yield next(iter(rows()["test"].batches(50)))
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError):
        write_probabilities(model, broken(), tmp_path / "p.txt")
    assert list(tmp_path.iterdir()) == []


class TestCheckpoint:
    @pytest.fixture
    def saved(self, tmp_path):
        train(config(epochs=1), DATA, rows(), tmp_path)
        return checkpoint.latest(tmp_path)

    def load(self, folder):
        settings, data, _ = checkpoint.read_state(folder)
        model = build(settings, data, select("cpu"))
        checkpoint.load_weights(folder, model)
        return model

    def test_it_holds_all_that_training_changes(self, saved):
        state = self.load(saved).state()
        assert {
            "embedding.memory",
            "embedding.accumulator",
            "dense.accumulator",
            "top.1.bias",
        } <= state.keys()
        position = checkpoint.read_state(saved)[2]
        assert (position.step, position.epoch, position.epoch_step) == (16, 1, 0)

    def test_only_the_newest_are_kept(self, saved):
        assert [p.name for p in sorted(saved.parent.iterdir())] == ["step_00000015", "step_00000016"]

    def test_numbers_order_them_and_other_folders_are_none(self, tmp_path):
        for name in ("step_99999999", "step_100000000", "step_00000007", "step_00000099.bak", ".partial"):
            (tmp_path / "checkpoints" / name).mkdir(parents=True)
        assert [path.name for path in checkpoint.saved(tmp_path)] == [
            *("step_00000007", "step_99999999", "step_100000000")
        ]

    def test_what_a_killed_process_left_stops_no_other(self, saved):
        run, folder = saved.parents[1], saved.parent
        for name in (".partial", ".removed"):
            shutil.copytree(saved, folder / name)
        model, settings = self.load(saved), checkpoint.read_state(saved)
        again = checkpoint.save(run, model, *settings[:2], checkpoint.Position(17))
        assert sorted(path.name for path in folder.iterdir()) == ["step_00000016", "step_00000017"]
        self.load(again)

    def test_what_could_not_be_removed_is_removed_when_training_goes_on(self, saved, monkeypatch):
        run, folder = saved.parents[1], saved.parent
        shutil.copytree(saved, folder / "step_00000014")
        names = [path.name for path in sorted(folder.iterdir())]
        real = shutil.rmtree

        def fails(path, ignore_errors=False, **options):
            if not ignore_errors:
                raise OSError(errno.EIO, "Input/output error", "state.json")
            real(path, ignore_errors)

        with monkeypatch.context() as patched:
            patched.setattr(shutil, "rmtree", fails)
            with pytest.raises(OSError, match=r"Input/output error: '.*/checkpoints/.removed'"):
                checkpoint.drop_old(run, 0)
        assert [path.name for path in sorted(folder.iterdir())] == [".removed", *names[1:]]
        checkpoint.drop_old(run, 15)
        assert [path.name for path in sorted(folder.iterdir())] == names[1:]

    def test_one_that_is_removed_meanwhile_is_followed_by_a_newer_one(self, saved, monkeypatch):
        """A training makes two checkpoints between a reader's look at the newest and its reading of it."""
        run, model, settings = saved.parents[1], self.load(saved), checkpoint.read_state(saved)
        load, seen = checkpoint.load_weights, []

        def late(folder, target):
            if not seen:
                for step in (17, 18):
                    checkpoint.save(run, model, *settings[:2], checkpoint.Position(step))
            seen.append(folder.name)
            load(folder, target)

        monkeypatch.setattr(checkpoint, "load_weights", late)
        assert checkpoint.load_model(run, "cpu")[3].step == 18
        assert seen == ["step_00000016", "step_00000018"]

    def test_removing_one_is_done_at_one_stroke(self, saved, monkeypatch):
        def killed(folder, **options):
            if folder.name == ".removed" and folder.exists():
                raise KeyboardInterrupt

        model, settings = self.load(saved), checkpoint.read_state(saved)
        monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(saved.parents[1], model, *settings[:2], checkpoint.Position(17))
        for folder in checkpoint.saved(saved.parents[1]):
            self.load(folder)

    @pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO])
    @pytest.mark.parametrize("name", ["state.json", "weights.safetensors"])
    def test_what_cannot_be_read_for_now_is_not_damaged(self, saved, monkeypatch, name, number):
        real = Path.open

        def refused(path, *arguments, **options):
            if path.name == name:
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *arguments, **options)

        monkeypatch.setattr(Path, "open", refused)
        with pytest.raises(CheckpointError, match=f"{name}: cannot be read .{os.strerror(number)}") as raised:
            self.load(saved)
        assert "delete" not in str(raised.value)
        assert "damaged" not in str(raised.value)

    def test_a_pipe_is_not_waited_for(self, saved):
        (saved / "state.json").unlink()
        os.mkfifo(saved / "state.json")
        with pytest.raises(CheckpointError, match=r"state.json: cannot be read \(a pipe, not a file\)"):
            self.load(saved)

    def test_deleting_is_advised_where_there_is_one_before(self, saved):
        (saved.with_name("step_00000015") / "state.json").unlink()
        with pytest.raises(
            CheckpointError, match=r"state.json: cannot be read \(No such file or directory\); train again"
        ):
            self.load(saved.with_name("step_00000015"))
        (saved / "state.json").unlink()
        with pytest.raises(CheckpointError, match=f"delete {saved} to use the checkpoint before it"):
            self.load(saved)

    def test_truncated_weights_are_refused(self, saved):
        path = saved / "weights.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(CheckpointError, match=r"weights.safetensors: truncated or altered"):
            self.load(saved)

    def test_altered_weights_are_refused(self, saved):
        path = saved / "weights.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="sha256 differs"):
            self.load(saved)

    def test_missing_weights_are_refused(self, saved):
        (saved / "weights.safetensors").unlink()
        with pytest.raises(CheckpointError, match="cannot be read"):
            self.load(saved)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": 99}, "version 99, this program reads .* version 1"),
            ({"format": "other"}, "is other version 1"),
            ({"config": {}}, "damaged or foreign"),
            ({"position": {"step": 1, "colour": 2}}, "damaged or foreign"),
        ],
    )
    def test_foreign_state_is_refused(self, saved, change, message):
        path = saved / "state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(CheckpointError, match=message) as caught:
            self.load(saved)
        assert "\n" not in str(caught.value)

    def test_truncated_state_is_refused(self, saved):
        path = saved / "state.json"
        path.write_text(path.read_text()[:100])
        with pytest.raises(CheckpointError, match="damaged or foreign"):
            self.load(saved)

    def test_weights_of_another_model_are_refused(self, saved):
        path = saved / "state.json"
        state = json.loads(path.read_text())
        state["config"]["embedding"]["weights"] = 41
        path.write_text(json.dumps(state))
        with pytest.raises(CheckpointError, match="do not fit the configuration"):
            self.load(saved)

    def test_other_data_are_refused(self):
        with pytest.raises(ConfigError, match=r"there: its columns or ids"):
            DATA.require("xyz", "there")

    def test_a_folder_without_checkpoints_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match="no checkpoint here"):
            checkpoint.latest(tmp_path / "nowhere")

    def test_weights_are_readable_by_whom_their_neighbours_are(self, tmp_path):
        before = os.umask(0o027)
        try:
            model, settings = build(config(), DATA, select("cpu")), (config(), DATA, checkpoint.Position())
            folder = checkpoint.save(tmp_path, model, *settings)
        finally:
            os.umask(before)
        assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
            "state.json": 0o640,
            "weights.safetensors": 0o640,
        }
