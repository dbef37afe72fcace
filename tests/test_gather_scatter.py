"""Look-up, its adjoint and the Adagrad step on the shared array, over the table of awkward cases."""

import numba
import numpy as np
import pytest

from robe.kernels import adagrad, gather, launch, scatter_add
from robe.kernels.cases import CASES
from robe.kernels.hashing import run_at, slots_reference

pytestmark = pytest.mark.kernels
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def slots_of(case):
    """Slots and signs, both (B, F, D), of the rows a case looks up."""
    return slots_reference(case.slot_map(), case.base() + case.draw_ids().astype(np.uint64))


def poisoned(case, dtype=np.float32):
    return np.full((case.rows, case.features, case.width), np.nan, dtype)


@each_case
def test_gather_of_arange_is_the_slot_map(case, backend, reference):
    slots, signs = slots_of(case)
    memory = np.arange(1, case.memory + 1, dtype=np.float32)
    for kernels in (reference.kernels, backend.kernels):
        out = poisoned(case)
        kernels.gather(memory, case.draw_ids(), case.base(), case.slot_map(), out)
        np.testing.assert_array_equal(out, signs * (slots + 1))


@each_case
def test_gather_into_a_strided_view_leaves_the_rest_alone(case, backend):
    memory = np.arange(1, case.memory + 1, dtype=np.float64)
    wide = np.full((case.rows, case.features + 1, case.width), np.nan)
    backend.kernels.gather(memory, case.draw_ids(), case.base(), case.slot_map(), wide[:, 1:])
    slots, signs = slots_of(case)
    np.testing.assert_array_equal(wide[:, 1:], signs * (slots + 1))
    assert np.isnan(wide[:, 0]).all()


@each_case
def test_scatter_of_integers_is_exact(case, backend, reference, rng):
    """Sums of small integers do not depend on their order, so every version must agree exactly."""
    d_vectors = rng.integers(-4, 5, (case.rows, case.features, case.width)).astype(np.float32)
    slots, signs = slots_of(case)
    expected = np.zeros(case.memory)
    for slot, value in zip(slots.ravel(), (signs * d_vectors).ravel(), strict=True):
        expected[slot] += value
    for kernels in (reference.kernels, backend.kernels):
        out = np.zeros(case.memory, np.float32)
        kernels.scatter_add(d_vectors, case.draw_ids(), case.base(), case.slot_map(), 1, out)
        np.testing.assert_array_equal(out, expected)
        kernels.scatter_add(d_vectors, case.draw_ids(), case.base(), case.slot_map(), -2, out)
        np.testing.assert_array_equal(out, -expected)


@each_case
def test_scatter_is_the_adjoint_of_gather(case, backend, rng):
    """<gather(w), g> = <w, scatter(g)>, with the inner products summed exactly in integers."""
    memory = rng.integers(-4, 5, case.memory).astype(np.float32)
    d_vectors = rng.integers(-4, 5, (case.rows, case.features, case.width)).astype(np.float32)
    rows = (case.draw_ids(), case.base(), case.slot_map())
    vectors, d_memory = poisoned(case), np.zeros(case.memory, np.float32)
    backend.kernels.gather(memory, *rows, vectors)
    backend.kernels.scatter_add(d_vectors, *rows, 1, d_memory)
    assert (vectors * d_vectors).sum(dtype=np.int64) == (memory * d_memory).sum(dtype=np.int64)


@each_case
def test_cpu_scatter_adds_in_the_order_of_the_batch(case, reference, rng):
    """Real-valued sums depend on their order; one thread after the other is `np.add.at`, bit for bit."""
    d_vectors = rng.standard_normal((case.rows, case.features, case.width)).astype(np.float32)
    start = rng.standard_normal(case.memory).astype(np.float32)
    rows = (d_vectors, case.draw_ids(), case.base(), case.slot_map(), -0.1)
    expected = start.copy()
    reference.kernels.scatter_add(*rows, expected)
    available = numba.get_num_threads()
    try:
        for threads in range(1, available + 1):
            numba.set_num_threads(threads)
            out = start.copy()
            scatter_add.scatter_add_cpu(*rows, out)
            np.testing.assert_array_equal(out, expected)
    finally:
        numba.set_num_threads(available)


@each_case
def test_adagrad_scatter(case, backend, rng):
    """Two steps against Adagrad on the dense gradient; untouched slots keep their bits."""
    rows = (case.draw_ids(), case.base(), case.slot_map())
    start = rng.standard_normal(case.memory).astype(np.float32)
    out, expected = start.copy(), start.copy()
    accumulator, expected_accumulator = np.zeros((2, case.memory), np.float32)
    gradient = np.zeros(case.memory, np.float32)
    for _ in range(2):
        d_vectors = rng.integers(-4, 5, (case.rows, case.features, case.width)).astype(np.float32)
        backend.kernels.adagrad_scatter(d_vectors, *rows, 0.1, 1e-8, gradient, accumulator, out)
        assert not gradient.any()
        dense = np.zeros(case.memory, np.float32)
        scatter_add.scatter_add_reference(d_vectors, *rows, 1, dense)
        adagrad.adagrad_reference(dense, 0.1, 1e-8, expected_accumulator, expected)
    np.testing.assert_array_equal(accumulator, expected_accumulator)
    # A square root and a division, each within half an ulp, may be fused or not: 4 ulp of the weight.
    np.testing.assert_array_max_ulp(out, expected, 4)
    untouched = np.setdiff1d(np.arange(case.memory), slots_of(case)[0])
    np.testing.assert_array_equal(out[untouched], start[untouched])


@pytest.mark.skipif("'cuda' not in __import__('conftest').VERSIONS", reason="needs NUMBA_ENABLE_CUDASIM=1")
@pytest.mark.parametrize("shape", [(1, 1), (3, 2)])
def test_any_launch_shape_is_right(shape, rng, monkeypatch):
    monkeypatch.setattr(launch, "BLOCKS", shape[0])
    monkeypatch.setattr(launch, "THREADS", shape[1])
    case = CASES[1]
    rows = (case.draw_ids(), case.base(), case.slot_map())
    slots, signs = slots_of(case)
    out = poisoned(case)
    gather.gather_cuda(np.arange(case.memory, dtype=np.float32), *rows, out)
    np.testing.assert_array_equal(out, signs * slots)
    d_vectors = rng.integers(-4, 5, out.shape).astype(np.float32)
    sums, expected = np.zeros((2, case.memory), np.float32)
    scatter_add.scatter_add_cuda(d_vectors, *rows, 1, sums)
    scatter_add.scatter_add_reference(d_vectors, *rows, 1, expected)
    np.testing.assert_array_equal(sums, expected)


def test_cost_of_a_look_up():
    """Two rows of three features of 16 weights: read 4 B, written 4 B, ids of 4 B; one sign each."""
    out, ids = np.empty((2, 3, 16), np.float32), np.empty((2, 3), np.uint32)
    where = CASES[1].slot_map()
    assert gather.gather_cost(None, ids, None, where, out) == (2 * 3 * (16 * 8 + 4), 2 * 3 * 16)
    assert scatter_add.scatter_add_cost(out, ids, None, where, 1, None) == (
        2 * 3 * (16 * 12 + 4),
        2 * 3 * 16 * 2,
    )


def test_blocks_are_read_as_runs():
    """What makes blocks fast: a row of an aligned block is one run, up to 64 signs at a time."""
    where = CASES[2].slot_map()  # Z = D = 16
    lengths = [int(run_at(where, np.uint64(token), np.uint64(0))[1]) for token in range(100)]
    wrapped = sum(length < 16 for length in lengths)
    assert wrapped < 10  # only the 15 starts of 1000 that reach over the end of the array
    assert max(lengths) == 16
