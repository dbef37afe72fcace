"""Half precision: every half against NumPy's, which way numbers are rounded, and steps of a half array."""

import numba
import numpy as np
import pytest
from conftest import each_version

from robe.kernels import half_step
from robe.kernels.operations import version
from robe.kernels.parts.half import from_half, random_bits, rounding_key, to_half, words
from robe.kernels.parts.hashing import slot_map
from robe.kernels.workbench.cases import CASES, calls

DRAWS = 2**13
HALVES = np.arange(2**16, dtype=np.uint32).astype(np.uint16)


@numba.njit
def converted_back(bits, random):
    numbers, back = np.empty(bits.size, np.float32), np.empty_like(bits)
    for i in range(bits.size):
        numbers[i] = from_half(bits[i])
        back[i] = to_half(numbers[i], random)
    return numbers, back


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # signalling NaN
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("random", [0, DRAWS - 1])
def test_every_half_there_and_back(compiled, random):
    convert = converted_back if compiled else converted_back.py_func
    numbers, back = convert(HALVES, np.uint32(random))
    expected = HALVES.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(numbers.view(np.uint32), expected.view(np.uint32))
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(back[finite], HALVES[finite])
    np.testing.assert_array_equal(np.isnan(expected), np.isnan(back.view(np.float16)))


@pytest.mark.parametrize("share", [1, 2, 1000, DRAWS // 2, DRAWS - 1])
def test_as_many_draws_go_up_as_a_number_lies_above_a_half(share):
    """share / 2^13 of the way from each half to the next, away from 0: float32 holds all of these."""
    below = HALVES[:0x7BFF]
    low, high = (bits.view(np.float16).astype(np.float32) for bits in (below, below + np.uint16(1)))
    number = low + (high - low) * np.float32(share / DRAWS)
    for sign, bit in ((1, 0), (-1, 0x8000)):
        for draw, expected in ((0, below), (DRAWS - share - 1, below), (DRAWS - share, below + 1)):
            np.testing.assert_array_equal(to_half(sign * number, np.uint32(draw)), expected | bit)


def test_what_is_too_large_saturates_and_nan_stays():
    for value, expected in ((65504, 65504), (65519, 65504), (70000, 65504), (1e38, 65504), (np.inf, 65504)):
        for draw in (0, DRAWS - 1):
            for sign in (1, -1):
                found = to_half(np.float32(sign * value), np.uint32(draw)).view(np.float16)
                assert found == sign * expected
    assert np.isnan(to_half(np.float32(np.nan), np.uint32(0)).view(np.float16))


def test_draws_are_even_and_have_nothing_to_do_with_each_other():
    """Over 2^16 slots at a step, and over 2^16 steps at a slot: each bit, and pairs of neighbours."""
    by_slot = random_bits(rounding_key(0, 9), np.arange(2**16))
    by_step = np.array([random_bits(rounding_key(0, step), 9) for step in range(2**16)])
    for draws in (by_slot, by_step):
        assert draws.max() == DRAWS - 1
        bits = (draws[:, None] >> np.arange(13) & 1).astype(float)
        # A mean of 2^16 coins deviates by 0.5 / 2^8, that of as many products of +-1 by 1 / 2^8; 5 of these.
        assert abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / 2**8
        signs = 2 * bits - 1
        assert abs((signs[1:, :, None] * signs[:-1, None]).mean(axis=0)).max() < 5 / 2**8
    assert (random_bits(rounding_key(1, 9), np.arange(100)) != by_slot[:100]).any()


@pytest.mark.kernels
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # signalling NaN
@each_version("gather")
def test_look_up_of_every_half(run):
    """Through a full table of 16 weights a row."""
    where, ids = slot_map("table", 16, 1, 2**16, signed=False), np.arange(2**12, dtype=np.uint32)[:, None]
    memory, rows = HALVES.view(np.float16), (ids, np.zeros(1, np.uint64), where)
    out = np.empty((2**12, 1, 16), np.float32)
    run(memory, *rows, out)
    np.testing.assert_array_equal(out.ravel(), memory.astype(np.float32))


@pytest.mark.kernels
@each_version("half_step")
@pytest.mark.parametrize("adagrad", [False, True], ids=["sgd", "adagrad"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_versions_come_to_the_same_bits(case, adagrad, run):
    """And only touched slots change, each at most to a neighbouring half of where its step leads."""
    arguments = calls(case)["half_step"].arguments
    arguments["accumulator"] = arguments["gradient"][: case.memory * adagrad] ** 2
    expected, found = ({n: np.copy(a) if n in OUTPUTS else a for n, a in arguments.items()} for _ in range(2))
    version("half_step", "reference")(*expected.values())
    run(*found.values())
    for name in OUTPUTS:
        assert found[name].tobytes() == expected[name].tobytes(), name
    assert not found["gradient"].any()
    gradient = arguments["gradient"]
    step = 0.125 * gradient
    if adagrad:
        np.testing.assert_array_equal(found["accumulator"], 2 * gradient**2)
        step[gradient != 0] /= np.sqrt(2) * abs(gradient[gradient != 0])
    before, after = arguments["out"].astype(np.float64), found["out"].astype(np.float64)
    # Besides, float32 rounds the difference.
    assert (abs(before - step - after) < np.spacing(abs(found["out"])) + 1e-6).all()
    np.testing.assert_array_equal(after[gradient == 0], before[gradient == 0])


OUTPUTS = ("gradient", "accumulator", "out")


def test_bytes_do_not_depend_on_the_number_of_threads():
    call = calls(CASES[1]._replace(rows=3000, memory=30_000))["half_step"]
    available, states = numba.get_num_threads(), set()
    try:
        for threads in range(1, available + 1):
            numba.set_num_threads(threads)
            arguments = call.copy()
            half_step.half_step_cpu(*arguments.values())
            states.add(arguments["out"].tobytes())
    finally:
        numba.set_num_threads(available)
    assert len(states) == 1
    assert (arguments["out"] != call.arguments["out"]).mean() > 0.5


def drift(steps=400, slots=4000):
    """(mean, its standard error, deviation) of 1.5 after so many steps of 1e-5, a hundredth of its ulp."""
    weights = np.full(slots, 1.5, np.float16)
    nothing = np.zeros(0, np.float32)
    for step in range(steps):
        gradient = np.full(slots, -1, np.float32)
        half_step.half_step_reference(
            ids=None,
            base=None,
            slot_map=None,
            rate=1e-5,
            eps=1e-8,
            key=rounding_key(3, step),
            gradient=gradient,
            accumulator=nothing,
            out=weights,
        )
    moved = weights.astype(np.float64) - 1.5
    return moved.mean(), moved.std() / np.sqrt(slots), moved.std()


def test_small_steps_arrive_on_average():
    """The deviation is that of 400 independent draws that go up one time in 98: sqrt(n p (1 - p)) ulp."""
    mean, error, deviation = drift()
    assert abs(mean - 400e-5) < 5 * error
    ulp = 2.0**-10
    share = 1e-5 / ulp
    # A deviation of 4000 draws is known to 1 / sqrt(2 * 4000) of itself.
    assert abs(deviation / (ulp * np.sqrt(400 * share * (1 - share))) - 1) < 5 / np.sqrt(2 * 4000)


@pytest.mark.parametrize("draw", [0, DRAWS // 2], ids=["towards zero", "to nearest"])
def test_small_steps_are_lost_by_other_roundings(draw, monkeypatch):
    """What the test before is for: with a fixed draw nothing moves."""
    monkeypatch.setattr(half_step, "random_bits", lambda key, slot: np.uint32(draw))
    assert drift() == (0, 0, 0)


def test_only_halves_are_taken_by_their_bits():
    assert words(np.zeros(3, np.float16)).dtype == np.uint16
    for dtype in (np.float32, np.float64):
        array = np.zeros(3, dtype)
        assert words(array) is array
