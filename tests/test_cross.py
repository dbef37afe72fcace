"""The cross network: TorchRec's formula, gradients by central differences, plans, padding, bf16."""

import dataclasses
import math

import numpy as np
import pytest
from conftest import EVERY, resolved

from robe import checkpoint
from robe.backend import select
from robe.checkpoint import Position
from robe.config import ConfigError, DataSpec
from robe.matmul import rounded
from robe.model import build, parameter_shapes
from robe.plan import plan

B, DATA = 6, DataSpec(3, (7, 3, 11), "dictionary", "", "test")
N = 4 * 4  # vectors of D = 4
KINDS = {
    "cross": {"interaction": "cross", "cross_layers": 2, "cross_rank": 3},
    "none": {"interaction": "none"},
}


def settings(kind="cross", embedding=None, optimizer="sgd", **others):
    return resolved(
        {"width": 4, "bottom": (6,), "top": (5,), **KINDS[kind]},
        {"weights": 29, "block": 2, "init_bound": 0.5} if embedding is None else embedding,
        {"optimizer": optimizer, "lr": 0.1},
        **{"batch": B} | others,
    )


def make(config, name="cpu", dtype="float64"):
    """A model whose biases of the cross network are not 0, so that they are seen."""
    model, rng = build(config, DATA, select(name, config.precision), dtype), np.random.default_rng(5)
    for name, array in model.parameters.items():
        if name.startswith("cross.") and name.endswith("bias"):
            array[...] = rng.standard_normal(array.shape)
    return model


def batch(dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.integers(0, n, B) for n in DATA.cardinalities], axis=1).astype(np.uint32)
    return rng.integers(0, 2, B).astype(dtype), rng.standard_normal((B, 3)).astype(dtype), ids


def published(x, parameters, layers):
    """x_{l+1} = x_0 * (W (V x_l) + b) + x_l on columns (B, N, 1): TorchRec's documentation, its shapes."""
    x_0 = x_l = x[:, :, None]
    for i in range(layers):
        kernel_v, kernel_w = parameters[f"cross.{i}.v"].T, parameters[f"cross.{i}.w"].T
        bias = parameters[f"cross.{i}.bias"][:, None]
        x_l = x_0 * (kernel_w @ (kernel_v @ x_l) + bias) + x_l
    return x_l[:, :, 0]


@pytest.mark.kernels
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("kind", KINDS)
def test_the_top_mlp_reads_what_torchrec_documents(kind, name):
    # float64 sums of 16 products; compiled code for that type serves nothing else here.
    dtype, near = ("float64", 1e-12) if name == "reference" else ("float32", 1e-5)
    model = make(settings(kind), name, dtype)
    _, dense, ids = batch(dtype)
    logits = model.forward(dense, ids).copy()
    read = model.top.activations[0][:, :N].copy()
    vectors = model.interaction.vectors[:B].copy()
    looked_up = np.empty((B, 3, 4), dtype)
    model.embedding.lookup(ids, looked_up)
    np.testing.assert_array_equal(vectors[:, 1:], looked_up)
    layers = 2 if kind == "cross" else 0
    expected = published(vectors.reshape(B, N), model.parameters, layers)
    np.testing.assert_allclose(read, expected, rtol=near, atol=near)
    np.testing.assert_allclose(model.predict(dense, ids), logits, rtol=near, atol=near)
    fewer = model.forward(dense[:2], ids[:2])
    np.testing.assert_allclose(fewer, logits[:2], rtol=near, atol=near)


@pytest.mark.parametrize("embedding", [None, {"method": "full"}, {"method": "none"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_every_parameter(kind, embedding):
    """float64 central differences of the mean loss, for each dense weight and those of the embedding."""
    config = settings(kind, embedding)
    # What all backends share is differentiated here; the kernels have tests of their own.
    model, (label, dense, ids) = make(config, "reference"), batch()
    ids = np.ascontiguousarray(ids[:, : model.embedding.features])

    def loss():
        return float(model.backward(model.forward(dense, ids), label, ids, 0.0).mean())

    loss()
    gradients = {name: gradient.copy() for name, gradient in model.gradients.items()}
    state, memory = model.state(), model.embedding.memory
    for name, gradient in gradients.items():
        found = slopes(loss, state[name])
        # Round-off of the losses (1e-16) over the step (1e-6); no rectifier switches within it.
        np.testing.assert_allclose(gradient.ravel(), found, rtol=1e-6, atol=1e-8, err_msg=name)
        assert gradient.any()
    expected, before = slopes(loss, memory), memory.copy()
    model.backward(model.forward(dense, ids), label, ids, 1.0)  # SGD of rate 1 subtracts the gradient
    np.testing.assert_allclose(before - memory, expected, rtol=1e-6, atol=1e-8)
    assert np.count_nonzero(expected) > 5 or embedding == {"method": "none"}


def slopes(loss, array):
    """d loss / d array, by central differences, (array.size,)."""
    flat, found = array.reshape(-1), np.empty(array.size)
    for i in range(flat.size):
        kept, sides = flat[i], []
        for moved in (1e-6, -1e-6):
            flat[i] = kept + moved
            sides.append(loss())
        flat[i], found[i] = kept, (sides[0] - sides[1]) / 2e-6
    return found


def test_initial_weights_follow_the_law_of_torchrec():
    """Xavier's normal law, gain 1, and biases of 0; those of the MLPs are what they are with the dot."""
    wide = {"interaction": "cross", "cross_layers": 2, "cross_rank": 48}
    config = settings(seed=3)
    model = build(
        dataclasses.replace(config, model=dataclasses.replace(config.model, **wide)), DATA, select("cpu")
    )
    for i in range(2):
        for name, shape in (("v", (N, 48)), ("w", (48, N))):
            weights = model.parameters[f"cross.{i}.{name}"]
            assert weights.shape == shape
            # 768 draws tell their deviation to within 2.6%, three times over.
            assert weights.std() == pytest.approx(math.sqrt(2 / (N + 48)), rel=0.08)
        assert not model.parameters[f"cross.{i}.bias"].any()
    assert not np.array_equal(model.parameters["cross.0.v"], model.parameters["cross.1.v"])
    dot = dataclasses.replace(config, model=resolved({"width": 4, "bottom": (6,), "top": (5,)}).model)
    plain = build(dot, DATA, select("cpu"))
    np.testing.assert_array_equal(plain.parameters["bottom.0.weight"], model.parameters["bottom.0.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_plan_is_what_is_allocated_and_a_checkpoint_holds_it(kind, tmp_path):
    config = settings(kind, optimizer="adagrad")
    model = build(config, DATA, select("cpu"))
    planned, layer = plan(config, DATA, 1), model.interaction
    memory = planned["memory"]
    cross = 2 * (2 * N * 3 + N) if kind == "cross" else 0
    assert sum(map(math.prod, parameter_shapes(config, DATA).values())) == model.dense_parameters.size
    assert memory["dense weights"] == model.dense_parameters.nbytes
    assert model.dense_parameters.size == (4 * 6 + 7 * 4) + (N + 1) * 5 + 6 + cross
    buffers = [layer.vectors, layer.d_vectors, layer.out, model.losses, model.d_logits]
    for mlp in (model.bottom, model.top):
        buffers += [*mlp.products, *mlp.d_inputs, mlp.d_first]
    for each in layer.layers:
        buffers += [each.narrow, each.inner, each.out]
    if kind == "cross":
        buffers += [layer.d_inner, layer.d_narrow]
        buffers = [array for array in buffers if array is not layer.out]  # the last layer writes to it
    assert memory["activations and their gradients"] == sum(array.nbytes for array in buffers)

    model.step(*batch("float32"), 0.1)
    folder = checkpoint.save(tmp_path, model, config, DATA, Position(1, 0, 1))
    other = build(config, DATA, select("cpu"))
    checkpoint.load_weights(folder, other)
    assert planned["checkpoint"]["weights and optimizer state"] == sum(
        array.nbytes for array in model.state().values()
    )
    for name, array in other.state().items():
        np.testing.assert_array_equal(array, model.state()[name], err_msg=name)
    assert checkpoint.read_state(folder)[0] == config


@pytest.mark.kernels
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_backends_change_nothing_that_is_seen(kind, optimizer):
    """Twenty steps; vectors of 5 make rows of 20 numbers, which are padded to 24."""
    config = settings(kind, optimizer=optimizer)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, width=5))
    backends = [select("reference"), dataclasses.replace(select("reference"), multiple=8)]
    backends += [select(name) for name in EVERY if name != "reference"]
    models = [build(config, DATA, backend, "float32") for backend in backends]
    assert models[1].interaction.out.shape[1] == 24
    for step in range(20):
        losses = [model.step(*batch("float32", step), 0.05).mean() for model in models]
        np.testing.assert_allclose(losses, losses[0], rtol=1e-4)
    expected = models[0].state()
    for model in models[1:]:
        for name, array in model.state().items():
            # Twenty steps of a few hundred float32 operations on values of order 1, some in another order.
            np.testing.assert_allclose(array, expected[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_in_bf16_what_products_read_is_rounded():
    """And the sums are not: the result is near that of float32."""
    losses = {}
    for precision in ("fp32", "bf16"):
        model = make(settings(precision=precision), dtype="float32")
        losses[precision] = [float(model.step(*batch("float32", s), 0.05).mean()) for s in range(10)]
    np.testing.assert_allclose(losses["bf16"], losses["fp32"], rtol=0.05)  # 8 bits, ten steps
    assert losses["bf16"] != losses["fp32"]
    layer, whole = model.interaction, lambda array: np.array_equal(rounded(array, 7), array)
    for each in layer.layers:
        assert whole(each.read[:B])
        assert whole(each.narrow[:B])
        assert all(map(whole, each.factors))
        assert not whole(each.inner[:B])
    assert whole(layer.out[:B])
    assert not whole(layer.layers[-1].out[:B])
    assert whole(layer.d_narrow[:B])


def test_options_of_the_cross_network_are_refused_without_it():
    for model in ({"cross_layers": 2}, {"cross_rank": 8, "interaction": "none"}):
        option = "--cross-layers 2" if "cross_layers" in model else "--cross-rank 8"
        with pytest.raises(ConfigError, match=f"^{option} is not for .*; it is for --interaction cross$"):
            resolved(model)
    with pytest.raises(ConfigError, match="--cross-rank must be from 1"):
        resolved({"interaction": "cross", "cross_rank": 0})
