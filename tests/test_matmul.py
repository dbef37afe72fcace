"""Precision of matrix products: rounding against exact fractions, cuBLAS's conventions on a double."""

import dataclasses
import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from cublas_by_numpy import Blas, BlasLt, Shared
from test_model import batch, settings

from robe.backend import select
from robe.layers import MLP
from robe.matmul import (
    WORKSPACE,
    Epilogues,
    Gemm,
    Short,
    alignment,
    as_columns,
    emulated,
    mask_bytes,
    rounded,
)
from robe.model import build

BITS = {"tf32": 10, "bf16": 7}
SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 3.4028235e38, 1e-45, 1e-40, 1.17549435e-38]


def nearest(x, bits):
    """The oracle: the closest float of so many bits, by exact fractions; of two, the even one."""
    if x == 0 or math.isinf(x):
        return x
    # One unit in the last place; below 2^-126 the numbers are as far apart as there.
    unit = Fraction(2) ** (max(math.frexp(x)[1] - 1, -126) - bits)
    units, rest = divmod(Fraction(x), unit)
    if rest > unit / 2 or (rest == unit / 2 and units % 2):
        units += 1
    value = units * unit
    return math.copysign(math.inf, x) if abs(value) >= 2**128 else math.copysign(float(value), x)


@pytest.mark.parametrize("bits", BITS.values())
def test_rounding_is_to_nearest_and_ties_are_to_even(bits, rng):
    words = rng.integers(0, 2**32, 3000, dtype=np.uint64).astype(np.uint32)
    # As many ties, and their neighbours on both sides.
    tie = np.uint32(1 << 22 - bits)
    ties = words & ~np.uint32(2 * int(tie) - 1) | tie
    values = np.concatenate([words, ties, ties - 1, ties + 1]).view(np.float32)
    values = np.concatenate([np.float32(SPECIAL), values[np.isfinite(values)]])
    expected = np.array([nearest(x, bits) for x in values.tolist()], np.float32)
    found = rounded(values, bits)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    np.testing.assert_array_equal(rounded(found, bits), found)


@pytest.mark.parametrize("bits", BITS.values())
def test_a_nan_stays_one(bits):
    """Also the NaN whose bits are all ones, which adding would carry over to 0."""
    words = np.array([0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32)
    assert np.isnan(rounded(words.view(np.float32), bits)).all()


@pytest.mark.parametrize(("precision", "bits"), BITS.items())
def test_both_factors_keep_their_bits_and_no_more(precision, bits):
    one, last, beyond = (np.full((1, 1), 1 + x, np.float32) for x in (0, 2.0**-bits, 2.0 ** -(bits + 1)))
    for x, kept in ((last, last), (beyond, one)):
        assert emulated_product(precision, x, one) == emulated_product(precision, one, x) == kept


def test_products_differ_as_their_precision_says(rng):
    """Rounding both factors changes a product by at most 2^-bits of it; fp32 is NumPy's."""
    a, b = rng.standard_normal((2, 200, 200)).astype(np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    scale = abs(a).astype(np.float64) @ abs(b).astype(np.float64)
    errors = {}
    for precision in ("fp32", *BITS):
        out = emulated_product(precision, a, b)
        errors[precision] = (abs(out - exact) / scale).max()
    np.testing.assert_array_equal(a @ b, emulated_product("fp32", a, b))
    for precision, bits in BITS.items():
        # Of 200 roundings most cancel, but not down to a hundredth; the float32 sums add their own.
        assert 2.0**-bits / 100 < errors[precision] < 2.0**-bits + errors["fp32"]
    assert errors["fp32"] < errors["tf32"] / 10


def emulated_product(precision, a, b):
    if precision == "bf16":
        a, b = rounded(a, 7), rounded(b, 7)
    out = np.full((len(a), b.shape[1]), np.nan, np.float32)
    emulated(precision)(a, b, out)
    return out


def store(x, words):
    words[...] = rounded(np.asarray(x), 7).view(np.uint32) >> 16


def load(words, out):
    out[...] = (words.astype(np.uint32) << 16).view(np.float32)


def shortened(array):
    words = np.empty_like(array, np.uint16)
    store(array, words)
    return words.view(Shared)


def gemm(precision):
    blas, allocated = Blas(), []

    def empty(size, dtype):
        allocated.append(size)
        return np.empty(size, dtype).view(Shared)

    return Gemm(precision, blas, empty), blas, allocated


def operands(rng):
    """Inputs as layers hand them over, by name: whole, transposed, a slice of (B, F, D), thin."""

    def numbers(*shape):
        return rng.standard_normal(shape).astype(np.float32).view(Shared)

    wide = numbers(6, 3, 5)[:, 0]
    return {
        "whole": (numbers(6, 4), numbers(4, 5)),
        "front of a buffer": (numbers(9, 4)[:6], numbers(4, 5)),
        "transposed first": (numbers(6, 4).T, numbers(6, 5)),
        "transposed second": (numbers(6, 4), numbers(5, 4).T),
        "slice first": (wide, numbers(5, 4)),
        "slice first, transposed second": (wide, numbers(4, 5).T),
        "transposed first, slice second": (numbers(6, 4).T, wide),
        "slice, transposed": (wide.T, numbers(6, 4)),
        "one column, far apart": (numbers(6, 4).T, numbers(6, 3)[:, 0][:, None]),
        "one row, far apart": (numbers(4, 3)[:, 0][None], numbers(4, 5)),
        "one column": (numbers(6, 4), numbers(4, 1)),
        "one column, of a new axis": (numbers(6, 4).T, numbers(6)[:, None]),
        "one column first": (numbers(6)[:, None], numbers(4, 1).T),
        "one column, of width 1": (numbers(6, 4).T, numbers(6, 3, 1)[:, 0]),
        "one row": (numbers(1, 4), numbers(4, 5)),
        "one row of many": (numbers(7, 4)[:1], numbers(5, 4).T),
        "one row, transposed": (numbers(1, 4).T, numbers(1, 5)),
        "one by one": (numbers(1, 1), numbers(1, 1)),
    }


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("kind", operands(np.random.default_rng(0)))
def test_cublas_is_called_so_that_it_multiplies(kind, precision, rng):
    multiply, blas, _ = gemm(precision)
    a, b = operands(rng)[kind]
    whole = np.full((len(a) + 2, b.shape[1]), np.nan, np.float32).view(Shared)
    expected = emulated_product(precision if precision == "bf16" else "fp32", np.asarray(a), np.asarray(b))
    if precision == "bf16":
        a, b = shortened(a), shortened(b)
        words = np.zeros(whole.shape, np.uint16).view(Shared)
        multiply(a, b, words[: len(a)])
        load(words, whole)
        # Half a unit of 8 bits.
        np.testing.assert_allclose(whole[: len(a)], expected, rtol=2.0**-8, atol=1e-5)
        assert not whole[len(a) :].any()
        whole[...] = np.nan
    multiply(a, b, whole[: len(a)])
    # Sums of six float32 products, perhaps in another order.
    np.testing.assert_allclose(whole[: len(a)], expected, rtol=1e-5, atol=1e-5)
    assert np.isnan(whole[len(a) :]).all()
    assert blas.how == (77 if precision == "tf32" else 68, -1)


def test_products_run_on_the_stream_and_in_the_workspace_given_last():
    """The address of the workspace must outlast a change of the stream, which cuBLAS answers with its own."""
    multiply, blas, allocated = gemm("fp32")
    place = multiply.workspace.ctypes.data, WORKSPACE
    assert (blas.stream, blas.workspace) == (0, place)
    multiply.use(7)
    assert (blas.stream, blas.workspace) == (7, place)
    assert allocated == [WORKSPACE]


def test_what_blas_cannot_read_is_refused():
    with pytest.raises(ValueError, match="neither rows nor columns"):
        as_columns(np.zeros((4, 6), np.float32)[::2, ::2])
    with pytest.raises(ValueError, match="rows of `out`"):
        gemm("fp32")[0](
            *(np.zeros((3, 3), np.float32).view(Shared) for _ in range(2)), np.zeros((3, 3), np.float32).T
        )


def fused(precision, refused=()):
    """A backend on the double, its products with epilogues, and the double of cuBLASLt."""
    multiply, _, _ = gemm(precision)
    multiply.use(5)
    epilogues = Epilogues(multiply, BlasLt(refused))

    def empty(shape, dtype):
        # Full of ones, so that a mask not written lets all through.
        return np.full(shape, 255, dtype).view(Shared)

    backend = dataclasses.replace(
        select("reference", precision),
        matmul=multiply,
        short=Short("uint16", store, load) if precision == "bf16" else None,
        fused=epilogues,
        empty=empty,
        to_device=lambda array: array.view(Shared),
    )
    return backend, epilogues.lt


def layers(backend, rng, linear_end, widths, batch=7):
    """An MLP whose parameters are views of one flat array, as in the model."""
    shapes = [shape for n_in, n_out in pairwise(widths) for shape in ((n_in, n_out), (n_out,))]
    weights = rng.standard_normal(sum(map(math.prod, shapes))).astype(np.float32)
    pairs, copy = [], weights
    if backend.short:
        copy = backend.empty(weights.shape, backend.short.dtype)
        backend.short.store(backend.to_device(weights), copy)
    for host in (weights, np.full_like(weights, np.nan), copy):
        flat, parts, done = backend.to_device(host), [], 0
        for shape in shapes:
            parts.append(flat[done : done + math.prod(shape)].reshape(shape))
            done += math.prod(shape)
        pairs.append(list(zip(parts[::2], parts[1::2], strict=True)))
    return MLP(*pairs, batch, backend, linear_end)


def passed(mlp, rng, rows=5, strided=True):
    """All that a pass forward and back writes: outputs, gradients of parameters and of the input."""
    n_in, n_out = mlp.parameters[0][0].shape[0], mlp.parameters[-1][0].shape[1]
    x, d_y, room = (
        mlp.backend.to_device(rng.standard_normal(shape).astype(np.float32))
        for shape in ((rows, n_in), (rows, n_out), (rows, 3, n_out))
    )
    if mlp.short:
        whole, x = x, mlp.backend.empty(x.shape, mlp.short.dtype)
        mlp.short.store(whole, x)
    y = mlp.forward(x, room[:, 0] if strided else None)
    d_x = mlp.backward(d_y, want_input=True)
    written = [y, d_x, *mlp.activations[1:-1], *(array for pair in mlp.gradients for array in pair)]
    written = [mlp.backend.to_host(array).copy() for array in written]
    return [(a.astype(np.uint32) << 16).view(np.float32) if a.dtype == np.uint16 else a for a in written]


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("linear_end", [False, True])
@pytest.mark.parametrize("widths", [(3, 6, 4), (16, 130, 9, 8), (5, 1, 7), (4, 2)])
def test_layers_with_epilogues_are_those_without(widths, linear_end, precision, rng):
    backend, lt = fused(precision)
    plain = select("reference", "bf16" if precision == "bf16" else "fp32")
    for rows, strided in ((5, True), (7, False), (1, True)):
        seed = rng.integers(2**32)
        found, expected = (
            passed(layers(each, random, linear_end, widths), random, rows, strided)
            for each, random in ((backend, np.random.default_rng(seed)), (plain, np.random.default_rng(seed)))
        )
        for a, b in zip(found, expected, strict=True):
            # Sums of at most 130 products of order 1, perhaps in another order; in bf16 of rounded ones, and
            # a sum on the brink of two values moves what follows by a part in 256.
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=0.05 if precision == "bf16" else 1e-4)
    hidden, rectified = len(widths) - 2, len(widths) - 2 + (not linear_end)
    kinds = [kind for kind, *_ in lt.calls]
    assert [kinds.count(kind) for kind in (134, 6, 152)] == [3 * hidden, 3 * (rectified - hidden), 3 * hidden]
    assert {(size, stream) for _, _, size, stream in lt.calls} <= {(WORKSPACE, 5)}
    if lt.calls:
        assert lt.compute == (77 if precision == "tf32" else 68)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_a_model_with_epilogues_trains_as_one_without(optimizer):
    """Ten steps, padded as on a GPU."""
    config, data = settings(optimizer, block=2)
    backend, lt = fused("tf32")
    backend = dataclasses.replace(backend, multiple=8)
    models = build(config, data, backend, "float32"), build(config, data, select("reference"), "float32")
    for step in range(10):
        found, expected = (model.step(*batch("float32", step), 0.05) for model in models)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    for (name, found), expected in zip(models[0].state().items(), models[1].state().values(), strict=True):
        # As in test_model.py, of backends.
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5, err_msg=name)
    # Two layers below and one above rectify; the last of those below learns by the kernel.
    assert [kind for kind, *_ in lt.calls] == 10 * [134, 6, 134, 152, 152]
    _, dense, ids = batch("float32")
    found, expected = (model.predict(dense, ids) for model in models)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert [kind for kind, *_ in lt.calls[-3:]] == [6, 6, 6]


def test_inference_writes_no_mask(rng):
    backend, lt = fused("fp32")
    mlp = layers(backend, rng, False, (3, 6, 4))
    mlp.forward(rng.standard_normal((5, 3)).astype(np.float32).view(Shared), learns=False)
    assert [kind for kind, *_ in lt.calls] == [6, 6]
    assert all((mask == 255).all() for mask in mlp.masks)


@pytest.mark.parametrize("how", ["raise", "none found"])
@pytest.mark.parametrize("refused", [(134,), (152,), (6, 134, 152)])
def test_what_cublaslt_cannot_do_is_done_by_kernels(refused, how):
    backend, lt = fused("fp32", dict.fromkeys(refused, how))
    found, expected = (
        passed(layers(each, random, False, (3, 6, 5, 4)), random)
        for each, random in (
            (backend, np.random.default_rng(0)),
            (select("reference"), np.random.default_rng(0)),
        )
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert {kind for kind, *_ in lt.calls}.isdisjoint(refused)


def test_a_batch_without_rows_has_gradients_of_0(rng):
    """A process has one where a batch has fewer rows than there are processes."""
    backend, lt = fused("fp32")
    _, _, _, *gradients = passed(layers(backend, rng, False, (3, 6, 4)), rng, rows=0)
    assert [array.shape for array in gradients] == [(3, 6), (6,), (6, 4), (4,)]
    assert not any(array.any() for array in gradients)
    assert lt.calls == []


def test_descriptors_are_made_once_for_each_shape_and_alignment(rng):
    backend, lt = fused("fp32")
    mlp = layers(backend, rng, True, (4, 8, 8, 1))
    x, d_y = (np.ones((5, columns), np.float32).view(Shared) for columns in (4, 1))
    counts = []
    for rows in (5, 5, 4, 5, 4):
        mlp.forward(x[:rows])
        mlp.backward(d_y[:rows], want_input=True)
        counts.append(len(lt.records))
    assert counts[0] == counts[1] < counts[2] == counts[3] == counts[4]


def test_a_plan_serves_all_addresses_of_its_kind(rng):
    """Two biases 256 bytes apart, so alike in all but where they are, and two masks."""
    backend, _ = fused("fp32")
    x, weight, biases = (
        rng.standard_normal(n).astype(np.float32).view(Shared) for n in ((5, 4), (4, 64), (2, 64))
    )
    out, masks = np.empty((5, 64), np.float32).view(Shared), np.full((2, 5, 16), 255, np.uint8).view(Shared)
    for bias, mask in zip(biases, masks, strict=True):
        assert backend.fused("rectified", x, weight, out, bias, mask)
        np.testing.assert_allclose(out, np.maximum(x @ weight + bias, 0), rtol=1e-5, atol=1e-6)
        assert (mask != 255).any()
    assert len(backend.fused.plans) == 1


def test_alignment_is_that_of_the_least_aligned():
    space = np.empty(1024, np.uint8).view(Shared)
    start = -space.ctypes.data % 512
    whole, four, sixteen = (space[start + offset :] for offset in (0, 4, 16))
    assert [alignment(a) for a in (whole, four, sixteen)] == [256, 4, 16]
    assert alignment(whole, sixteen) == 16


@pytest.mark.parametrize(("columns", "size"), [(1, 16), (128, 16), (129, 32), (1024, 128)])
def test_rows_of_a_mask_are_multiples_of_128_bits(columns, size):
    assert mask_bytes(columns) == size


def test_a_nan_of_a_hidden_layer_stays_in_its_weights():
    """Where training looks before each checkpoint: the rectifier of cuBLASLt hides it from the loss."""
    backend, _ = fused("fp32")
    rng = np.random.default_rng(0)
    mlp = layers(backend, rng, True, (3, 6, 1))
    mlp.parameters[0][0][0, 0] = np.nan
    y, *_ = passed(mlp, rng)
    assert np.isfinite(y).all()
    mlp.parameters[1][0][0] = np.nan
    assert np.isnan(passed(mlp, rng)[0]).all()


@pytest.mark.parametrize("rate", [10.0, 1e6, 1e30])
def test_a_training_that_diverges_is_found_out(rate):
    """By its losses, or by its weights, which are looked at before each checkpoint."""
    config, data = settings("sgd", block=2)
    backend, _ = fused("fp32")
    model = build(config, data, dataclasses.replace(backend, multiple=8), "float32")
    with np.errstate(all="ignore"):
        losses = [model.step(*batch("float32", step), rate).copy() for step in range(20)]
    found = [np.isfinite(array).all() for array in (*losses, *model.state().values())]
    assert not all(found)
