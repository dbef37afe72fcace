"""bfloat16 activations: words against rounding by NumPy, kernels that read and write them, trained models."""

import dataclasses

import numba
import numpy as np
import pytest
from conftest import needs_simulator
from test_matmul import fused, load, store
from test_model import batch, settings

from robe.backend import select
from robe.kernels.operations import version, versions
from robe.kernels.parts.bfloat import from_bfloat, kept, number, to_bfloat
from robe.kernels.workbench.cases import CASES, WORDS, calls
from robe.matmul import rounded
from robe.model import build

pytestmark = pytest.mark.kernels


@numba.njit
def there_and_back(numbers, words, floats):
    back = np.empty_like(numbers)
    for i in range(numbers.size):
        words[i], floats[i] = kept(words, numbers[i]), kept(floats, numbers[i])
        back[i] = number(words[i]) + np.float32(0) * number(floats[i])
    return back


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # the NaN with all bits
@pytest.mark.parametrize("compiled", [True, False])
def test_words_are_the_upper_halves_of_rounded_numbers(compiled, rng):
    bits = rng.integers(0, 2**32, 3000, dtype=np.uint64).astype(np.uint32)
    ties = bits & ~np.uint32(0xFFFF) | np.uint32(0x8000)
    bits = np.concatenate([bits, ties, ties - 1, ties + 1, [0, 2**31, 0x7F7FFFFF, 0x7F800000]])
    numbers = bits.astype(np.uint32).view(np.float32)
    numbers = numbers[~np.isnan(numbers)]
    words, floats = np.zeros(numbers.size, np.uint16), np.zeros_like(numbers)
    convert = there_and_back if compiled else there_and_back.py_func
    with np.errstate(all="ignore"):
        convert(numbers, words, floats)
    expected = rounded(numbers, 7).view(np.uint32) >> 16
    np.testing.assert_array_equal(words, expected)
    np.testing.assert_array_equal(floats, numbers)
    for bits in (0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF):
        with np.errstate(all="ignore"):
            assert np.isnan(from_bfloat(to_bfloat(np.uint32(bits).view(np.float32))))


def floats(words):
    out = np.empty(words.shape, np.float32)
    load(words, out)
    return out


SOME = [case for case in CASES if case.name in ("Z < D", "D = 1", "empty batch")]


@needs_simulator
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("operation", "name"),
    [(operation, name) for operation in WORDS for name in versions(operation) if name.startswith("cuda")],
)
def test_kernels_take_words_for_floats(operation, name, case):
    """What they make of the same numbers as floats, rounded; atomic additions in another order perhaps."""
    call, kernel, results = calls(case)[operation], version(operation, name), []
    for as_words in (True, False):
        arrays = call.copy()
        for argument in WORDS[operation]:
            words = np.zeros(arrays[argument].shape, np.uint16)
            if argument not in call.outputs:
                store(arrays[argument], words)
            if as_words:
                arrays[argument] = words
            elif argument not in call.outputs:
                arrays[argument] = floats(words)
        kernel(*arrays.values())
        results.append([arrays[output] for output in call.outputs])
    for found, expected in zip(*results, strict=True):
        if found.dtype == np.uint16:
            found, expected = floats(found), rounded(expected, 7)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 if "scatter" in operation else 0)


@needs_simulator
@pytest.mark.parametrize("refused", [(), (6, 134, 152)], ids=["epilogues", "kernels"])
def test_a_model_of_words_trains_as_the_emulated_one(refused):
    """As on a GPU, with cuBLAS and cuBLASLt by NumPy, and as on a CPU, where words are rounded floats."""
    config, data = settings("sgd", block=2)
    products, lt = fused("bf16", dict.fromkeys(refused, "raise"))
    backend = dataclasses.replace(products, kernels=select("cuda").kernels, multiple=8, fuses_scatter=True)
    models = [build(config, data, each, "float32") for each in (backend, select("reference", "bf16"))]
    assert models[0].interaction.out.dtype == models[0].factors.dtype == np.uint16
    for step in range(10):
        found, expected = (model.step(*batch("float32", step), 0.05) for model in models)
        # Sums in another order are now and then rounded to the other of two neighbours, 2^-8 apart.
        np.testing.assert_allclose(found, expected, rtol=2e-3)
    for (name, found), expected in zip(models[0].state().items(), models[1].state().values(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-3, err_msg=name)
    assert {kind for kind, *_ in lt.calls} == {6, 134, 152} - set(refused)
    assert not models[0].dense_parameters.reshape(-1)[3 * 6 : 8 * 6].any()  # rows of padded columns
    _, dense, ids = batch("float32")
    logits = [model.predict(dense, ids).copy() for model in models]
    np.testing.assert_allclose(*logits, rtol=2e-2, atol=1e-3)
    np.testing.assert_array_equal(logits[0], models[0].forward(dense, ids))


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_what_products_read_and_hand_on_is_rounded_and_weights_are_not(name):
    config, data = settings("adagrad", block=2)
    model = build(config, data, select(name, "bf16"), "float32")
    model.step(*batch("float32"), 0.05)
    short = [
        *(model.dense, model.factors, model.interaction.out, model.bottom.d_last, model.top.d_first),
        *(array for mlp in (model.bottom, model.top) for array in (*mlp.products[:-1], *mlp.d_inputs)),
    ]
    for array in short:
        used = array[: len(batch()[0])] if array.ndim == 2 else array
        np.testing.assert_array_equal(used, rounded(used, 7))
        assert used.any()
    for array in (model.dense_parameters, model.dense_gradient, model.embedding.memory, model.d_logits):
        assert (array != rounded(array, 7)).any()
    # Rounded once more for the next step, from the weights as they are then.
    model.step(*batch("float32", 1), 0.05)
    before = model.factors.copy()
    model.predict(*batch("float32")[1:])
    assert (before != model.factors).any()


def test_it_is_near_float32_and_is_not_it():
    config, data = settings("sgd", block=2)
    losses = {}
    for precision in ("fp32", "bf16"):
        model = build(config, data, select("cpu", precision), "float32")
        losses[precision] = [model.step(*batch("float32", step), 0.05).mean() for step in range(20)]
    # Factors of 8 bits in five products, one behind the other.
    np.testing.assert_allclose(losses["bf16"], losses["fp32"], rtol=1e-2)
    assert not np.allclose(losses["bf16"], losses["fp32"], rtol=1e-6)
