"""Several processes that train one model: ranks that are threads, and processes where there is an mpiexec."""

import copy
import dataclasses
import itertools
import json
import os
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from conftest import resolved, without_simulator
from recipes import ROOT, blocks, shell
from safetensors.numpy import load_file
from test_resume import OPEN_MPI, mpiexec, require_mpiexec

import robe.backend
import robe.ranks
from data_pipeline import synthetic
from data_pipeline.ranks import Ranks
from data_pipeline.schema import DataError
from robe import checkpoint, cli, report, run_folder, train
from robe.backend import among, select
from robe.bags import Bags
from robe.config import METHODS, DataSpec
from robe.model import build
from robe.ranks import ALONE, Mpi
from robe.threads import share_cores
from robe.timeline import no_phase
from robe.train import TrainingError

CARDINALITIES = (200, 3, 40, 9)
DATA = DataSpec(3, CARDINALITIES, "dictionary", "", "test")
BAGS = dataclasses.replace(DATA, pooling=("sum", "max", "mean", "sum"))
# Ways to store weights and to step them, with what else depends on the number of a row.
CASES = {
    "robe": ({"block": 4, "weights": 200}, {"optimizer": "sgd"}, {}),  # an array of 800 B: rows are 1,000 B
    "robe in halves": ({"block": 4, "memory": "fp16"}, {"optimizer": "adagrad"}, {}),
    "robe in codes": ({"block": 4, "memory": "int8"}, {"optimizer": "adagrad"}, {}),
    "codes alone": ({"block": 4, "memory": "int4", "master": "none"}, {"optimizer": "sgd"}, {}),
    "full": ({"method": "full"}, {"optimizer": "adagrad", "clip_norm": 0.1}, {"weighted": True}),
    "mixed precision": ({"method": "mixed_precision", "cache": 0.2}, {"optimizer": "adagrad"}, {}),
    "sketched": ({"method": "cafe"}, {"optimizer": "sgd"}, {}),
    "composed": ({"method": "quotient_remainder"}, {"optimizer": "adam"}, {"average": 0.5}),
    "clustered": ({"method": "cce"}, {"optimizer": "sgd"}, {}),
    "bags": ({"block": 4}, {"optimizer": "adagrad"}, {"data": BAGS}),
    "dropped": ({"block": 4}, {"optimizer": "sgd"}, {"model": {"interaction": "cross", "dropout": 0.5}}),
    "no ids": ({"method": "none"}, {"optimizer": "adam"}, {}),
    "squares": ({"block": 4}, {"optimizer": "sgd"}, {"loss": "mse"}),
    "small array": ({"block": 4, "weights": 60}, {"optimizer": "sgd"}, {}),
    "small array, lazy steps": ({"block": 4, "weights": 60}, {"optimizer": "adam"}, {}),
    "small array of halves": ({"block": 4, "weights": 60, "memory": "fp16"}, {"optimizer": "adagrad"}, {}),
}
# Ways in which gradients of vectors travel in the 10 steps of a case, other than as rows. Twice a small array
# is fewer bytes than the rows of 12 rows of the data, and more than those of the last 2.
WAYS = {case: {"look-ups": 10} for case in ("mixed precision", "sketched")}
WAYS |= {case: {"array": 8, "rows": 2} for case in CASES if "small" in case}
WAYS["no ids"] = {}
WAIT = 60  # seconds, for ranks that are threads; where one exchanges less than the others, these fail then
COMPILED = "robe", "full"  # those that are trained by the kernels of the CPU, too


class Made:
    """Rows whose label depends on the first id, in memory."""

    def __init__(self, count, data=DATA, weighted=False):
        self.count, self.data, rng = count, data, np.random.default_rng(count)
        self.ids = np.stack([rng.integers(0, n, count) for n in CARDINALITIES], 1).astype(np.uint32)
        self.label = (rng.random(count) < np.where(self.ids[:, 0] % 2, 0.8, 0.2)).astype(np.float32)
        self.dense = rng.random((count, 3), np.float32)
        self.lengths = rng.integers(0, 3, (count, len(CARDINALITIES)))
        self.weight = [rng.random(count, np.float32)] if weighted else []

    def batches(self, batch_size, *, seed=None, epoch=0, start_step=0):
        order = np.arange(self.count)
        if seed is not None:
            order = np.random.default_rng([seed, epoch]).permutation(self.count)
        for start in range(start_step * batch_size, self.count, batch_size):
            rows = order[start : start + batch_size]
            ids = self.ids[rows]
            if self.data.pooling:  # an id up to twice
                lengths = self.lengths[rows].ravel()
                ids = Bags(ids.ravel().repeat(lengths), np.append(0, np.cumsum(lengths)), None)
            yield (*(array[rows] for array in (self.label, *self.weight, self.dense)), ids)


def trained(case, run, ranks=ALONE, backend="reference", **options):
    """Train a case, or go on with it, as one of these ranks; returns its arrays, and the summary.

    Of 50 rows in batches of 12 the last has 2, fewer than 4 ranks.
    """
    embedding, optimizer, others = CASES[case]
    others = {"model": {}, "data": DATA, "weighted": False} | others
    data, weighted, model = others.pop("data"), others.pop("weighted"), others.pop("model")
    if embedding.get("method") not in ("full", "mixed_precision", "none"):
        embedding = {"weights": 600} | embedding
    model = {"width": 4, "bottom": (6,), "top": (6,)} | model
    others = {"batch": 12, "epochs": 2, "eval_every": 3, "backend": backend} | others
    config = resolved(model, embedding, {"lr": 0.05} | optimizer, **others)
    rows = {name: Made(n, data, weighted) for name, n in (("train", 50), ("validation", 30), ("test", 31))}
    network = build(config, data, among(select(backend), ranks))
    summary = train.train(network, config, data, rows, run, weighted=weighted, **options)
    return {name: np.array(array) for name, array in network.state().items()}, summary


class Thread:
    """A rank that is a thread, with what is used of a communicator of mpi4py."""

    def __init__(self, rank, given, barrier):
        self.rank, self.size, self.given, self.barrier = rank, len(given), given, barrier
        self.begun = {}  # (rank, tag) -> what is sent

    def _all(self, value):
        self.given[self.rank] = value
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found

    def bcast(self, value):
        return copy.deepcopy(self._all(value)[0])

    def Allreduce(self, _, array):
        array[...] = sum(self._all(array.copy()))

    def Iallreduce(self, _, array):
        """Nobody waits, so that the sum is made where it is waited for."""
        return SimpleNamespace(Wait=lambda: self.Allreduce(_, array))

    def Isend(self, sent, to, tag):
        self.begun[to, tag] = sent.copy()
        return SimpleNamespace(Wait=lambda: None)

    def Irecv(self, received, source, tag):
        """It comes where it is waited for; all send equally far."""
        to = (2 * self.rank - source) % self.size
        wait = lambda: self.Sendrecv(self.begun.pop((to, tag)), to, tag, received, source, tag)  # noqa: E731
        return SimpleNamespace(Wait=wait)

    def Allgather(self, sent, received):
        received[...] = np.concatenate(self._all(sent))

    def Allgatherv(self, _, received):
        whole, counts = received
        parts = self._all(np.split(whole.reshape(-1).copy(), np.cumsum(counts)[:-1]))
        whole.reshape(-1)[...] = np.concatenate([part[rank] for rank, part in enumerate(parts)])

    def Sendrecv(self, sent, to, _, received, source, __):
        target, array = self._all((to, sent.copy()))[source]
        assert target == self.rank
        assert (array.shape, array.dtype) == (received.shape, received.dtype)
        received[...] = array


def together(size, work):
    """What `work(ranks)` returns on each of so many ranks."""
    given, barrier = [None] * size, threading.Barrier(size, timeout=WAIT)

    def one(rank):
        try:
            return work(Mpi(Thread(rank, given, barrier)))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


@pytest.fixture
def small_evaluations(monkeypatch):
    """So that each rank evaluates some batches."""
    monkeypatch.setattr(train, "EVALUATION_BATCH", 8)


def compare(found, expected):
    """Floats added up in another order: some 1e-6 of the largest weight, after ten steps or 200."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if array.dtype.kind == "f":
            largest = np.abs(array).max(initial=1e-3)
            np.testing.assert_allclose(found[name] / largest, array / largest, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], array, err_msg=name)


@without_simulator
@pytest.mark.parametrize("case", CASES)
def test_ranks_give_the_model_of_one_process(case, tmp_path, small_evaluations):
    expected, alone = trained(case, tmp_path / "alone")
    for size, times in ((2, 1), (4, 2)):
        runs = [tmp_path / f"{size} {time}" for time in range(times)]
        first, *second = (together(size, lambda ranks, run=run: trained(case, run, ranks)) for run in runs)
        compare(first[0][0], expected)
        for arrays, summary in itertools.chain(first, *second):
            for name, array in first[0][0].items():
                assert arrays[name].tobytes() == array.tobytes(), name
            assert summary["test"] == first[0][1]["test"]
        assert first[0][1]["steps"] == alone["steps"] == 10
        assert first[0][1]["processes"]["count"] == size
        assert first[0][1]["processes"]["ways"] == WAYS.get(case, {"rows": 10})
        assert first[0][1]["test"]["auc"] == pytest.approx(alone["test"]["auc"], abs=0.01)
        losses = [
            [entry["loss"] for entry in train.read_log(run / "metrics.jsonl") if entry["kind"] == "train"]
            for run in (tmp_path / "alone", *runs)
        ]
        assert losses[1] == losses[-1]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@without_simulator
@pytest.mark.parametrize("method", METHODS)
def test_ranks_stay_with_one_process_for_200_steps(method, tmp_path):
    """With Adagrad two of them would not, as a last bit decides: `mixed_precision` rounds some weights to the
    next code, and of ids of `cafe` that count as much another one gives up its row."""
    by_sgd = "cafe", "hashing", "hot", "mixed_precision", "tensor_train"
    optimizer = "sgd" if method in by_sgd else "adagrad"
    embedding = {"method": method} | ({"weights": 600} if "weights" in METHODS[method].options else {})
    model = {"width": 4, "bottom": (6,), "top": (6,)}
    config = resolved(model, embedding, {"optimizer": optimizer, "lr": 0.05}, batch=12, eval_every=200)
    rows = {name: Made(n) for name, n in (("train", 2400), ("validation", 30), ("test", 30))}

    def arrays(ranks):
        network = build(config, DATA, among(select("reference"), ranks))
        summary = train.train(network, config, DATA, rows, tmp_path / str(ranks.size))
        assert summary["steps"] == 200
        return network.state()

    compare(together(2, arrays)[0], arrays(ALONE))


@without_simulator
def test_the_bytes_of_a_step_are_told(tmp_path, small_evaluations):
    """In the log as in the summary; on average over batches of 12 rows and the last, of 2."""
    (arrays, summary), _ = together(2, lambda ranks: trained("mixed precision", tmp_path / "run", ranks))
    dense = sum(array.size for name, array in arrays.items() if name.startswith(("bottom", "top")))
    look_up = 4 + 4 * 4  # an id, and 4 numbers
    expected = dense * 4 + 10 * len(CARDINALITIES) * look_up / 2
    assert summary["processes"]["bytes"] == expected
    *_, last = (e for e in train.read_log(tmp_path / "run" / "metrics.jsonl") if e["kind"] == "train")
    assert last["processes"] == summary["processes"]
    assert f"{expected:,.0f} B received" in report.text(summary | {"bayes": None, "data": ""})


@pytest.mark.parametrize("pairs", [1, 16], ids=["by MPI", "in pairs"])
def test_what_ranks_exchange(pairs, monkeypatch):
    monkeypatch.setattr(robe.ranks, "PAIRS", pairs)
    given = [np.random.default_rng(rank).random((rank % 3, 2), np.float32) for rank in range(4)]

    def exchanged(ranks):
        sums = [np.full(5, rank + 0.5, np.float32) for rank in range(2)]
        ranks.add(sums[0])
        ranks.begin(sums[1])
        ranks.finish(no_phase)
        shares = [np.full(2, 10 * ranks.rank + part, np.float32) for part in range(4)]
        ranks.reduced(shares)
        np.testing.assert_array_equal(shares[ranks.rank], [60 + 4 * ranks.rank] * 2)
        ranks.spread(shares)
        numbers = np.arange(ranks.rank % 3) + 10 * ranks.rank
        joined = [array.copy() for array in ranks.joined(given[ranks.rank], numbers)]
        return *sums, shares, *joined, ranks.moved

    for first, second, shares, rows, numbers, moved in together(4, exchanged):
        np.testing.assert_array_equal([first, second], [[2] * 5, [6] * 5])
        np.testing.assert_array_equal(shares, [[60] * 2, [64] * 2, [68] * 2, [72] * 2])
        np.testing.assert_array_equal(rows, np.concatenate(given))
        np.testing.assert_array_equal(numbers, [10, 20, 21])
        assert moved == 3 / 4 * (2 * 2 * 5 * 4 + 2 * 8 * 4 + 3 * (2 * 4 + 8))


@without_simulator
@pytest.mark.parametrize("count", [0, 1, 20, 70])
def test_any_number_of_batches_is_predicted_by_four_ranks(count, tmp_path):
    config = resolved({"width": 4, "bottom": (6,), "top": (6,)}, {"weights": 600}, batch=12)

    def written(ranks):
        model = build(config, DATA, among(select("reference"), ranks))
        return train.write_probabilities(model, Made(count).batches(8), tmp_path / str(ranks.size))

    assert together(4, written) == [count] * 4
    assert written(ALONE) == count
    assert (tmp_path / "4").read_bytes() == (tmp_path / "1").read_bytes()


@pytest.mark.parametrize("count", [0, 1, 500])
def test_distinct_rows_are_numbered(count):
    """As they come, or for a GPU sorted. Most of 500 come again; all are found where places collide."""
    tokens = np.random.default_rng(count).integers(0, 90, (count, 2)).astype(np.uint64) << np.uint64(32)
    expected, first = np.unique(tokens, return_index=True)
    for distinct, order in (
        (select("reference").distinct, np.argsort(first)),
        (partial(robe.backend._distinct, np), slice(None)),
    ):
        found, numbers = distinct(tokens)
        np.testing.assert_array_equal(found, expected[order])
        np.testing.assert_array_equal(found[numbers], tokens)
        assert (numbers.shape, numbers.dtype) == (tokens.shape, "uint32")


@without_simulator
def test_a_training_goes_on_with_another_number_of_ranks(tmp_path, small_evaluations):
    expected, _ = trained("robe", tmp_path / "alone")
    for size, steps in ((3, 4), (1, 6), (2, 8), (4, None)):
        together(size, lambda ranks, steps=steps: trained("robe", tmp_path / "run", ranks, max_steps=steps))
    found, summary = trained("robe", tmp_path / "run")  # where nothing is left to do
    compare(found, expected)
    assert (summary["steps"], summary["stopped"]) == (10, "all epochs done")


@without_simulator
def test_other_weights_on_one_rank_end_the_training(tmp_path, monkeypatch):
    def strayed(model, number):
        if model.backend.ranks.rank == 1:
            model.dense_parameters[-1] += np.float32(1e-6)

    monkeypatch.setattr(train, "averaged_number", lambda config, step, total: step == 4)
    monkeypatch.setattr("robe.model.DLRM.average", strayed)
    told = []

    def one(ranks):
        with pytest.raises(TrainingError) as ended:
            trained("robe", tmp_path / "run", ranks)
        told.append(str(ended.value))

    together(2, one)
    assert len(set(told)) == 1
    said = "process 1 of 2 holds other weights than process 0 after step 6, so .*step_00000003"
    assert re.match(said, told[0])
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["step_00000003"]


@pytest.mark.parametrize(
    ("told", "several"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"PMI_SIZE": "1", "PMIX_RANK": "0"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2", "PMIX_RANK": "0"}, True),
        ({"SLURM_STEP_NUM_TASKS": "2"}, False),
    ],
    ids=lambda told: " ".join(told) if isinstance(told, dict) else "",
)
def test_launchers_tell_that_there_are_several(told, several, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with mock.patch.dict(os.environ, told, clear=True):
        if not several:
            assert Ranks().size == 1
            return
        with pytest.raises(DataError, match="several processes were started, but mpi4py cannot be loaded"):
            Ranks()


@pytest.mark.parametrize(("cores", "expected"), [(8, "2"), (3, None)], ids=["free", "bound"])
def test_processes_on_a_machine_share_its_cores(cores, expected, monkeypatch):
    """Where the launcher has not bound them to some each."""
    monkeypatch.delitem(sys.modules, "numba")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    with mock.patch.dict(os.environ, {"MPI_LOCALNRANKS": "3"}, clear=True):
        share_cores()
        assert os.environ.get("NUMBA_NUM_THREADS") == expected


# Trains cases twice, and goes on with a run in which a rank is killed before a step.
CHILD = """
import os, signal, sys
from pathlib import Path
from mpi4py import MPI
from robe import train
from robe.ranks import Mpi
from test_ranks import trained

out, dies, last, *cases = sys.argv[1:]
ranks = Mpi(MPI.COMM_WORLD)
for case in cases:
    for time in "first", "second":
        trained(case, Path(out) / time / case, ranks, "cpu")
if ranks.rank == int(dies):
    killed = lambda: os.kill(os.getpid(), signal.SIGKILL)
    train.averaged_number = lambda config, step, total: step == int(last) and killed()
trained("robe", Path(out) / "killed", ranks, "cpu")
"""
# The command line, in which a batch of rank 1 is refused.
FAILING = """
import sys, time
from robe import cli, train
from robe.config import ConfigError

part, parts = train._part, []

def failing(batch, ranks):
    parts.append(part(batch, ranks))
    if ranks.rank == 1 and len(parts) == 3:
        print("failed at", time.time(), file=sys.stderr)
        raise ConfigError("a third batch is too much")
    return parts[-1]

train._part = failing
cli.main(sys.argv[1:])
"""
# The command line, in which rank 0 has no room for a checkpoint.
FULL = """
import resource, sys, time
from mpi4py import MPI
from robe import checkpoint, cli

save = checkpoint.save

def failing(*arguments, **options):
    print("failed at", time.time(), file=sys.stderr)
    save(*arguments, **options)

checkpoint.save = failing
if MPI.COMM_WORLD.rank == 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))
cli.main(sys.argv[1:])
"""
# The command line, which tells of each batch that it computes.
COMPUTING = """
import sys
from robe import cli, train
from robe.config import ConfigError

logits = train._logits

def told(model, batches):
    for each in logits(model, batches):
        print(f"computed by {model.backend.ranks.rank}", file=sys.stderr)
        yield each

train.EVALUATION_BATCH, train._logits = 100, told
cli.main(sys.argv[1:])
"""
# The same, in which rank 1 fails.
FAILING_TO_COMPUTE = COMPUTING.replace(
    "        yield each",
    """
        if model.backend.ranks.rank == 1:
            raise ConfigError("a batch is too much")
        yield each
""",
)
TINY = "--weights 400 --block 4 --batch 64 --bottom 4 --width 4 --top 4 --backend reference".split()


def saved(run):
    """The newest arrays of a run, and their bytes."""
    file = checkpoint.latest(run) / checkpoint.WEIGHTS
    return load_file(file), file.read_bytes()


@without_simulator
def test_processes_give_the_model_of_one_and_go_on_where_one_was_killed(tmp_path, rng):
    """Three times at a random step, with other numbers of processes."""
    alone = {case: trained(case, tmp_path / "alone" / case, backend="cpu")[0] for case in COMPILED}
    here = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "NUMBA_NUM_THREADS": 1}
    killed, cases = tmp_path / "killed", COMPILED
    for size, dies, first in ((2, 1, 4), (3, 0, 7), (2, 1, 10)):  # behind a checkpoint of every third step
        last = min(int(rng.integers(first, first + 3)), 10)
        assert mpiexec(size, tmp_path, dies, last, *cases, program=["-c", CHILD], **here).returncode != 0
        assert checkpoint.latest(killed).name == f"step_{first - 1:08}"
        cases = ()
    for case in COMPILED:
        arrays, found = saved(tmp_path / "first" / case)
        compare(arrays, alone[case])
        assert saved(tmp_path / "second" / case)[1] == found
    done = mpiexec(3, tmp_path, -1, 0, program=["-c", CHILD], **here)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    compare(saved(killed)[0], alone["robe"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared folder, where a page has one; tests by it are skipped where there is no mpiexec."""
    require_mpiexec()
    folder = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "SAMPLE_CHUNKS", 2)
        cli.main(["synth", "--rows", "900", "--days", "3", "--out", str(folder / "raw")])
    cli.main(["prepare", str(folder / "raw"), "--out", str(folder / "data" / "days")])
    (folder / "run.py").symlink_to(ROOT / "run.py")
    return folder


def test_the_page_says_what_works(folder, monkeypatch):
    """Nothing is told twice, and there is one run."""
    for name, value in OPEN_MPI.items():
        monkeypatch.setenv(name, value)
    for (_, code), backend in zip(blocks("cluster.md", "run"), (", 2 processes", " threads)"), strict=True):
        done = shell(code, folder)
        assert done.returncode == 0, done.stderr
        for line in ("data: .*/days: ", "run: ", "test AUC "):
            assert len(re.findall(f"^{line}", done.stdout, re.MULTILINE)) == 1, done.stdout
        (run,) = (folder / "runs").iterdir()
        summary = json.loads((run / "summary.json").read_text())
        assert summary["backend"].endswith(backend)
        assert summary["rows_trained"] == 600


@pytest.fixture(scope="module")
def run(folder):
    run = folder / "run"
    cli.main(["train", "--data", str(folder / "data" / "days"), "--out", str(run), *TINY, "--epochs", "1"])
    return run


def test_an_evaluation_is_shared(folder, run, tmp_path):
    """By its nine batches; and what is wrong is told once."""
    words, found = ("--data", folder / "data" / "days", "--split", "all"), []
    for size in (1, 2):
        done = mpiexec(size, "evaluate", run, *words, program=["-c", COMPUTING], PYTHONPATH=ROOT)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("computed by 0") == {1: 9, 2: 5}[size]
        assert done.stderr.count("computed") == 9
        found.append(json.loads(done.stdout))
    for each in found:
        for speed in ("rows_per_second", "busy"):
            each.pop(speed)
    assert found[0] == found[1]
    assert found[0]["rows"] == 900
    done = mpiexec(2, "evaluate", run, "--data", tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1


@pytest.fixture(scope="module")
def log(folder):
    """The raw logs of the folder in one, with a bad line."""
    lines = "".join((folder / "raw" / f"day_{day}").read_text() for day in range(3)).splitlines(True)
    lines[250] = lines[250].replace("\t", "\tword", 1)
    (folder / "log").write_text("".join(lines))
    return folder / "log"


def test_predictions_are_shared(folder, run, log, tmp_path, monkeypatch):
    """To the byte those of one process; also of a log with a bad line, of which one process tells."""
    for module in (train, run_folder):
        monkeypatch.setattr(module, "EVALUATION_BATCH", 100)
    for file, *words in ((folder / "data" / "days",), (log, "--bad-rows", "skip")):
        what = "predict", run, file, *words, "--out"
        cli.main([*map(str, (*what, tmp_path / "alone"))])
        done = mpiexec(2, *what, tmp_path / "shared", program=["-c", COMPUTING], PYTHONPATH=ROOT)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "shared").read_bytes() == (tmp_path / "alone").read_bytes()
        assert len(set((tmp_path / "shared").read_text().split())) > 800
        assert done.stdout == f"{tmp_path / 'shared'}: 900 probabilities\n"
        assert done.stderr.count("computed by 1") == 4
        assert done.stderr.count("computed") == 9
        assert done.stderr.count("warning: ") == len(words)


@pytest.mark.parametrize(
    ("program", "words", "told"),
    [
        (COMPUTING, (), "line 251"),
        (FAILING_TO_COMPUTE, ("--bad-rows", "skip"), "a batch is too much"),
        (FULL.replace("ROOM", "9000"), ("--bad-rows", "skip"), "File too large"),
    ],
    ids=["a row", "a batch", "a disk"],
)
def test_what_fails_in_predictions_ends_all(program, words, told, run, log, tmp_path):
    what = "predict", run, log, *words, "--out", tmp_path / "out"
    done = mpiexec(2, *what, program=["-c", program], PYTHONPATH=ROOT)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert told in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("train", "--learn", "3"), "--learn"),
        (("predict", "run", "-", "--out", "out"), "-: mpiexec loses what comes faster than it is read"),
    ],
    ids=["an option", "standard input"],
)
def test_a_wrong_argument_is_refused_once(words, told):
    done = mpiexec(2, *words)
    assert done.returncode == 2
    assert done.stderr.count(told) == 1


@pytest.mark.parametrize(
    ("program", "told"),
    [(FAILING, "a third batch is too much"), (FULL.replace("ROOM", "9000"), "File too large")],
    ids=["a batch", "a disk"],
)
def test_a_process_that_fails_ends_all(program, told, folder, tmp_path):
    words = "train", "--data", folder / "data" / "days", "--out", tmp_path / "run", *TINY
    done = mpiexec(2, *words, program=["-c", program], PYTHONPATH=ROOT)
    assert time.time() - float(re.search("failed at (.*)", done.stderr)[1]) < 10
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert told in done.stderr
    assert done.stdout.count("data: ") == 1
