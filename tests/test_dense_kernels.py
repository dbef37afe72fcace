"""Interaction, bias + ReLU, loss and optimizer steps: every version against the formula."""

import numpy as np
import pytest
from conftest import each_version, needs_simulator

from robe.kernels import bias_relu, gather_interaction, interaction, interaction_scatter
from robe.kernels.operations import version
from robe.kernels.parts.half import rounding_key
from robe.kernels.parts.vector import load4
from robe.kernels.workbench.cases import CASES, calls

pytestmark = pytest.mark.kernels

# Sums of up to 128 float32 products of standard normals, reordered: a few hundred ulp of a value near 1.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
SHAPES = [(4, 5, 16), (3, 27, 8), (5, 1, 16), (0, 4, 8), (2, 2, 1), (3, 4, 128)]
RECTIFIED = [(5, 3), (7, 64), (4, 130), (0, 8), (1, 1), (70, 3), (64, 2)]


def pairs_oracle(vectors):
    """The interaction as a double loop in float64."""
    rows = []
    for v in vectors.astype(np.float64):
        rows.append([*v[0], *(v[i] @ v[j] for i in range(len(v)) for j in range(i))])
    n, width = vectors.shape[1:]
    return np.array(rows).reshape(len(vectors), width + n * (n - 1) // 2)


@each_version("interaction")
@pytest.mark.parametrize("shape", SHAPES)
def test_interaction(shape, run, rng):
    vectors = rng.standard_normal(shape).astype(np.float32)
    expected = pairs_oracle(vectors)
    out = np.full(expected.shape, np.nan, np.float32)
    run(vectors, out)
    np.testing.assert_allclose(out, expected, **TOLERANCE)


@each_version("interaction_backward")
@pytest.mark.parametrize("shape", SHAPES)
def test_interaction_backward_is_the_derivative(shape, run, rng):
    """<d_out, J v> = <d_vectors, v>, with J v by central differences, exact for a quadratic."""
    vectors, direction = rng.standard_normal((2, *shape))
    plus, minus = pairs_oracle(vectors + direction), pairs_oracle(vectors - direction)
    d_out = rng.standard_normal(plus.shape)
    expected = (d_out * (plus - minus)).sum() / 2
    d_vectors = np.full(shape, np.nan)
    run(d_out, vectors, d_vectors)
    # float64: round-off of some thousand terms.
    np.testing.assert_allclose((d_vectors * direction).sum(), expected, rtol=1e-10, atol=1e-10)


@needs_simulator
@pytest.mark.parametrize(
    "operation",
    [
        *("interaction", "interaction_backward", "gather_interaction", "interaction_scatter"),
        "gather_interaction_backward",
    ],
)
def test_vectors_too_large_for_shared_memory(operation, monkeypatch):
    def not_this_one(*arguments):
        raise AssertionError("the kernel with shared memory was started")

    for module, kernel in (
        (interaction, "_interaction_kernel"),
        (interaction, "_interaction_backward_kernel"),
        (gather_interaction, "_gather_interaction_kernel"),
        (interaction_scatter, "_interaction_scatter_kernel"),
        (interaction_scatter, "_gather_interaction_backward_kernel"),
    ):
        monkeypatch.setattr(module, kernel, {"forbidden": not_this_one})
    monkeypatch.setattr(interaction, "SHARED", 100)
    call = calls(CASES[1])[operation]
    expected, found = call.copy(), call.copy()
    version(operation, "reference")(*expected.values())
    version(operation, "cuda")(*found.values())
    for output in call.outputs:
        np.testing.assert_allclose(found[output], expected[output], **TOLERANCE)


@needs_simulator
@pytest.mark.parametrize("operation", ["interaction", "interaction_backward", "interaction_scatter"])
@pytest.mark.parametrize("width", [4, 16, 20])
def test_vectors_are_read_four_floats_at_once_where_they_may_be(width, operation, monkeypatch):
    """The same vectors 4 bytes behind a multiple of 16, and read one by one, give the same bits."""
    case = CASES[3]._replace(width=width, features=4, rows=3)
    call, read, found = calls(case)[operation], [], []

    def counted(vectors, b, i, d):
        read.append((int(b), int(i), int(d)))
        return load4(vectors, b, i, d)

    monkeypatch.setattr(interaction, "load4", counted)
    vectors = call.arguments["vectors"]
    places = {(b, i, d) for b in range(3) for i in range(5) for d in range(0, width, 4)}
    for behind, expected in ((0, places), (1, set())):
        flat = np.full(8 + vectors.size, np.nan, np.float32)
        start = -flat.ctypes.data % 16 // 4 + behind
        moved = flat[start : start + vectors.size].reshape(vectors.shape)
        moved[...] = vectors
        arguments = call.copy() | {"vectors": moved}
        # Sums of small integers do not tell the order of atomic additions.
        if operation == "interaction_scatter":
            moved[...], arguments["scale"] = np.rint(vectors), 1
            arguments["d_out"], arguments["out"] = np.rint(arguments["d_out"]), np.rint(arguments["out"])
        read.clear()
        version(operation, "cuda")(*arguments.values())
        assert set(read) == expected
        found.append([arguments[output].tobytes() for output in call.outputs])
    assert found[0] == found[1]


@pytest.mark.parametrize("shape", RECTIFIED)
def test_bias_relu(shape, backend, reference, rng):
    """Small integers, so that sums are exact; in place."""
    x = rng.integers(-3, 4, shape).astype(np.float32)
    bias = rng.integers(-3, 4, shape[1]).astype(np.float32)
    for kernels in (reference.kernels, backend.kernels):
        out = x.copy()
        kernels.bias_relu(out, bias, out)
        np.testing.assert_array_equal(out, np.where(x + bias > 0, x + bias, 0))


@each_version("bias_relu_backward")
@pytest.mark.parametrize("shape", RECTIFIED)
def test_bias_relu_backward(shape, run, rng):
    """Small integers, so that sums over the batch are exact."""
    out = np.maximum(rng.integers(-3, 4, shape), 0).astype(np.float32)
    d = rng.integers(-3, 4, shape).astype(np.float32)
    expected, d_bias = np.where(out > 0, d, 0), np.full(shape[1], np.nan, np.float32)
    run(out, d, d_bias)
    np.testing.assert_array_equal(d, expected)
    np.testing.assert_array_equal(d_bias, expected.sum(axis=0))


@needs_simulator
def test_sums_of_many_rows_are_added_up_in_passes(monkeypatch, rng):
    """50 rows, 2 at a time: 25, 13, 7, 4 sums, and these at last. Small integers, so that sums are exact."""
    monkeypatch.setattr(bias_relu, "ROWS", 2)
    d = rng.integers(-3, 4, (50, 3)).astype(np.float32)
    expected, d_bias = d.sum(axis=0), np.full(3, np.nan, np.float32)
    bias_relu.bias_relu_backward_cuda(np.ones_like(d), d, d_bias)
    np.testing.assert_array_equal(d_bias, expected)


def test_bias_relu_lets_nan_through(backend, reference):
    for kernels in (reference.kernels, backend.kernels):
        out = np.array([[np.nan, -np.inf, 1.0]], np.float32)
        kernels.bias_relu(out, np.zeros(3, np.float32), out)
        np.testing.assert_array_equal(out, [[np.nan, 0, 1]])


def test_binary_cross_entropy(backend, reference):
    logits = np.array([0, 1, -1, 30, -30, 200, -200, 0.5], np.float32)
    label = np.array([1, 0, 1, 1, 0, 0, 1, 1], np.float32)
    x = logits.astype(np.longdouble)
    probability = 1 / (1 + np.exp(-x))
    expected_loss = np.where(label == 1, np.log1p(np.exp(-x)), np.log1p(np.exp(x)))
    expected_gradient = (probability - label) / len(x)
    for kernels in (reference.kernels, backend.kernels):
        loss, d_logits = np.full((2, len(x)), np.nan, np.float32)
        kernels.binary_cross_entropy(logits, label, loss, d_logits)
        # float32 with a handful of roundings; 30: the loss there is 1e-13.
        np.testing.assert_allclose(loss, expected_loss.astype(float), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(d_logits, expected_gradient.astype(float), rtol=1e-6, atol=1e-8)


def test_binary_cross_entropy_of_nan_is_nan(backend, reference):
    for kernels in (reference.kernels, backend.kernels):
        loss, d_logits = np.zeros((2, 1), np.float32)
        kernels.binary_cross_entropy(np.array([np.nan], np.float32), np.zeros(1, np.float32), loss, d_logits)
        assert np.isnan(loss[0])
        assert np.isnan(d_logits[0])


@pytest.mark.parametrize("share", [0.0, 0.2, 0.99])
def test_dropout(share, backend, reference):
    """Its share within 5 standard deviations; another key, or layer, drops others."""
    made = []
    for kernels in (reference.kernels, backend.kernels):
        for step, first in ((1, 0), (2, 0), (1, 2**40), (1, 100)):
            out = np.ones(4000, np.float32)
            kernels.dropout(share, rounding_key(3, step), first, out)
            made.append(out)
            assert set(np.unique(out)) <= {0, np.float32(1 / (1 - share))}
            deviation = np.sqrt(share * (1 - share) / 4000)
            assert abs((out == 0).mean() - share) <= 5 * deviation
    np.testing.assert_array_equal(made[:4], made[4:])
    np.testing.assert_array_equal(made[0][100:], made[3][:-100])
    if share:
        assert len({out.tobytes() for out in made[:4]}) == 4


def test_sgd_and_adagrad(backend, reference, rng):
    gradient, start = rng.standard_normal((2, 70)).astype(np.float32)
    gradient[:3] = 0
    for kernels in (reference.kernels, backend.kernels):
        parameters = start.copy()
        kernels.sgd(gradient, 0.5, parameters)
        # A product and a difference: one may be fused into the other.
        np.testing.assert_array_max_ulp(parameters, start - np.float32(0.5) * gradient, 2)

        # An eps so large that it shows where it is added.
        parameters, accumulator = start.copy(), np.full(70, 0.25, np.float32)
        kernels.adagrad(gradient, 0.5, 0.125, accumulator, parameters)
        total = 0.25 + gradient.astype(np.float64) ** 2
        np.testing.assert_allclose(accumulator, total, rtol=1e-6)
        expected = start - 0.5 * gradient / (np.sqrt(total) + 0.125)
        np.testing.assert_allclose(parameters, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(parameters[:3], start[:3])
