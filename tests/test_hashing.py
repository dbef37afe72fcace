"""The hash against golden vectors and against an oracle in plain Python integers."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import VERSIONS
from numba import cuda, njit

from robe.kernels.parts import hashing
from robe.kernels.parts.hashing import P, slot_map, slots_reference, span_at

GOLDEN = json.loads((Path(__file__).parent / "golden_hash.json").read_text())
K1, K2, K3, KS = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD1B54A32D192ED03
WORD = 2**64


def mix_oracle(z):
    z = (z ^ z >> 30) * K2 % WORD
    z = (z ^ z >> 27) * K3 % WORD
    return z ^ z >> 31


@cache
def published_numbers(seed):
    """Those that the published code draws for `affine`."""
    return [int(x) for x in np.random.RandomState(seed).randint(0, int(P), 50)[:3]]


def slot_and_sign_oracle(family, token, i, width, block, memory, seed):
    """Slot and sign of element i of a row by big-integer arithmetic."""
    if family == "mix":
        index, position = divmod(token * width + i, block)
        word = mix_oracle((mix_oracle((seed + K1) % WORD) + index * K1) % WORD)
        slot = ((word * memory >> 64) + position) % memory
    else:
        chunk, position = divmod(i, block)
        r = published_numbers(seed)
        word = mix_oracle((mix_oracle((seed + K1) % WORD) + (token * width + chunk) * K1) % WORD)
        slot = (token * r[2] + chunk * r[1] + r[0]) % int(P) % (memory - block + 1) + position
    bits = mix_oracle((word + (position // 64 + 1) * KS) % WORD)
    return slot, -1 if bits >> (position % 64) & 1 else 1


@njit
def compiled_slot_and_sign(where, token, element):
    slot, length, bits = span_at(where, token, element)
    return slot, length, bits


@cuda.jit
def _run_kernel(where, token, element, out):
    out[0], out[1], out[2] = span_at(where, token[0], element[0])


def cuda_slot_and_sign(where, token, element):
    out = np.zeros(3, np.uint64)
    _run_kernel[1, 1](where, np.array([token]), np.array([element]), out)
    return out


RUNS = [span_at, compiled_slot_and_sign] + [cuda_slot_and_sign] * ("cuda" in VERSIONS)


def random_cases(count, seed):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        family = ("mix", "affine")[rng.integers(2)]
        width, block = int(rng.integers(1, 200)), int(rng.integers(1, 300))
        memory = block + int(rng.integers(0, (50, 10**6, 2 * 10**9)[rng.integers(3)]))
        yield family, width, block, memory, int(rng.integers(0, 2**32)), int(rng.integers(0, 2**38)), rng


@pytest.mark.kernels
@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['family']}-D{c['D']}-Z{c['Z']}-i{c['element']}")
def test_golden_vectors(case):
    where = slot_map(*(case[key] for key in ("family", "D", "Z", "M", "seed")), exact=case.get("exact", 0))
    token = np.uint64(case["feature"] * 2**32 + case["id"] if "feature" in case else case["token"])
    slots, signs = slots_reference(where, np.array([token]))
    assert slots[0, case["element"]] == case["slot"]
    for run in RUNS:
        slot, _, bits = run(where, token, np.uint64(case["element"]))
        assert slot == case["slot"]
        assert case["family"] == "affine" or 1 - 2 * int(bits & np.uint64(1)) == case["sign"]
    assert case["family"] == "affine" or signs[0, case["element"]] == case["sign"]


def test_100_000_random_elements_agree_with_big_integers():
    checked = 0
    for family, width, block, memory, seed, token, rng in random_cases(1000, seed=1):
        where = slot_map(family, width, block, memory, seed)
        slots, signs = slots_reference(where, np.array([token], np.uint64))
        for i in rng.integers(0, width, 100):
            expected = slot_and_sign_oracle(family, token, int(i), width, block, memory, seed)
            assert (slots[0, i], signs[0, i]) == expected, (family, width, block, memory, seed, token, i)
            slot, length, bits = compiled_slot_and_sign(where, np.uint64(token), np.uint64(i))
            assert (slot, 1 - 2 * int(bits & np.uint64(1))) == expected
            assert 1 <= length <= width - i
            checked += 1
    assert checked == 100_000


def test_runs_cover_the_row_and_agree_with_slots():
    """Every element of a run has the slot and sign of `slots_reference`, not only its first."""
    for family, width, block, memory, seed, token, _ in random_cases(200, seed=2):
        where = slot_map(family, width, block, memory, seed)
        slots, signs = slots_reference(where, np.array([token], np.uint64))
        element = 0
        while element < width:
            slot, length, bits = (int(x) for x in span_at(where, np.uint64(token), np.uint64(element)))
            assert list(slots[0, element : element + length]) == list(range(slot, slot + length))
            assert list(signs[0, element : element + length]) == [
                1 - 2 * (bits >> k & 1) for k in range(length)
            ]
            element += length
        assert element == width


def test_exact_rows_lie_in_front_of_a_ring_that_is_an_array_of_mix():
    rng = np.random.default_rng(4)
    for _ in range(100):
        width, block, exact = (int(rng.integers(1, most)) for most in (80, 150, 40))
        front = -(-exact * width // 64) * 64
        ring, seed = block + int(rng.integers(0, (50, 10**6)[rng.integers(2)])), int(rng.integers(0, 2**32))
        where = slot_map("hot", width, block, front + ring, seed, exact=exact)
        rows = exact - 1, exact, 2**32 - 1, *(int(row) for row in rng.integers(0, 2 * exact, 5))
        tokens = [(feature << 32) + row for feature in (0, 3) for row in rows]
        slots, signs = slots_reference(where, np.array(tokens, np.uint64))
        for t, token in enumerate(tokens):
            element = 0
            while element < width:
                span = compiled_slot_and_sign(where, np.uint64(token), np.uint64(element))
                slot, length, bits = map(int, span)
                for k in range(length):
                    i, row = element + k, token % 2**32
                    if row < exact:
                        expected = row * width + i, 1
                    else:
                        found = slot_and_sign_oracle("mix", token, i, width, block, ring, seed)
                        expected = front + found[0], found[1]
                    assert (slots[t, i], signs[t, i]) == expected
                    assert (slot + k, 1 - 2 * (bits >> k & 1)) == expected
                element += length
            assert element == width


def test_compiled_arithmetic_stays_unsigned():
    mix = njit(hashing.mix64)
    high = njit(hashing.multiply_high)
    x, y = np.uint64(WORD - 3), np.uint64(WORD - 5)
    assert int(mix(x)) == mix_oracle(WORD - 3)
    assert int(high(x, y)) == (WORD - 3) * (WORD - 5) >> 64
    assert {str(s.return_type) for s in mix.nopython_signatures + high.nopython_signatures} == {"uint64"}


def test_division_without_a_division():
    divide = njit(hashing.divide)
    edges = [0, 1, 2, 3, 63, 64, 65, 2**31 - 1, 2**32, 2**32 + 1, 2**63 - 1, 2**63, WORD - 2, WORD - 1]
    rng = np.random.default_rng(3)
    numbers = edges + [
        int(x) >> int(s)
        for x, s in zip(rng.integers(0, WORD, 300, np.uint64), range(300), strict=True)
        if s < 64
    ]
    for divisor in numbers[1:]:
        if divisor == 0:
            continue
        reciprocal = hashing.reciprocal(divisor)
        for x in numbers:
            for number in {x, x // divisor * divisor, max(x // divisor * divisor - 1, 0)}:
                result = divide(np.uint64(number), np.uint64(divisor), reciprocal)
                assert tuple(map(int, result)) == divmod(number, divisor), (number, divisor)


@pytest.mark.parametrize(("width", "block", "memory"), [(0, 1, 5), (4, 0, 5), (4, 6, 5)])
def test_impossible_maps_are_refused(width, block, memory):
    with pytest.raises(ValueError, match="1 <= block <= memory"):
        slot_map("mix", width, block, memory)


def test_a_ring_that_no_block_fits_into_is_refused():
    slot_map("hot", 10, 8, 72, exact=6)
    with pytest.raises(ValueError, match="block=8, memory=71 of which 64 are in front"):
        slot_map("hot", 10, 8, 71, exact=6)


def test_affine_refuses_more_weights_than_its_modulus():
    with pytest.raises(ValueError, match="use the hash `mix`"):
        slot_map("affine", 16, 16, int(P) + 1)


def test_an_edit_to_the_hash_reaches_kernels_compiled_before(tmp_path):
    """Numba's cache would miss it: adagrad_step.py itself does not change."""
    source = Path(hashing.__file__).parents[2]
    ignore = shutil.ignore_patterns("__pycache__")
    copy = shutil.copytree(source, tmp_path / "robe", ignore=ignore) / "kernels" / "parts" / "hashing.py"
    program = (
        "import numpy as np; from robe.kernels.adagrad_step import adagrad_step_cpu; "
        "from robe.kernels.parts.hashing import slot_map; "
        "sums, gradient, out = np.ones((3, 10**6), np.float32); "
        "adagrad_step_cpu(np.zeros((1, 1), np.uint32), np.zeros(1, np.uint64), "
        # The key is hashed anew where the map is made, which would hide what the kernel does.
        "slot_map('mix', 4, 4, 10**6)._replace(key=np.uint64(5)), 0.1, 0.0, gradient, sums, out); "
        "print(np.argmin(out))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}

    def first_slot():
        command = [sys.executable, "-c", program]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=True
        )
        return int(done.stdout)

    before = first_slot()
    assert before == first_slot()
    copy.write_text(copy.read_text().replace("U64(0xBF58476D1CE4E5B9)", "U64(0xBF58476D1CE4E5BB)"))
    assert first_slot() != before
