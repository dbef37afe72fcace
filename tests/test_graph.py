"""Steps and predictions from a graph are those that the host launches one by one, bit for bit.

In the simulator a recorder takes the part of the graph (recorder.py).
"""

import dataclasses
import json
from contextlib import contextmanager, nullcontext
from functools import partial
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import needs_simulator, resolved
from recorder import Recorder, recording
from test_train import MemoryRows

import robe.graph
from robe import checkpoint
from robe.config import DataSpec, OptimizerConfig
from robe.graph import Graph, Graphs
from robe.kernels.parts import launch
from robe.kernels.parts.numbers import typed, value_of
from robe.model import build
from robe.plan import plan
from robe.train import train

DATA = DataSpec(3, (70, 5), "dictionary", "abc", "test")
SCHEDULE = {"lr": 0.1, "warmup_steps": 3, "decay_start": 6, "decay_steps": 6}
METHODS = {
    "ROBE": {"weights": 40, "block": 4},
    "ROBE, fp16": {"weights": 40, "block": 4, "memory": "fp16"},
    "ROBE, int3": {"weights": 40, "block": 4, "memory": "int3"},
    "hot": {"method": "hot", "weights": 140, "block": 4, "hot_share": 0.5},
    "full": {"method": "full"},
    # One set of 32 rows, fewer than the training reads: so some leave it, and are rounded.
    "mixed precision": {"method": "mixed_precision", "bits": 8, "cache": 0.4},
    "quotient_remainder": {"method": "quotient_remainder", "weights": 100},
    "tensor_train": {"method": "tensor_train", "weights": 100},
    "compositional": {"method": "compositional", "weights": 100, "chunks": 2},
    "cce": {"method": "cce", "weights": 100, "chunks": 2},
}
pytestmark = pytest.mark.kernels


# Six steps an epoch, of which the last is short; evaluations of two full batches or more and a short one.
ROWS = {
    name: MemoryRows(count, count, cardinalities=DATA.cardinalities)
    for name, count in (("train", 42), ("validation", 20), ("test", 12))
}


def settings(method, optimizer, **changes):
    base = {"batch": 8, "epochs": 2, "eval_every": 4, "checkpoint_every": 3, "backend": "cuda"}
    config = resolved({"width": 4, "bottom": (5,), "top": (6,)}, METHODS[method], **(base | changes))
    return dataclasses.replace(config, optimizer=OptimizerConfig(optimizer, **SCHEDULE))


def run_of(backend, config, folder, progress=lambda *told: None):
    """All that a run leaves: losses and evaluations, weights and whatever else a checkpoint holds."""
    model = build(config, DATA, backend)
    result = train(model, config, DATA, ROWS, folder, progress)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    state = {name: np.array(array).tobytes() for name, array in model.state().items()}
    return [entry | {"seconds": 0} for entry in log], result["test"], state


@pytest.fixture(autouse=True)
def small_evaluations(monkeypatch):
    for module in ("robe.model", "robe.train"):
        monkeypatch.setattr(f"{module}.EVALUATION_BATCH", 8)


# Method, optimizer, whether sums have a fixed order, and precision.
EVERY = [(method, optimizer, False, "fp32") for method in METHODS for optimizer in ("sgd", "adagrad")]
EVERY += [
    ("ROBE", "adam", False, "fp32"),
    ("cce", "adam", False, "fp32"),
    ("ROBE", "momentum", False, "fp32"),
    ("ROBE", "sgd", True, "fp32"),
    ("compositional", "sgd", True, "fp32"),
    ("ROBE", "sgd", False, "bf16"),
]


@needs_simulator
@pytest.mark.parametrize(("method", "optimizer", "deterministic", "precision"), EVERY)
def test_graph_and_plain_steps_agree(
    method, optimizer, deterministic, precision, monkeypatch, tmp_path, capsys
):
    """While the learning rate changes, batches are short between, and evaluations come in between."""
    config = settings(method, optimizer, deterministic=deterministic, precision=precision)
    graphs, plain = recording(monkeypatch, deterministic=deterministic, precision=precision)
    expected = run_of(plain, config, tmp_path / "plain")
    assert Recorder.made == []
    assert run_of(graphs, config, tmp_path / "graphs") == expected
    # The first of ten full batches of training is computed plainly, and the first of seven of evaluations.
    assert [recorder.replays for recorder in Recorder.made] == [9, 6]
    assert capsys.readouterr().err == ""


@needs_simulator
@pytest.mark.parametrize(("method", "optimizer"), [("ROBE", "sgd"), ("ROBE, fp16", "adagrad")])
def test_graph_and_plain_steps_agree_where_vectors_are_gathered_again(
    method, optimizer, monkeypatch, tmp_path
):
    monkeypatch.setattr("robe.interaction.gathering_again_pays", lambda *sizes: True)
    config = settings(method, optimizer)
    graphs, plain = recording(monkeypatch)
    assert build(config, DATA, plain).interaction.again
    expected = run_of(plain, config, tmp_path / "plain")
    assert run_of(graphs, config, tmp_path / "graphs") == expected
    assert [recorder.replays for recorder in Recorder.made] == [9, 6]


@needs_simulator
def test_whatever_changes_with_the_step_does_so_in_a_graph_too(monkeypatch, tmp_path):
    config = settings("ROBE", "adagrad")
    own = OptimizerConfig("adam", 0.1, embedding_lr=0.3, schedule="cosine", weight_decay=0.1, l2=0.01)
    dropped = dataclasses.replace(config.model, dropout=0.3)
    config = dataclasses.replace(config, optimizer=own, model=dropped)
    graphs, plain = recording(monkeypatch)
    expected = run_of(plain, config, tmp_path / "plain")
    assert run_of(graphs, config, tmp_path / "graphs") == expected


@needs_simulator
@pytest.mark.parametrize("teacher", [None, "a run"])
def test_a_plan_counts_the_batches_that_graphs_read(teacher, monkeypatch):
    monkeypatch.setattr("robe.plan.EVALUATION_BATCH", 8)
    config, (graphs, _) = settings("ROBE", "sgd", teacher=teacher), recording(monkeypatch)
    model, (label, dense, ids) = build(config, DATA, graphs), next(ROWS["train"].batches(8))
    for _ in range(2):
        model.step(label, dense, ids, 0.1, target=None if teacher is None else label.copy())
        model.predict(dense, ids)
    read = [array.nbytes for replayed in model.graphs.replayed.values() for array in replayed.inputs]
    assert len(read) == 5 + (teacher is not None)
    assert plan(config, DATA, 1)["memory"]["batches of CUDA graphs"] == sum(read)


@needs_simulator
@pytest.mark.parametrize(
    "embedding",
    [
        {"method": "hot", "weights": 300, "block": 4, "online": True},
        {"method": "cafe", "weights": 300},
        {"method": "adaembed", "weights": 300},
    ],
    ids=lambda embedding: embedding["method"],
)
def test_a_plan_counts_no_batches_of_steps_that_are_no_graphs(embedding, monkeypatch):
    """A card refuses to capture a step that asks which rows change hands; the recorder has to be told."""
    monkeypatch.setattr("robe.plan.EVALUATION_BATCH", 8)
    monkeypatch.setitem(METHODS, "sketched", embedding)
    config, (graphs, _) = settings("sketched", "sgd"), recording(monkeypatch)
    model, (label, dense, ids) = build(config, DATA, graphs), next(ROWS["train"].batches(8))
    model.graphs.refused.add("training")
    with np.errstate(divide="ignore"):  # what has not been computed yet is 0, numbers to divide by too
        for _ in range(2):
            model.step(label, dense, ids, 0.1)
            model.predict(dense, ids)
    read = [array.nbytes for replayed in model.graphs.replayed.values() for array in replayed.inputs]
    assert len(read) == 2
    assert plan(config, DATA, 1)["memory"]["batches of CUDA graphs"] == sum(read)


@needs_simulator
@pytest.mark.parametrize("more", ["target", "weight"])
def test_steps_with_a_teacher_or_with_weights_agree_too(more, monkeypatch):
    graphs, plain = recording(monkeypatch)
    models = [build(settings("ROBE", "sgd"), DATA, backend) for backend in (graphs, plain)]
    for step in range(4):
        label, dense, ids = next(ROWS["train"].batches(8, seed=step))
        losses = [m.step(label, dense, ids, 0.1, **{more: label * 0.5 + 0.1}).copy() for m in models]
        np.testing.assert_array_equal(*losses)
    assert [recorder.replays for recorder in Recorder.made] == [3]


@needs_simulator
@pytest.mark.parametrize(("method", "optimizer"), [("ROBE, fp16", "sgd"), ("mixed precision", "adagrad")])
def test_a_run_resumed_in_mid_epoch_ends_as_a_plain_one(method, optimizer, monkeypatch, tmp_path):
    """What is rounded at random depends on the number of the step."""

    def stop(done, *told):
        if done == 5 * config.batch:
            raise KeyboardInterrupt

    config = settings(method, optimizer)
    graphs, plain = recording(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run_of(graphs, config, tmp_path / "graphs", stop)
    assert checkpoint.saved(tmp_path / "graphs")[-1].name == "step_00000003"
    resumed = run_of(graphs, config, tmp_path / "graphs")
    assert resumed == run_of(plain, config, tmp_path / "plain")
    # Five steps and two batches of an evaluation; then seven of each. The first of each is computed plainly.
    assert [recorder.replays for recorder in Recorder.made] == [4, 1, 6, 6]


@needs_simulator
def test_what_cannot_be_captured_says_so_once_and_runs(monkeypatch, tmp_path, capsys):
    class Waits(Recorder):
        def capture(self, function):
            raise ValueError("the host has to wait\nfor something")

    graphs, plain = recording(monkeypatch)
    expected = run_of(plain, settings("ROBE, fp16", "adagrad"), tmp_path / "plain")
    graphs = dataclasses.replace(graphs, graph=Waits)
    assert run_of(graphs, settings("ROBE, fp16", "adagrad"), tmp_path / "graphs") == expected
    assert capsys.readouterr().err.splitlines() == [
        f"{what} runs without a CUDA graph, kernel by kernel: the host has to wait"
        for what in ("training", "inference")
    ]


@needs_simulator
def test_phases_are_those_of_a_plain_step(monkeypatch):
    graphs, _ = recording(monkeypatch)
    model, seen = build(settings("ROBE", "sgd"), DATA, graphs), []
    label, dense, ids = next(ROWS["train"].batches(8))

    def phase(name):
        seen.append(name)
        return nullcontext()

    for _ in range(3):
        model.step(label, dense, ids, 0.1, phase)
    assert seen.count("forward") == seen.count("update") == 3
    assert Recorder.made == []


def test_sizes_that_come_twice_in_a_row_get_a_graph_up_to_some_number(monkeypatch):
    monkeypatch.setattr(robe.graph, "MOST", 2)
    replays, sizes, called = [], [5, 3, 5, 3, 3, 3, 5, 5, 3, 4, 4, 5], []

    class Counted:
        def capture(self, function):
            self.run = function
            return function()

        def replay(self):
            replays.append(self.run())

    backend = SimpleNamespace(graph=Counted, empty=np.empty)
    graphs, given = Graphs(backend), np.arange(5.0)
    for size in sizes:
        called.append(graphs("sum", lambda x: x * 1, given[:size]))
    assert [len(result) for result in called] == sizes
    # The fifth call is captured, as the eighth is; for size 4 there is no room.
    assert [len(result) for result in replays] == [3, 3, 5, 3, 5]
    assert all((result == given[: len(result)]).all() for result in replays)


class Cuda:
    """As cupy.cuda, and tells in order what it was asked."""

    def __init__(self, fails=()):
        self.told, self.fails = [], fails
        self.Stream = partial(Stream, self, 7)
        self.Stream.null = Stream(self, 0)

    def MemoryPool(self):
        return SimpleNamespace(malloc="malloc")

    @contextmanager
    def using_allocator(self, malloc):
        self.tell("allocator on")
        try:
            yield
        finally:
            self.tell("allocator off")

    def tell(self, what):
        self.told.append(what)
        if what in self.fails:
            raise RuntimeError(what)


class Stream:
    def __init__(self, cuda, ptr, non_blocking=False):
        self.cuda, self.ptr, self.own = cuda, ptr, non_blocking

    def __enter__(self):
        self.cuda.tell("stream on")

    def __exit__(self, *error):
        self.cuda.tell("stream off")

    def begin_capture(self):
        self.cuda.tell("begin")

    def end_capture(self):
        self.cuda.tell("end")
        return SimpleNamespace(launch=lambda stream: self.cuda.tell(f"launch on {stream.ptr}"))


APART = ["use 7", "stream on", "allocator on"], ["allocator off", "stream off", "use 0"]


def graph_on(cuda):
    return Graph(cuda, [lambda stream: cuda.told.append(f"use {stream}")])


def test_a_graph_is_captured_apart_and_replayed_where_all_else_runs():
    cuda, (before, after) = Cuda(), APART
    graph = graph_on(cuda)
    assert graph.stream.own
    assert graph.capture(lambda: cuda.tell("work") or "result") == "result"
    graph.replay()
    assert cuda.told == [*before, "begin", "work", "end", *after, "launch on 0"]


@pytest.mark.parametrize("fails", [("work",), ("work", "end"), ("end",)], ids=" and ".join)
def test_a_capture_that_fails_is_ended_and_leaves_all_as_it_was(fails):
    """CUDA complains at the call that it does not allow, at the end of the capture, or at both."""
    cuda, (before, after) = Cuda(fails), APART
    with pytest.raises(RuntimeError, match=fails[0]):
        graph_on(cuda).capture(lambda: cuda.tell("work"))
    assert cuda.told == [*before, "begin", "work", "end", *after]


def test_kernels_follow_the_stream_that_their_thread_was_told(monkeypatch):
    started = []
    kernel = type("Kernel", (), {"__getitem__": lambda _, shape: lambda *_: started.append(shape)})()
    monkeypatch.setattr(launch.cuda, "external_stream", lambda address: f"stream {address}", raising=False)
    try:
        launch.use(7)
        launch.launch(kernel, (5,))
        launch.launch(kernel, (5,), shape=launch.block_shape(3, 32, 100))
        other = Thread(target=launch.launch, args=(kernel, (5,)))
        other.start()
        other.join()
    finally:
        launch.use(0)
    launch.launch(kernel, (5,))
    first, second, elsewhere, last = started
    assert first == (*last, "stream 7", 0)
    assert second[2:] == ("stream 7", 100)
    assert elsewhere == last
    assert len(last) == 2


def test_numbers_are_given_in_the_type_of_the_kernel():
    held = np.array([0.5], np.float32)
    assert typed(held, held.dtype) is held
    assert type(typed(0.1, held.dtype)) is np.float32
    with pytest.raises(TypeError, match="kernel of float64 was given a number of float32"):
        typed(held, np.dtype("float64"))
    assert value_of(held) == value_of(held[0]) == 0.5
