"""The whole model: gradients by central differences, golden losses, the CUDA path against the reference."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import threadpoolctl
from conftest import EVERY, VERSIONS, needs_simulator

from robe import checkpoint
from robe.backend import select, simulator
from robe.checkpoint import Position
from robe.config import DataSpec, EmbeddingConfig, ModelConfig, OptimizerConfig, TrainConfig, resolve
from robe.interaction import gathering_again_pays
from robe.kernels.parts.half import rounding_key
from robe.model import build
from robe.plan import plan
from robe.threads import limit_threads

B, CARDINALITIES = 6, (7, 3, 11)


def make(backend="cpu", dtype="float64", optimizer="sgd", **embedding):
    """A tiny model; D = 4, and a ROBE array small enough that weights are shared a lot."""
    config, data = settings(optimizer, **embedding)
    return build(config, data, select(backend), dtype)


def settings(optimizer="sgd", **embedding):
    if embedding.get("method", "robe") == "robe":
        embedding = {"weights": 29, "init_bound": 0.5} | embedding
    config = resolve(
        TrainConfig(
            model=ModelConfig(width=4, bottom=(6,), top=(5,)),
            embedding=EmbeddingConfig(**embedding),
            optimizer=OptimizerConfig(optimizer, 0.1),
            batch=B,
        )
    )
    dialect = "dictionary" if embedding.get("method") == "full" else "hash"
    return config, DataSpec(3, CARDINALITIES, dialect, "", "test")


def batch(dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, B).astype(dtype)
    dense = rng.standard_normal((B, 3)).astype(dtype)
    ids = np.stack([rng.integers(0, n, B) for n in CARDINALITIES], axis=1).astype(np.uint32)
    return label, dense, ids


KINDS = {
    "full": {"method": "full"},
    "Z < D": {"block": 2},
    "Z = D": {"block": 4},
    "Z > D": {"block": 8},
    "Z does not divide D": {"block": 3},
    "Z < D, unsigned": {"block": 2, "sign": False},
    "Z = D, unsigned": {"block": 4, "sign": False},
    "Z > D, unsigned": {"block": 8, "sign": False},
    "affine": {"block": 2, "hash": "affine", "sign": False},
}


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_every_parameter(kind, name):
    """float64 central differences of the mean loss, for each weight of each layer and the memory."""
    model = make(name, **KINDS[kind])
    label, dense, ids = batch()

    def loss():
        return float(model.backward(model.forward(dense, ids), label, ids, 0.0).mean())

    loss()
    embedding = model.embedding
    d_memory = np.zeros_like(embedding.memory)
    model.backend.kernels.scatter_add(
        model.interaction.d_vectors[:B, 1:], ids, embedding.base, embedding.slot_map, 1, d_memory
    )
    gradients = {name: gradient.copy() for name, gradient in model.gradients.items()}
    gradients["embedding.memory"] = d_memory
    state = model.state()
    for parameter, gradient in gradients.items():
        array, numeric = state[parameter].reshape(-1), np.empty(gradient.size)
        for i in range(array.size):
            kept, step = array[i], 1e-6
            array[i] = kept + step
            above = loss()
            array[i] = kept - step
            numeric[i] = (above - loss()) / (2 * step)
            array[i] = kept
        # Round-off of the losses (1e-16) over the step (1e-6); no rectifier switches within it.
        np.testing.assert_allclose(gradient.ravel(), numeric, rtol=1e-6, atol=1e-8, err_msg=parameter)
    assert np.count_nonzero(d_memory) > 5


@pytest.mark.parametrize("version", EVERY)
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_the_embedding_has_a_rate_of_its_own(optimizer, version):
    """A step at 0.25 with 0.5 for the embedding: the MLPs of a step at 0.25, the embedding of one at 0.5."""
    config, data = settings(optimizer)
    own = dataclasses.replace(config.optimizer, lr=0.25, embedding_lr=0.5)
    apart, slow, fast = (
        build(dataclasses.replace(config, optimizer=chosen), data, select(version), "float32")
        for chosen in (own, config.optimizer, config.optimizer)
    )
    for model, rate in ((apart, 0.25), (slow, 0.25), (fast, 0.5)):
        model.step(*batch("float32"), rate)
    for name, array in apart.state().items():
        expected = (fast if name.startswith("embedding.") else slow).state()[name]
        np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-7, err_msg=name)
    assert not np.allclose(apart.embedding.memory, slow.embedding.memory, atol=1e-4)


@pytest.mark.parametrize("version", ["reference", *VERSIONS])
def test_gradient_of_the_squared_error(version):
    """PyTorch's MSELoss of sigmoids, a loss for each row, and its slopes by float64 central differences."""
    config, data = settings()
    model = build(dataclasses.replace(config, loss="mse"), data, select(version), "float64")
    label, dense, ids = batch()
    logits = model.forward(dense, ids).copy()
    losses = model.backward(model.forward(dense, ids), label, ids, 0.0).copy()
    # The simulator's exponentials meet numbers of float32.
    expected, tolerance = (1 / (1 + np.exp(-logits)) - label) ** 2, 1e-6 if version == "cuda" else 1e-12
    np.testing.assert_allclose(losses, expected, rtol=tolerance)

    def loss():
        return float(model.backward(model.forward(dense, ids), label, ids, 0.0).mean())

    gradients = {name: gradient.copy() for name, gradient in model.gradients.items()}
    for name in ("top.1.bias", "top.0.weight", "bottom.0.weight"):
        array, numeric = model.parameters[name].reshape(-1), np.empty(gradients[name].size)
        for i in range(array.size):
            kept, sides = array[i], []
            for moved in (1e-6, -1e-6):
                array[i] = kept + moved
                sides.append(loss())
            array[i], numeric[i] = kept, (sides[0] - sides[1]) / 2e-6
        np.testing.assert_allclose(gradients[name].ravel(), numeric, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("version", ["reference", *VERSIONS])
def test_gradient_of_what_is_not_dropped(version):
    """float64 central differences of the loss while the same activations are dropped."""
    dropped = {"dropout": 0.4, "bottom_dropout": 0.25, "bottom": (6, 5)}
    config, data = settings()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **dropped))
    model, key = build(config, data, select(version), "float64"), rounding_key(2, 3)
    label, dense, ids = batch()

    def loss():
        return float(model.backward(model.forward(dense, ids, key), label, ids, 0.0).mean())

    undropped = float(model.backward(model.forward(dense, ids), label, ids, 0.0).mean())
    assert abs(loss() - undropped) > 1e-3
    np.testing.assert_allclose(model.predict(dense, ids), model.forward(dense, ids), rtol=1e-12)
    loss()
    gradients = {name: gradient.copy() for name, gradient in model.gradients.items()}
    for name, gradient in gradients.items():
        array, numeric = model.parameters[name].reshape(-1), np.empty(gradient.size)
        for i in range(array.size):
            kept, losses = array[i], []
            for moved in (1e-6, -1e-6):
                array[i] = kept + moved
                losses.append(loss())
            array[i], numeric[i] = kept, (losses[0] - losses[1]) / 2e-6
        np.testing.assert_allclose(gradient.ravel(), numeric, rtol=1e-6, atol=1e-8, err_msg=name)
    assert not gradients["top.0.bias"].all()


def test_gradient_without_categorical_features():
    model = make(method="none")
    label, dense, ids = batch()
    none = ids[:, :0]
    model.backward(model.forward(dense, none), label, none, 0.0)
    weight, gradient = model.parameters["bottom.0.weight"], model.gradients["bottom.0.weight"].copy()
    kept, losses = weight[1, 2], []
    for value in (kept + 1e-6, kept - 1e-6):
        weight[1, 2] = value
        losses.append(float(model.backward(model.forward(dense, none), label, none, 0.0).mean()))
    np.testing.assert_allclose(gradient[1, 2], (losses[0] - losses[1]) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_optimizer_applied_to_the_gradient(kind, optimizer):
    """Whatever is fused, memory and dense weights move as the optimizer says for their gradients."""
    model = make(optimizer=optimizer, **KINDS[kind])
    label, dense, ids = batch()
    for _ in range(2):
        before = {name: array.copy() for name, array in model.state().items()}
        model.backward(model.forward(dense, ids), label, ids, 0.0)
        embedding = model.embedding
        d_memory = np.zeros_like(embedding.memory)
        rows = (ids, embedding.base, embedding.slot_map)
        model.backend.kernels.scatter_add(model.interaction.d_vectors[:B, 1:], *rows, 1, d_memory)
        for name, array in model.state().items():
            array[...] = before[name]  # what Adagrad has summed up, even at a rate of 0
        model.step(label, dense, ids, 0.1)
        after = model.state()
        for name, gradient in {"embedding.memory": d_memory, **model.gradients}.items():
            move = 0.1 * gradient
            if optimizer == "adagrad":
                state = "embedding.accumulator" if name == "embedding.memory" else "dense.accumulator"
                squares = before[state]
                if state == "dense.accumulator":
                    offset = before_offset(model, name)
                    squares = squares[offset : offset + gradient.size].reshape(gradient.shape)
                move = move / (np.sqrt(squares + gradient**2) + 1e-8)
            # float64 sums in another order.
            np.testing.assert_allclose(after[name], before[name] - move, rtol=1e-9, atol=1e-12)


def stepped(optimizer, t, w, g, kept):
    """Weights after step t = 1, 2, ... of torch.optim's formulas; what is kept changes in place.

    Weight decay is that of AdamW; L2 is in the gradient g.
    """
    w = w - optimizer.lr * optimizer.weight_decay * w
    if optimizer.optimizer == "sgd":
        return w - optimizer.lr * g
    if optimizer.optimizer == "adagrad":
        kept["accumulator"] += g**2
        return w - optimizer.lr * g / (np.sqrt(kept["accumulator"]) + optimizer.eps)
    if optimizer.optimizer == "momentum":
        kept["velocity"][...] = optimizer.momentum * kept["velocity"] + g
        return w - optimizer.lr * kept["velocity"]
    kept["mean"][...] = optimizer.beta1 * kept["mean"] + (1 - optimizer.beta1) * g
    kept["square"][...] = optimizer.beta2 * kept["square"] + (1 - optimizer.beta2) * g**2
    mean, square = kept["mean"] / (1 - optimizer.beta1**t), kept["square"] / (1 - optimizer.beta2**t)
    return w - optimizer.lr * mean / (np.sqrt(square) + optimizer.eps)


def flat(arrays):
    """The dense parameters or gradients, without what is between them."""
    return np.concatenate([array.ravel() for array in arrays.values()])


DECAYS = {"weight_decay": 0.3, "l2": 0.2, "embedding_l2": 0.4}


@pytest.mark.parametrize(
    "chosen",
    [
        {"optimizer": "adam"},
        {"optimizer": "adam", "beta1": 0.5, "beta2": 0.75, "eps": 0.01, **DECAYS},
        {"optimizer": "adagrad", "eps": 0.01, **DECAYS},
        {"optimizer": "sgd", **DECAYS},
        {"optimizer": "momentum", "momentum": 0.75, **DECAYS},
    ],
    ids=lambda chosen: " ".join(map(str, chosen.values())),
)
@pytest.mark.parametrize("version", ["reference", *VERSIONS])
def test_steps_are_those_of_the_published_formulas(chosen, version):
    """The MLPs' weights all step; of the embedding those that the batch reads, each once."""
    config, data = settings()
    optimizer = OptimizerConfig(lr=0.1, **chosen)
    model = build(dataclasses.replace(config, optimizer=optimizer), data, select(version), "float64")
    embedding, (label, dense, ids) = model.embedding, batch()
    for t in (1, 2, 3):
        # Other rows at each step, so that weights are read in some steps only.
        ids = (ids + np.arange(3, dtype=np.uint32)) % np.uint32(3)
        before = {name: array.copy() for name, array in model.state().items()}
        model.backward(model.forward(dense, ids), label, ids, 0.0)
        d_memory = np.zeros_like(embedding.memory)
        rows = ids, embedding.base, embedding.slot_map
        d_vectors = model.interaction.d_vectors[:B, 1:]
        model.backend.kernels.scatter_add(d_vectors, *rows, 1, d_memory)
        gradient = flat(model.gradients)
        for name, array in model.state().items():
            array[...] = before[name]
        embedding.steps = t - 1
        parameters = flat(model.parameters)
        model.step(label, dense, ids, 0.1)
        touched = d_memory != 0
        assert t == 1 or 0 < touched.sum() < touched.size
        for part, w, g, l2 in (
            ("dense", parameters, gradient, optimizer.l2),
            ("embedding", before["embedding.memory"], d_memory, optimizer.embedding_l2),
        ):
            where = touched if part == "embedding" else slice(None)
            own = [name for name in before if name.startswith(f"{part}.") and name != "embedding.memory"]
            kept = {name.split(".")[1]: before[name][where] for name in own}
            expected = w.copy()
            expected[where] = stepped(optimizer, t, w[where], g[where] + l2 * w[where], kept)
            found = flat(model.parameters) if part == "dense" else embedding.memory
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
            for name in own:
                now = before[name].copy()
                now[where] = kept[name.split(".")[1]]
                np.testing.assert_allclose(model.state()[name], now, rtol=1e-9, atol=1e-15, err_msg=name)


@pytest.mark.kernels
@pytest.mark.parametrize("version", EVERY)
@pytest.mark.parametrize(
    ("embedding", "size"), [({"method": "full"}, 4), ({"weights": 150, "block": 2}, 64)], ids=["full", "robe"]
)
def test_row_wise_adagrad_has_one_sum_for_a_row_and_the_mlps_have_their_own(embedding, size, version):
    """Three steps: the embedding by FBGEMM's formula, the MLPs as with --optimizer adagrad; as planned."""
    config, data = settings("rowwise_adagrad", **embedding)
    model, plain = (build(c, data, select(version)) for c in (config, settings("adagrad", **embedding)[0]))
    memory, sums = model.embedding.memory, np.zeros(-(-model.embedding.memory.size // size))
    planned = plan(config, data, 1)
    assert model.embedding.accumulator.shape == sums.shape
    assert planned["memory"]["embedding optimizer state"] == 4 * sums.size
    assert planned["checkpoint"]["weights and optimizer state"] == sum(
        array.nbytes for array in model.state().values()
    )
    for seed in range(3):
        label, dense, ids = batch("float32", seed)
        for name, array in model.state().items():
            if name != "embedding.accumulator":
                plain.state()[name][...] = array
        before, expected = memory.astype(float), memory.astype(float)
        plain.step(label, dense, ids, 0.1)
        model.step(label, dense, ids, 0.1)
        gradient, d_vectors = np.zeros(memory.size, np.float32), model.interaction.d_vectors[:B, 1:]
        rows = ids, model.embedding.base, model.embedding.slot_map
        model.backend.kernels.scatter_add(d_vectors, *rows, 1, gradient)
        for group in range(sums.size):
            g = gradient[group * size : (group + 1) * size].astype(float)
            sums[group] += (g**2).sum() / size
            expected[group * size : (group + 1) * size] -= 0.1 * g / (np.sqrt(sums[group]) + 1e-8)
        assert (memory != before).any()
        # float32 sums of a few gradients, in the simulator in any order; a step is at most 0.1 sqrt(size).
        np.testing.assert_allclose(memory, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model.embedding.accumulator, sums, rtol=1e-4, atol=1e-9)
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if version == "cuda" else {"rtol": 0, "atol": 0}
        np.testing.assert_allclose(flat(model.parameters), flat(plain.parameters), **tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_gradient_is_shortened_to_a_length(dtype):
    """One that is shorter keeps its bits, and so does the step of the embedding."""
    (config, data), moved = settings(), {}
    for clip_norm in (None, 0.01, 1e6):
        optimizer = dataclasses.replace(config.optimizer, clip_norm=clip_norm)
        model = build(dataclasses.replace(config, optimizer=optimizer), data, select("reference"), dtype)
        before = model.dense_parameters.copy()
        model.step(*batch(dtype), 0.5)
        assert model.dense_gradient.dtype == dtype
        moved[clip_norm] = model.dense_parameters - before, model.embedding.memory
    for free, clipped, longest in zip(moved[None], moved[0.01], moved[1e6], strict=True):
        np.testing.assert_array_equal(free, longest)
        if clipped is moved[0.01][1]:
            np.testing.assert_array_equal(free, clipped)
    whole, shortened = moved[None][0], moved[0.01][0]
    assert np.linalg.norm(shortened) == pytest.approx(0.5 * 0.01, rel=1e-3)
    np.testing.assert_allclose(shortened / 0.005, whole / np.linalg.norm(whole), atol=1e-4)


def before_offset(model, name):
    """Where a dense parameter starts in the flat array."""
    names = list(model.parameters)
    return sum(model.parameters[n].size for n in names[: names.index(name)])


GOLDEN_LOSSES = {
    "full": [
        0.683636625951,
        0.760397618203,
        0.648420735937,
        0.649129483461,
        0.740056270837,
        0.69453697807,
        0.663699265827,
        0.492136226432,
        1.096033721307,
        0.73198826486,
    ],
    "Z < D": [
        0.715122565411,
        0.709742275016,
        0.681006642492,
        0.678277813288,
        0.818424654012,
        0.719861918613,
        0.694722210429,
        0.738358893042,
        0.647419861734,
        0.640399050958,
    ],
}


@pytest.mark.parametrize("kind", GOLDEN_LOSSES)
def test_golden_losses(kind):
    """Ten Adagrad steps in float64, computed once: initial law, hash, forward, backward and update."""
    model = make("reference", optimizer="adagrad", **KINDS[kind])
    losses = [float(model.step(*batch(seed=step), 0.1).mean()) for step in range(10)]
    # BLAS may sum in another order on another machine.
    np.testing.assert_allclose(losses, GOLDEN_LOSSES[kind], rtol=1e-9)


@pytest.mark.kernels
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize("kind", ["full", "Z < D", "Z > D", "affine"])
def test_training_is_the_same_on_every_backend(kind, optimizer, version):
    """Five float32 steps: loss and all weights as the reference's, within float32 rounding."""
    models = [make(name, "float32", optimizer, **KINDS[kind]) for name in ("reference", version)]
    for step in range(5):
        losses = [model.step(*batch("float32", step), 0.05).mean() for model in models]
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    for name, array in models[0].state().items():
        # Five steps of a few hundred float32 operations on values of order 1.
        np.testing.assert_allclose(models[1].state()[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.kernels
@pytest.mark.parametrize("version", EVERY)
def test_a_target_is_learned_and_the_losses_are_those_of_the_labels(version):
    """Against steps whose labels are the targets, and whose losses are not asked."""
    taught, plain, soft = (make(version, "float32", "adagrad", block=2) for _ in range(3))
    for step in range(3):
        label, dense, ids = batch("float32", step)
        target = np.random.default_rng(step).random(len(label), np.float32)
        for name, array in taught.state().items():
            plain.state()[name][...] = array
        expected = plain.step(label, dense, ids, 0.05).copy()
        losses = taught.step(label, dense, ids, 0.05, target=target.copy())
        np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
        soft.step(target, dense, ids, 0.05)
    for name, array in taught.state().items():
        # In the simulator threads add in any order.
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if version == "cuda" else {"rtol": 0}
        np.testing.assert_allclose(array, soft.state()[name], **tolerance, err_msg=name)


def padded(optimizer):
    """A model whose layers read 8 columns each (3 numbers, 10 of the interaction) and its configuration."""
    config, data = settings(optimizer, block=2)
    backend = dataclasses.replace(select("reference"), multiple=8)
    return build(config, data, backend, "float32"), config, data


def zeros_behind(model):
    """What lies behind the parameters of the first layer of each MLP in the flat array, and its gradient."""
    for mlp, part in ((model.bottom, "bottom"), (model.top, "top")):
        rows = len(model.parameters[f"{part}.0.weight"])
        for matrix in (mlp.parameters[0][0], mlp.gradients[0][0]):
            assert len(matrix) == -(-rows // 8) * 8 > rows
            yield matrix[rows:]


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_padding_changes_nothing_that_is_seen(optimizer):
    """Twenty steps: weights beside the padding stay exactly 0, the others are those of a model without it."""
    (model, *_), plain = padded(optimizer), make("reference", "float32", optimizer, block=2)
    for step in range(20):
        losses = [each.step(*batch("float32", step), 0.05).mean() for each in (model, plain)]
        np.testing.assert_allclose(*losses, rtol=1e-5)
    for zeros in zeros_behind(model):
        assert zeros.size
        assert (zeros == 0).all()
    # Twenty steps of a few hundred float32 operations on values of order 1, some in another order.
    for (name, found), (other, expected) in zip(model.state().items(), plain.state().items(), strict=True):
        assert (name, found.shape) == (other, expected.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=name)
    _, dense, ids = batch("float32")
    np.testing.assert_allclose(model.predict(dense, ids), plain.predict(dense, ids), rtol=1e-4, atol=1e-5)


def test_a_padded_layer_reads_zeros_whatever_batch_came_before():
    model, *_ = padded("sgd")
    for rows in (B, 2, B):
        label, dense, ids = (part[:rows] for part in batch("float32"))
        model.step(label, dense, ids, 0.1)
        for mlp, columns in ((model.bottom, 3), (model.top, 10)):
            assert mlp.activations[0].shape == (rows, -(-columns // 8) * 8)
            assert (mlp.activations[0][:, columns:] == 0).all()


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize("pads", [True, False])
def test_checkpoints_with_and_without_padding_load_in_each_other(pads, optimizer, tmp_path):
    model, config, data = padded(optimizer)
    other = make("reference", "float32", optimizer, block=2)
    if not pads:
        model, other = other, model
    model.step(*batch("float32"), 0.05)
    saved = checkpoint.save(tmp_path, model, config, data, Position(1, 0, 1))
    checkpoint.load_weights(saved, other)
    for (name, found), (_, expected) in zip(other.state().items(), model.state().items(), strict=True):
        np.testing.assert_array_equal(found, expected, err_msg=name)
    again = checkpoint.save(tmp_path / "again", other, config, data, Position(1, 0, 1))
    assert (again / "weights.safetensors").read_bytes() == (saved / "weights.safetensors").read_bytes()
    if not pads:
        assert all((zeros == 0).all() for zeros in zeros_behind(other))


@pytest.mark.kernels
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_halves_are_the_same_on_every_backend(optimizer, version):
    """Five steps. Few of the sums differ, in float32's last bit, and by it seldom which half is next."""
    models = [make(name, "float32", optimizer, block=2, memory="fp16") for name in ("reference", version)]
    for step in range(5):
        losses = [model.step(*batch("float32", step), 0.05).mean() for model in models]
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    expected, found = (model.embedding.memory.astype(float) for model in models)
    # Weights are below 1, where halves are 2^-11 apart.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-11)
    assert (found == expected).mean() > 0.8
    _, dense, ids = batch("float32")
    # Sums of at most 30 products of order 1, perhaps in another order.
    logits = models[1].forward(dense, ids).copy()
    np.testing.assert_allclose(models[1].predict(dense, ids), logits, rtol=1e-5, atol=1e-6)


@pytest.mark.kernels
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("optimizer", "memory", "fused"),
    [("sgd", "fp32", True), ("sgd", "fp16", False), ("adagrad", "fp32", False)],
)
def test_gradients_of_vectors_are_written_only_where_they_must_be(optimizer, memory, fused, version):
    """A GPU adds them to the weights at once, unless their sums are needed first."""
    model = make(version, "float32", optimizer, block=2, memory=memory)
    model.interaction.d_vectors[:] = np.nan
    model.step(*batch("float32"), 0.1)
    written = np.isfinite(model.interaction.d_vectors[:B])
    assert written[:, 0].all()
    assert (written[:, 1:] != (fused and version == "cuda")).all()
    assert model.embedding.steps == 1


@needs_simulator
@pytest.mark.kernels
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        *(
            (optimizer, kind)
            for optimizer in ("sgd", "adagrad")
            for kind in ({"block": 2}, {"method": "full"})
        ),
        ("sgd", {"memory": "fp16"}),
        ("adagrad", {"memory": "fp16"}),
    ],
)
def test_steps_that_gather_again_are_those_that_keep_the_vectors(optimizer, options, monkeypatch):
    """Batches of two sizes, with weights that many rows share."""
    models = []
    for pays in (False, True):
        monkeypatch.setattr("robe.interaction.gathering_again_pays", lambda *sizes, pays=pays: pays)
        models.append(make("cuda", "float32", optimizer, **options))
    kept, again = (model.interaction for model in models)
    assert (kept.vectors.shape[1], again.vectors.shape[1], again.d_vectors.shape[1]) == (4, 1, 1)
    for seed, rows in enumerate((B, B, 2, B)):
        arrays = [array[:rows] for array in batch("float32", seed)]
        losses = [model.step(*arrays, 0.1).copy() for model in models]
        np.testing.assert_allclose(*losses, rtol=1e-4, atol=1e-6)
        assert not models[1].embedding.gradient.any()
    assert models[1].embedding.steps == 4
    # A sum that is off by its last bit may turn the rounding of a half, by 2^-11 of a weight below 1.
    tolerance = 1e-3 if options.get("memory") == "fp16" else 1e-5
    for (name, array), other in zip(models[0].state().items(), models[1].state().values(), strict=True):
        np.testing.assert_allclose(other, array, rtol=tolerance, atol=tolerance, err_msg=name)


MLPERF = {"features": 26, "width": 128, "block": 32, "itemsize": 4}


@pytest.mark.parametrize(
    ("rows", "megabytes", "adds", "pays"),
    [
        # By hand, in MB. Vectors 872, of which the cache has 50; 6.8 million blocks take 1,063 of sectors.
        (65536, 10, True, True),  # 3 * 822 against a pass of 40
        (65536, 100, True, True),  # 3 * 822 + 2 * 532 against 3 * 797 + 400
        (65536, 500, True, False),  # 3 * 822 + 2 * 957 against 3 * 1010 + 2000
        (16384, 100, True, False),  # 3 * 168 + 2 * 133 against 3 * 199 + 400
        (16384, 100, False, True),  # 5 * 168 + 2 * 133 against 3 * 199
        (2048, 10, True, False),  # the cache has all vectors
        (2048, 10, False, False),
    ],
)
def test_vectors_are_gathered_again_where_that_moves_fewer_bytes(rows, megabytes, adds, pays):
    weights = megabytes * 250_000
    assert gathering_again_pays(rows=rows, weights=weights, adds=adds, **MLPERF) == pays
    assert not gathering_again_pays(rows=rows, weights=0, adds=adds, **MLPERF | {"features": 0})
    # Pieces of one element, 26 * 128 of them, would take 53 KB.
    assert not gathering_again_pays(rows=rows, weights=weights, adds=adds, **MLPERF | {"block": 1})


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("name", "changes", "again"),
    [
        ("cuda", {}, True),
        ("cuda", {"method": "full"}, True),
        ("cuda", {"method": "compositional", "chunks": 2, "compression": 2}, False),
        ("cuda", {"memory": "int8"}, False),
        ("cpu", {}, False),
        ("reference", {}, False),
    ],
)
def test_who_may_gather_again(name, changes, again, monkeypatch):
    """A GPU, one look-up of weights that are trained, and no order of additions to be kept."""
    if name not in EVERY:
        pytest.skip(f"{name} is tested {'without' if simulator() else 'in'} the simulator")
    monkeypatch.setattr("robe.interaction.gathering_again_pays", lambda *sizes: True)
    optimizer = "none" if "memory" in changes else "sgd"
    config, data = settings(optimizer, **changes)
    for deterministic in (False, True):
        layer = build(config, data, select(name, deterministic=deterministic)).interaction
        assert bool(layer.again) == (again and not deterministic)
        assert layer.vectors.shape[1] == 1 + (0 if layer.again else layer.embedding.features)


@pytest.mark.kernels
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("kind", KINDS)
def test_predict_is_forward(kind, name):
    """Inference, which keeps no vectors, gives the logits that training sees."""
    model = make(name, **KINDS[kind])
    _, dense, ids = batch()
    expected = model.forward(dense, ids).copy()
    model.interaction.vectors[:] = np.nan
    # float64; sums of at most 30 products of order 1, perhaps in another order.
    np.testing.assert_allclose(model.predict(dense, ids), expected, rtol=1e-12, atol=1e-14)


def test_a_step_makes_no_arrays(monkeypatch):
    """What a step calls of the array module writes to arrays that are there; products are the backend's."""
    model, called = make(), []

    class Arrays:
        def __getattr__(self, name):
            def call(*arguments, out, **options):
                called.append(name)
                return getattr(np, name)(*arguments, out=out, **options)

            return call

    # The record is frozen, but one and the same for the whole model.
    monkeypatch.setitem(vars(model.backend), "xp", Arrays())
    model.step(*batch(), 0.1)
    assert called == ["add", "sum"]


def blas_adds_alike():
    """Whether one product of float32 has the same bytes on one thread of BLAS and on two.

    OpenBLAS's kernels for AVX-512 do; those for AVX2 choose how to round by where a thread's rows end.
    """
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((600, 512), np.float32), rng.standard_normal((512, 256), np.float32)
    products = []
    for threads in (1, 2):
        with threadpoolctl.threadpool_limits(threads, "blas"):
            products.append(a @ b)
    return np.array_equal(*products)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_bytes_do_not_depend_on_the_number_of_threads(optimizer):
    """50 steps whose products are worth a second thread, with Numba and BLAS at one thread and at two.

    Where BLAS itself rounds otherwise on two threads, it is held at one, and the kernels alone are compared.
    """
    config = resolve(
        TrainConfig(
            model=ModelConfig(width=16, bottom=(64,), top=(512, 256)),
            embedding=EmbeddingConfig(weights=5000),
            optimizer=OptimizerConfig(optimizer, 0.05),
            batch=600,
        )
    )
    data = DataSpec(13, (1000,) * 26, "hash", "", "test")
    states, alike = [], blas_adds_alike()

    def limit(flops):
        limit_threads(flops)
        if not alike:
            threadpoolctl.threadpool_limits(1, "blas")

    for flops in (0, 1e12):  # what the largest product is said to be: worth one thread, or all
        said = partial(limit, flops)
        backend = dataclasses.replace(select("cpu"), limit_threads=lambda _, said=said: said())
        model, rng = build(config, data, backend), np.random.default_rng(0)
        for _ in range(50):
            label, dense = rng.integers(0, 2, 600).astype(np.float32), rng.random((600, 13), np.float32)
            model.step(label, dense, rng.integers(0, 1000, (600, 26)).astype(np.uint32), 0.05)
        states.append({name: array.tobytes() for name, array in model.state().items()})
    assert states[0] == states[1]


def test_a_short_batch_uses_the_front_of_the_buffers():
    whole, part = make(), make()
    _, dense, ids = batch()
    np.testing.assert_allclose(part.forward(dense[:2], ids[:2]), whole.forward(dense, ids)[:2], rtol=1e-12)


def test_published_weights_give_published_vectors():
    """The published code's index formula (apd10/robez), written out, on the same array."""
    cardinalities, width, block = CARDINALITIES, 4, 2
    model = make("cpu", block=block, hash="affine", sign=False, weights=101, hash_seed=1024)
    data = DataSpec(3, cardinalities, "dictionary", "", "test")
    config = dataclasses.replace(
        resolve(TrainConfig(model=ModelConfig(width=width))),
        embedding=EmbeddingConfig(block=block, hash="affine", sign=False, weights=101, hash_seed=1024),
    )
    model = build(config, data, select("cpu"))
    r = np.concatenate([[2038074743], np.random.RandomState(1024).randint(0, 2038074743, 50)])
    ids = batch()[2]
    out = np.empty((B, 3, width), np.float32)
    model.embedding.lookup(ids, out)
    for b in range(B):
        for f in range(3):
            token = int(ids[b, f]) + sum(cardinalities[:f])
            for i in range(width):
                start = (
                    (token * int(r[3]) + i // block * int(r[2]) + int(r[1])) % int(r[0]) % (101 - block + 1)
                )
                assert out[b, f, i] == model.embedding.memory[start + i % block]
