"""Precision of matrix products: rounding against exact fractions, cuBLAS's conventions on a double."""

import math
from fractions import Fraction

import numpy as np
import pytest
from cublas_by_numpy import Blas, Shared

from robe.matmul import WORKSPACE, Gemm, as_columns, emulated, rounded

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
def test_both_inputs_keep_their_bits_and_no_more(precision, bits):
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
        out = np.full((200, 200), np.nan, np.float32)
        emulated(precision)(a, b, out)
        errors[precision] = (abs(out - exact) / scale).max()
    np.testing.assert_array_equal(a @ b, emulated_product("fp32", a, b))
    for precision, bits in BITS.items():
        # Of 200 roundings most cancel, but not down to a hundredth; the float32 sums add their own.
        assert 2.0**-bits / 100 < errors[precision] < 2.0**-bits + errors["fp32"]
    assert errors["fp32"] < errors["tf32"] / 10


def emulated_product(precision, a, b):
    out = np.empty((len(a), b.shape[1]), np.float32)
    emulated(precision)(a, b, out)
    return out


def to_bf16(x, words):
    words[...] = rounded(x, 7).view(np.uint32) >> 16


def gemm(precision):
    blas, allocated = Blas(), []

    def empty(size, dtype):
        allocated.append(size)
        return np.empty(size, dtype).view(Shared)

    return Gemm(precision, blas, to_bf16, empty), blas, allocated


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
    multiply(a, b, whole[: len(a)])
    expected = emulated_product(precision if precision == "bf16" else "fp32", np.asarray(a), np.asarray(b))
    # Sums of six float32 products, perhaps in another order.
    np.testing.assert_allclose(whole[: len(a)], expected, rtol=1e-5, atol=1e-5)
    assert np.isnan(whole[len(a) :]).all()
    assert blas.how == (77 if precision == "tf32" else 68, -1)


def test_room_for_bfloat16_is_made_once(rng):
    multiply, _, allocated = gemm("bf16")
    a, b = (rng.standard_normal((6, 6)).astype(np.float32).view(Shared) for _ in range(2))
    for rows in (6, 2, 6):
        multiply(a[:rows], b, np.empty((rows, 6), np.float32).view(Shared))
    assert allocated == [WORKSPACE, 36, 36]


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
