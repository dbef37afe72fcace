"""Look-up, its adjoint and the Adagrad step on the shared array, over the table of awkward cases."""

import numba
import numpy as np
import pytest
from conftest import each_version, needs_simulator, without_simulator

from robe.kernels import adagrad, gather, gather_interaction, interaction_scatter, scatter_add
from robe.kernels.interaction import out_width
from robe.kernels.operations import version
from robe.kernels.parts import groups, lanes
from robe.kernels.parts.codes import Form, row_bytes
from robe.kernels.parts.groups import GROUP, expanded, form_of, group_length, store_groups
from robe.kernels.parts.hashing import slot_map, slots_reference, span_at
from robe.kernels.parts.pieces import count_pieces
from robe.kernels.parts.vector import in_fours, store4
from robe.kernels.parts.walks import walk_pieces
from robe.kernels.scatter_add import add_bins
from robe.kernels.workbench.cases import BITS, CASES, calls

pytestmark = pytest.mark.kernels
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def slots_of(case):
    """Slots and signs, both (B, F, D), of the rows a case looks up."""
    return slots_reference(case.slot_map(), case.base() + case.draw_ids().astype(np.uint64))


def poisoned(case, dtype=np.float32):
    return np.full((case.rows, case.features, case.width), np.nan, dtype)


@each_version("gather")
@each_case
def test_gather_of_arange_is_the_slot_map(case, run):
    slots, signs = slots_of(case)
    # Halves hold the numbers up to 2,048 exactly; of codes, what they stand for.
    weights = (1 + np.arange(case.memory) % 2048).astype(np.float32)
    memory = case.stored(weights)
    if case.memory_type in BITS:
        form = form_of(memory, case.slot_map())
        assert form.bits == BITS[case.memory_type]
        weights = expanded(memory, np.arange(len(memory)), form).ravel()[: case.memory]
    out = poisoned(case)
    run(memory, case.draw_ids(), case.base(), case.slot_map(), out)
    np.testing.assert_array_equal(out, signs * weights[slots])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@each_version("gather")
@each_case
def test_gather_into_a_strided_view_leaves_the_rest_alone(case, run, dtype):
    memory = np.arange(1, case.memory + 1, dtype=dtype)
    wide = np.full((case.rows, case.features + 1, case.width), np.nan, dtype)
    run(memory, case.draw_ids(), case.base(), case.slot_map(), wide[:, 1:])
    slots, signs = slots_of(case)
    np.testing.assert_array_equal(wide[:, 1:], signs * (slots + 1))
    assert np.isnan(wide[:, 0]).all()


@without_simulator
@each_case
def test_prefetching_changes_nothing(case, monkeypatch):
    """As large arrays are looked up: the same vectors, whichever of them lie ahead."""
    monkeypatch.setattr(gather, "CACHE", -1)
    for operation in ("gather", "gather_interaction"):
        call = calls(case)[operation]
        expected, found = call.copy(), call.copy()
        version(operation, "reference")(*expected.values())
        version(operation, "cpu")(*found.values())
        # float32 products of up to 128 values in another order; the look-up itself is exact.
        np.testing.assert_allclose(found["out"], expected["out"], rtol=1e-4, atol=1e-4)


@without_simulator
@pytest.mark.parametrize("case", [c for c in CASES if c.rows > 1], ids=lambda c: c.name)
def test_what_is_prefetched_is_what_will_be_read(case, monkeypatch):
    """Of the vectors AHEAD of each, in the same row of the batch or the next one."""
    asked = []
    monkeypatch.setattr(gather, "prefetch_slots", lambda *run: asked.append(run[2:]))
    monkeypatch.setattr(gather, "copy_slots", lambda *_: None)
    ids, slots = case.draw_ids(), slots_of(case)[0]
    gather.gather_row(None, ids[0], ids[1], case.base(), case.slot_map(), True, None)
    ring = case.memory - int(case.slot_map().front)
    reached = [int(start) + k for start, length in asked for k in range(int(length))]
    found = [slot - ring * (slot >= case.memory) for slot in reached]
    expected = slots[:2].reshape(-1, case.width)[gather.AHEAD :][: case.features]
    assert found == expected.ravel().tolist()


@without_simulator
@pytest.mark.parametrize("case", [c for c in CASES if c.memory_type in BITS], ids=lambda c: c.name)
def test_all_cache_lines_of_codes_are_prefetched(case, monkeypatch):
    """Those of the codes of a run, and of the scales and biases of its groups."""
    lines = set()

    def prefetch(memory, start, length):
        lines.update((start + k) // 64 for k in range(0, int(length), 64))

    monkeypatch.setattr(groups, "prefetch_span", prefetch)
    where, memory = case.slot_map(), case.stored(np.zeros(case.memory, np.float32))
    length, size, bits = int(groups.group_length(where)), memory.shape[1], BITS[case.memory_type]
    for token in case.base() + case.draw_ids().astype(np.uint64).ravel()[: case.features]:
        slot, count, _ = span_at(where, token, np.uint64(0))
        lines.clear()
        groups.prefetch_slots(memory, where, slot, count)
        for s in range(int(slot), int(slot + count)):
            row = s // length * size
            assert {(row + s % length * bits // 8) // 64, (row + size - 4) // 64} <= lines


@without_simulator
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("block", [1, 7, 16, 20, 64, 100])
def test_codes_are_read_from_every_slot(block, bits, rng):
    """Runs begin and end anywhere in a group of codes, and go on in the next one, which has another scale."""
    width, slots = 100, 3 * int(GROUP) + 10
    form, where = Form(bits, False, int(GROUP)), slot_map("mix", width, block, slots, seed=3)
    weights = (rng.standard_normal(slots) * 10.0 ** rng.integers(-3, 3, slots)).astype(np.float32)
    if bits < 4:  # else nearly all codes of a group would be the same
        weights = rng.standard_normal(slots).astype(np.float32)
    memory = np.empty((4, row_bytes(form)), np.uint8)
    store_groups(weights, form, version("quantise", "reference"), memory)
    ids, base = np.arange(5000, dtype=np.uint32)[:, None], np.zeros(1, np.uint64)
    first = slots_reference(where, ids[:, 0].astype(np.uint64))[0][:, 0]
    assert len(np.unique(first)) == slots  # rows begin everywhere
    out = np.full((len(ids), 1, width), np.nan, np.float32)
    expected = out.copy()
    version("gather", "cpu")(memory, ids, base, where, out)
    floats = expanded(memory, slice(None), form).ravel()[:slots]
    version("gather", "reference")(floats, ids, base, where, expected)
    np.testing.assert_array_equal(out, expected)


def test_every_line_of_a_run_is_asked_for(monkeypatch):
    for array in (np.empty(1000, np.float32), np.empty(1000, np.uint16), np.empty((10, 100), np.uint8)):
        asked = []
        monkeypatch.setattr(lanes, "_prefetch", lambda _, index, asked=asked: asked.append(int(index)))
        lanes.prefetch_span(array, np.uint64(7), np.uint64(200))
        places = np.array(asked) * array.itemsize
        assert places[0] == 7 * array.itemsize
        assert (np.diff(places) == 64).all()
        assert places[-1] + 64 >= 207 * array.itemsize > places[-1]


@each_version("scatter_add")
@each_case
def test_scatter_of_integers_is_exact(case, run, rng):
    """Sums of small integers do not depend on their order, so every version must agree exactly."""
    d_vectors = rng.integers(-4, 5, (case.rows, case.features, case.width)).astype(np.float32)
    slots, signs = slots_of(case)
    expected = np.zeros(case.memory)
    for slot, value in zip(slots.ravel(), (signs * d_vectors).ravel(), strict=True):
        expected[slot] += value
    out = np.zeros(case.memory, np.float32)
    run(d_vectors, case.draw_ids(), case.base(), case.slot_map(), 1, out)
    np.testing.assert_array_equal(out, expected)
    # A view, as in training: the first vector of each row is the bottom MLP's.
    wide = np.concatenate([np.full((case.rows, 1, case.width), np.nan, np.float32), d_vectors], axis=1)
    run(wide[:, 1:], case.draw_ids(), case.base(), case.slot_map(), -2, out)
    np.testing.assert_array_equal(out, -expected)


@pytest.mark.parametrize("case", [c for c in CASES if c.memory_type not in BITS], ids=lambda c: c.name)
def test_scatter_is_the_adjoint_of_gather(case, backend, rng):
    """<gather(w), g> = <w, scatter(g)>, with the inner products summed exactly in integers."""
    memory = rng.integers(-4, 5, case.memory).astype(case.memory_type)
    d_vectors = rng.integers(-4, 5, (case.rows, case.features, case.width)).astype(np.float32)
    rows = (case.draw_ids(), case.base(), case.slot_map())
    vectors, d_memory = poisoned(case), np.zeros(case.memory, np.float32)
    backend.kernels.gather(memory, *rows, vectors)
    backend.kernels.scatter_add(d_vectors, *rows, 1, d_memory)
    assert (vectors * d_vectors).sum(dtype=np.int64) == (memory * d_memory).sum(dtype=np.int64)


@each_version("interaction_scatter")
@each_case
def test_scatter_of_the_interaction_is_its_derivative(case, run, rng):
    """Along a random direction, by central differences, which are exact for a quadratic; all in integers."""
    rows = (case.draw_ids(), case.base(), case.slot_map())
    first, d_first = (rng.integers(-2, 3, (case.rows, case.width)).astype(np.float32) for _ in range(2))
    memory, d_memory = (rng.integers(-2, 3, case.memory).astype(np.float32) for _ in range(2))
    out = rng.integers(-2, 3, (case.rows, out_width(1 + case.features, case.width))).astype(np.float32)

    def interacted(step):
        found = np.empty_like(out)
        gather_interaction.gather_interaction_reference(
            memory + step * d_memory, *rows, first + step * d_first, found
        )
        return (found * out).sum(dtype=np.int64)

    vectors = np.empty((case.rows, 1 + case.features, case.width), np.float32)
    vectors[:, 0] = first
    gather.gather_reference(memory, *rows, vectors[:, 1:])
    before = rng.integers(-2, 3, case.memory).astype(np.float32)
    # A view, as in training: the gradients by the other vectors stand between those by the first.
    wide, after = np.full(vectors.shape, np.nan, np.float32), before.copy()
    run(out, vectors, *rows, -2, wide[:, 0], after)
    moved = (wide[:, 0] * d_first).sum(dtype=np.int64) + ((before - after) / 2 * d_memory).sum(dtype=np.int64)
    assert 2 * moved == interacted(1) - interacted(-1)
    assert np.isnan(wide[:, 1:]).all()
    untouched = np.setdiff1d(np.arange(case.memory), slots_of(case)[0])
    np.testing.assert_array_equal(after[untouched], before[untouched])


@each_version("gather_interaction_backward")
def test_a_gradient_that_gathers_again_is_that_of_the_vectors_kept(run, rng):
    """Of repeated ids, in integers, to views; the weights are read, and not stepped on the way."""
    case = next(case for case in CASES if case.ids == "repeated")
    rows = (case.draw_ids(), case.base(), case.slot_map())
    memory, sums = rng.integers(-2, 3, (2, case.memory)).astype(np.float32)
    vectors = rng.integers(-2, 3, (case.rows, 1 + case.features, case.width)).astype(np.float32)
    gather.gather_reference(memory, *rows, vectors[:, 1:])
    d_out = rng.integers(-2, 3, (case.rows, out_width(1 + case.features, case.width))).astype(np.float32)
    expected, found, kept = sums.copy(), sums.copy(), memory.copy()
    d_first, wide = np.empty_like(vectors[:, 0]), np.full(vectors.shape, np.nan, np.float32)
    interaction_scatter.interaction_scatter_reference(d_out, vectors, *rows, 1, d_first, expected)
    run(d_out, memory, *rows, vectors[:, 0], wide[:, 0], found)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(wide[:, 0], d_first)
    assert np.isnan(wide[:, 1:]).all()
    np.testing.assert_array_equal(memory, kept)


@without_simulator
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


DETERMINISTIC = [
    case for case in CASES if case.name in ("Z does not divide D", "M = Z: every block wraps", "repeated ids")
]


@needs_simulator
@pytest.mark.parametrize("case", DETERMINISTIC, ids=lambda c: c.name)
@pytest.mark.parametrize("size", [1e-20, 1, 1e30])
def test_deterministic_sums_do_not_depend_on_the_order_of_the_batch(case, size, rng):
    """The rows in another order give the same bits, which are those of the exact sum but for a few units."""
    shape = case.rows, case.features, case.width
    d_vectors = (size * rng.standard_normal(shape) * 10.0 ** rng.integers(-4, 1, shape)).astype(np.float32)
    ids, found = case.draw_ids(), []
    for order in (slice(None), slice(None, None, -1), rng.permutation(case.rows)):
        out = np.zeros(case.memory, np.float32)
        scatter_add.scatter_add_cuda_deterministic(
            d_vectors[order], ids[order], case.base(), case.slot_map(), 1, out
        )
        found.append(out)
    assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()
    exact, count = np.zeros((2, case.memory))
    slots, signs = slots_of(case)
    np.add.at(exact, slots, d_vectors.astype(np.float64) * signs)
    np.add.at(count, slots, 1)
    unit = 2.0 ** (np.frexp(abs(d_vectors).max())[1] - 40)
    assert (abs(found[0] - exact) <= count * unit + abs(exact) * 2.0**-24).all()


@needs_simulator
@pytest.mark.parametrize("elements", [100, 5000], ids=["whole array", "slots of the batch"])
def test_gradients_that_are_not_finite_reach_their_slots(elements, rng):
    """Infinities of both signs in one slot are NaN; the other slots get their finite sums."""
    case = CASES[3]._replace(memory=elements, signed=False)
    d_vectors = rng.standard_normal((case.rows, case.features, case.width)).astype(np.float32)
    d_vectors[0, 0, 3], d_vectors[1, 1, 2], d_vectors[2, 3, :2] = np.nan, np.inf, -np.inf
    rows = (d_vectors, case.draw_ids(), case.base(), case.slot_map(), -0.5)
    expected, found = np.ones((2, elements), np.float32)
    scatter_add.scatter_add_reference(*rows, expected)
    scatter_add.scatter_add_cuda_deterministic(*rows, found)
    assert np.isnan(expected).any()
    assert np.isinf(expected).any()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


BINNED = [case for case in CASES if case.memory_type == "float32" and 0 < case.width * case.features <= 256]


@needs_simulator
@pytest.mark.parametrize("case", BINNED, ids=lambda c: c.name)
def test_pieces_that_are_listed_by_bins_give_the_same_bits(case, monkeypatch, rng):
    """In a batch larger than the array, with chunks that end within bins, and one gradient infinite."""
    case = case._replace(rows=1 + case.memory // (case.features * case.width) + case.rows)
    d_vectors = rng.standard_normal((case.rows, case.features, case.width)).astype(np.float32)
    d_vectors[0, 0, 0] = np.inf
    rows = (d_vectors, case.draw_ids(), case.base(), case.slot_map(), -0.5)
    out = rng.standard_normal(case.memory).astype(np.float32)
    expected, binned, added = out.copy(), out.copy(), []

    def counted(*arguments):
        added.append(len(arguments))
        add_bins(*arguments)

    monkeypatch.setattr(scatter_add, "add_bins", counted)
    scatter_add.scatter_add_cuda_deterministic(*rows, binned)
    assert len(added) == 1
    monkeypatch.setattr(scatter_add, "BINS_MOST", 0)
    scatter_add.scatter_add_cuda_deterministic(*rows, expected)
    assert len(added) == 1
    assert binned.tobytes() == expected.tobytes()
    scatter_add.scatter_add_reference(*rows, out)
    np.testing.assert_allclose(binned, out, rtol=1e-5, atol=1e-5)


@needs_simulator
def test_an_interrupted_scatter_leaves_nothing_behind(monkeypatch):
    """The sums that it has made are not added by the next one."""
    call = calls(CASES[1])["scatter_add"]
    expected, found = call.copy(), call.copy()
    scatter_add.scatter_add_cuda_deterministic(*expected.values())

    def interrupted(kernel, *arguments):
        if kernel is scatter_add._take_sums_kernel:
            raise KeyboardInterrupt
        walk_pieces(kernel, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(scatter_add, "walk_pieces", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scatter_add.scatter_add_cuda_deterministic(*call.copy().values())
    scatter_add.scatter_add_cuda_deterministic(*found.values())
    np.testing.assert_array_equal(found["out"], expected["out"])


@each_version("adagrad_step")
@each_case
def test_adagrad_step(case, run, rng):
    """Two steps against Adagrad on the dense gradient; untouched slots keep their bits."""
    rows = (case.draw_ids(), case.base(), case.slot_map())
    start = rng.standard_normal(case.memory).astype(np.float32)
    out, expected = start.copy(), start.copy()
    accumulator, expected_accumulator = np.zeros((2, case.memory), np.float32)
    gradient = np.zeros(case.memory, np.float32)
    for _ in range(2):
        d_vectors = rng.integers(-4, 5, (case.rows, case.features, case.width)).astype(np.float32)
        scatter_add.scatter_add_reference(d_vectors, *rows, 1, gradient)
        run(*rows, 0.1, 1e-8, gradient, accumulator, out)
        assert not gradient.any()
        dense = np.zeros(case.memory, np.float32)
        scatter_add.scatter_add_reference(d_vectors, *rows, 1, dense)
        adagrad.adagrad_reference(dense, 0.1, 1e-8, expected_accumulator, expected)
    np.testing.assert_array_equal(accumulator, expected_accumulator)
    # A square root and a division, each within half an ulp, may be fused or not: 4 ulp of the weight.
    np.testing.assert_array_max_ulp(out, expected, 4)
    untouched = np.setdiff1d(np.arange(case.memory), slots_of(case)[0])
    np.testing.assert_array_equal(out[untouched], start[untouched])


@each_version("rowwise_step")
@each_case
def test_rowwise_step(case, run, rng):
    """Two steps against FBGEMM's formula for each row of a table, or each 64 weights of another array."""
    rows, size = (case.draw_ids(), case.base(), case.slot_map()), int(group_length(case.slot_map()))
    assert size == (case.width if case.family == "table" else 64)
    start = rng.standard_normal(case.memory).astype(np.float32)
    out, expected = start.copy(), start.astype(float)
    gradient, accumulator = np.zeros(case.memory, np.float32), np.zeros(-(-case.memory // size), np.float32)
    sums = np.zeros(accumulator.size)
    for _ in range(2):
        d_vectors = rng.integers(-4, 5, (case.rows, case.features, case.width)).astype(np.float32)
        scatter_add.scatter_add_reference(d_vectors, *rows, 1, gradient)
        dense = gradient.astype(float)
        run(*rows, 0.1, 1e-8, gradient, accumulator, out)
        assert not gradient.any()
        for group in range(sums.size):
            part = slice(group * size, (group + 1) * size)
            sums[group] += (dense[part] ** 2).sum() / size
            expected[part] -= 0.1 * dense[part] / (np.sqrt(sums[group]) + 1e-8)
    np.testing.assert_allclose(accumulator, sums, rtol=1e-6)  # squares are exact; the mean is rounded
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)  # a few roundings of numbers of order 1
    untouched = np.setdiff1d(np.arange(case.memory), slots_of(case)[0])
    np.testing.assert_array_equal(out[untouched], start[untouched])


@needs_simulator
@pytest.mark.parametrize(
    ("rows_at", "dtype", "block", "fours"),
    [
        (0, np.float32, 16, True),
        (4, np.float32, 4, True),
        (1, np.float32, 16, False),  # 4 bytes behind a multiple of 16
        (0, np.float32, 2, False),
        (0, np.float64, 16, False),
    ],
)
def test_four_floats_are_written_at_once_where_they_may_be(rows_at, dtype, block, fours, monkeypatch):
    calls = []

    def counted(out, b, column, *values):
        calls.append(column)
        store4(out, b, column, *values)

    monkeypatch.setattr(gather, "store4", counted)
    case = CASES[2]._replace(block=block)
    flat = np.full(8 + case.rows * case.features * case.width, np.nan, dtype)
    aligned = -flat.ctypes.data % 16 // flat.itemsize
    out = flat[aligned + rows_at :][: case.rows * case.features * case.width]
    out = out.reshape(case.rows, case.features, case.width)
    slots, signs = slots_of(case)
    gather.gather_cuda(
        np.arange(case.memory, dtype=dtype), case.draw_ids(), case.base(), case.slot_map(), out
    )
    np.testing.assert_array_equal(out, signs * slots)
    assert len(calls) == (out.size / 4 if fours else 0)


def test_vectors_that_cannot_be_written_in_fours():
    """Rows of 6, vectors apart from each other, and columns before rows."""
    whole = np.zeros((4, 8, 8), np.float32)
    assert in_fours(whole)
    assert in_fours(whole[:, 1:])
    assert not in_fours(whole[:, :, :6])
    assert not in_fours(whole[:, ::2])
    assert not in_fours(whole.transpose(0, 2, 1))
    assert not in_fours(np.zeros((4, 3, 6), np.float32))


@needs_simulator
def test_a_batch_that_32_bits_cannot_number():
    ids = np.broadcast_to(np.uint32(0), (2**27, 2))
    with pytest.raises(ValueError, match="134217728 rows are 2147483648 pieces of 2 elements"):
        count_pieces(CASES[4]._replace(width=16).slot_map(), ids)
    assert count_pieces(CASES[4]._replace(width=16).slot_map(), ids[1:]) == (2**31 - 16, 1)


def test_cost_of_a_look_up():
    """Two rows of three features of 16 weights: read 4 or 2 B, written 4 B, ids of 4 B; one sign each."""
    out, ids = np.empty((2, 3, 16), np.float32), np.empty((2, 3), np.uint32)
    where = CASES[1].slot_map()
    for memory, each in ((np.empty(1000, np.float32), 8), (np.empty(1000, np.float16), 6)):
        cost = gather.gather_cost(memory, ids, None, where, out)
        assert cost == (2 * 3 * (16 * each + 4), 2 * 3 * 16)
    assert scatter_add.scatter_add_cost(out, ids, None, where, 1, None) == (
        2 * 3 * (16 * 12 + 4),
        2 * 3 * 16 * 2,
    )


def test_cost_of_a_fused_step():
    """Six rows of 3 vectors, 16 wide: d_out, vectors, ids, d_first, and weights read and written."""
    call = calls(CASES[1]._replace(features=2))["interaction_scatter"].arguments
    pairs, vector = 3, 6 * 16 * 4
    moved = 6 * (16 + pairs) * 4 + 3 * vector + 6 * 2 * 4 + vector + 2 * 2 * vector
    flops = 6 * pairs * 4 * 16 + 2 * 6 * 2 * 16
    assert interaction_scatter.interaction_scatter_cost(*call.values()) == (moved, flops)


def test_cost_of_a_step_that_gathers_again():
    """As above, but instead of vectors the first ones are read, and two weights for each element."""
    call = calls(CASES[1]._replace(features=2))["gather_interaction_backward"].arguments
    pairs, vector = 3, 6 * 16 * 4
    moved = 6 * (16 + pairs) * 4 + vector + 2 * vector + 6 * 2 * 4 + vector + 2 * 2 * vector
    flops = 6 * pairs * 4 * 16 + 2 * 6 * 2 * 16
    assert interaction_scatter.gather_interaction_backward_cost(*call.values()) == (moved, flops)


def test_blocks_are_read_as_runs():
    """What makes blocks fast: a row of an aligned block is one run, up to 64 signs at a time."""
    where = CASES[2].slot_map()  # Z = D = 16
    lengths = [int(span_at(where, np.uint64(token), np.uint64(0))[1]) for token in range(100)]
    wrapped = sum(length < 16 for length in lengths)
    assert wrapped < 10  # only the 15 starts of 1000 that reach over the end of the array
    assert max(lengths) == 16
