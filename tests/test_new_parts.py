"""What it costs to add a method, an optimizer or an interaction: each is added here, and trained."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from numba.extending import register_jitable

from robe import checkpoint, config, model, optim
from robe.backend import select
from robe.checkpoint import Position
from robe.config import (
    ConfigError,
    DataSpec,
    EmbeddingConfig,
    Method,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    resolve,
)
from robe.convert import convert_embedding
from robe.embeddings.declared import Weights
from robe.embeddings.tables import initial_bounds, tables
from robe.interaction import Interaction
from robe.kernels.parts.hashing import slot_map
from robe.kernels.parts.walks import spans, walk_spans
from robe.model import build
from robe.optim import Rule
from robe.plan import plan

DATA = DataSpec(3, (40, 5, 12), "dictionary", "", "test")
ROWS = 64


def settings(method="full", optimizer="sgd", **embedding):
    return resolve(
        TrainConfig(
            model=ModelConfig(width=8, bottom=(8,), top=(8,)),
            embedding=EmbeddingConfig(method, **embedding),
            optimizer=OptimizerConfig(optimizer, 0.1),
            batch=ROWS,
        )
    )


def trained(chosen, backend=None, steps=30):
    """The model of a configuration, and its mean loss in the first step and the last."""
    made, rng, losses = build(chosen, DATA, backend or select("cpu")), np.random.default_rng(0), []
    dense = rng.random((ROWS, 3), np.float32)
    ids = rng.integers(0, DATA.cardinalities, (ROWS, 3)).astype(np.uint32)
    label = (ids[:, 0] % 2).astype(np.float32)
    for _ in range(steps):
        losses.append(float(made.step(label, dense, ids, 0.1).mean()))
    return made, losses[0], losses[-1]


def assert_planned_and_saved(made, chosen, tmp_path):
    """Its plan is what is there, and a checkpoint holds all that training changes."""
    planned = plan(chosen, DATA, 1)
    for item, size in made.embedding.bytes().items():
        assert planned["memory"][item] == size, item
    state = made.state()
    assert planned["checkpoint"]["weights and optimizer state"] == sum(a.nbytes for a in state.values())
    folder = checkpoint.save(tmp_path, made, chosen, DATA, Position(30))
    loaded = model.DLRM(chosen, DATA, build(chosen, DATA, made.backend).embedding, made.backend)
    checkpoint.load_weights(folder, loaded)
    for name, array in loaded.state().items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)


@pytest.fixture
def paired(monkeypatch):
    """A method in one file: two ids in turn share a row."""
    file = ModuleType("robe.embeddings.paired")

    def declare(chosen, data):
        return {"": Weights(-(-np.array(data.cardinalities) // 2), chosen.model.width)}

    def create(chosen, data, backend, dtype):
        bounds = initial_bounds(chosen, data)
        return tables(
            declare(chosen, data)[""], bounds, chosen, data, backend, dtype, row_of=lambda ids: ids // 2
        )

    file.declare, file.create = declare, create
    monkeypatch.setitem(sys.modules, file.__name__, file)
    monkeypatch.setitem(config.METHODS, "paired", Method("paired", ("init_bound", "memory")))


def test_a_method_is_one_file_and_a_row_of_the_list(paired, tmp_path):
    chosen = settings("paired", "adagrad")
    made, first, last = trained(chosen)
    assert last < first
    assert made.embedding.describe()["embedding_parameters"] == (20 + 3 + 6) * 8
    assert_planned_and_saved(made, chosen, tmp_path)
    coded = build(settings("paired", "none", memory="int8"), DATA, select("cpu"))
    assert convert_embedding(made.embedding, coded.embedding, DATA)["relative_rms_error"] < 0.02
    with pytest.raises(ConfigError, match="--block 8 is not for --method paired"):
        settings("paired", block=8)


def step(gradient, rate, velocity, parameters):
    """Momentum: v <- v / 2 + gradient, x <- x - rate * v."""
    velocity *= np.float32(0.5)
    velocity += gradient
    parameters -= np.float32(rate) * velocity


@register_jitable
def visit(state, b, element, slot, length, bits):
    gradient, rate, velocity, out = state
    for i in range(slot, slot + length):
        if gradient[i] != 0:  # a slot that rows of the batch share is met again, with the gradient 0
            velocity[i] = velocity[i] / 2 + gradient[i]
            out[i] -= rate * velocity[i]
            gradient[i] = 0


step_spans = spans(visit)


def step_touched(ids, base, slot_map, rate, gradient, velocity, out):
    walk_spans(step_spans, ids, base, slot_map, gradient, (gradient, np.float32(rate), velocity, out))


@pytest.fixture
def momentum(monkeypatch):
    """A backend with the two kernels of an optimizer, which is in the lists."""
    monkeypatch.setitem(config.OPTIMIZERS, "momentum", ())
    monkeypatch.setitem(optim.RULES, "momentum", Rule("momentum", "momentum_step", state=("velocity",)))
    backend = select("cpu")
    vars(backend.kernels).update(momentum=step, momentum_step=step_touched)
    return backend


def test_the_walk_steps_each_touched_slot_once(rng):
    ids, base = np.array([[3, 1], [3, 1], [0, 1]], np.uint32), np.array([0, 4], np.uint64)
    where = slot_map("table", 5, 1, 40, signed=False)
    gradient, velocity, out = rng.normal(size=(3, 40)).astype(np.float32)
    touched = np.repeat(np.isin(np.arange(8), [0, 3, 5]), 5)
    gradient[~touched] = 0
    expected, expected_velocity = out.copy(), velocity.copy()
    halved = expected_velocity[touched]
    halved = halved / 2 + gradient[touched]
    expected_velocity[touched], expected[touched] = halved, expected[touched] - np.float32(0.1) * halved
    step_touched(ids, base, where, 0.1, gradient, velocity, out)
    assert not gradient.any()
    np.testing.assert_array_equal(velocity, expected_velocity)
    # A product may be fused with the difference: an ulp.
    np.testing.assert_array_max_ulp(out, expected, 1)


def test_an_optimizer_is_its_kernels_and_a_row_of_each_list(momentum, tmp_path):
    chosen = settings("full", "momentum")
    made, first, last = trained(chosen, momentum)
    assert last < first
    assert {"embedding.velocity", "dense.velocity"} <= made.state().keys()
    assert (made.embedding.velocity != 0).any()
    assert made.embedding.gradient.size == made.embedding.memory.size
    assert made.embedding.accumulator.size == 0
    assert_planned_and_saved(made, chosen, tmp_path)


@pytest.mark.parametrize(
    ("method", "few_bits"), [("robe", {"compression": 2, "memory": "fp16"}), ("mixed_precision", {})]
)
def test_an_optimizer_that_does_not_round_is_refused_where_weights_are_rounded(momentum, method, few_bits):
    with pytest.raises(ConfigError, match=r"--optimizer momentum cannot .* choose of sgd, adagrad$"):
        build(settings(method, "momentum", **few_bits), DATA, momentum)


class Sums(Interaction):
    """The sum of all vectors."""

    width = staticmethod(lambda features, width: width)

    def __init__(self, embedding, rows, backend, dtype="float32"):
        super().__init__(embedding, rows, backend, dtype)
        summed = SimpleNamespace(
            interaction=lambda vectors, out: vectors.sum(axis=1, out=out),
            interaction_backward=lambda d_out, vectors, d_vectors: np.copyto(d_vectors, d_out[:, None]),
        )
        self.kernels, self.fused, self.scatters = summed, None, False


def test_an_interaction_is_one_layer(monkeypatch):
    monkeypatch.setattr(model, "Interaction", Sums)
    made, first, last = trained(settings("full", "adagrad"))
    assert last < first
    assert made.top.parameters[0][0].shape == (8, 8)
    rng = np.random.default_rng(1)
    dense, ids = rng.random((4, 3), np.float32), np.zeros((4, 3), np.uint32)
    kept = made.forward(dense, ids).copy()
    np.testing.assert_array_equal(made.predict(dense, ids), kept)
