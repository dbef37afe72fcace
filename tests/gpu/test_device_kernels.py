"""Every CUDA kernel and product on a real device, against the reference."""

import dataclasses

import numpy as np
import pytest
from conftest import TROUBLE, on_a_device
from test_matmul import layers, passed

from robe.backend import ATOMIC, select
from robe.kernels.operations import OPERATIONS, module, version, versions
from robe.kernels.parts import launch
from robe.kernels.workbench.cases import CASES, WORDS, calls
from robe.matmul import rounded

pytestmark = on_a_device


@pytest.fixture(scope="module")
def gpu():
    return select("cuda")


# As many threads as there are by default, or few that must stride over the work. Skips take time, too.
@pytest.mark.parametrize("shape", [(launch.BLOCKS, launch.THREADS), (3, 64)], ids=["default", "small"])
@pytest.mark.parametrize("case", CASES if TROUBLE is None else CASES[:1], ids=lambda case: case.name)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_version_agrees_with_the_reference(operation, case, shape, gpu, monkeypatch):
    monkeypatch.setattr(launch, "BLOCKS", shape[0])
    monkeypatch.setattr(launch, "THREADS", shape[1])
    call = calls(case)[operation]
    expected = call.copy()
    version(operation, "reference")(*expected.values())
    names = [name for name in vars(module(operation)) if name.startswith(f"{operation}_cuda")]
    assert f"{operation}_cuda" in names
    for name in names:
        arrays = {n: gpu.to_device(a) if isinstance(a, np.ndarray) else a for n, a in call.copy().items()}
        getattr(module(operation), name)(*arrays.values())
        for output in call.outputs:
            # float32 sums of up to 128 values of order 10, in another order; as for `kernels check`.
            found = gpu.to_host(arrays[output])
            np.testing.assert_allclose(found, expected[output], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("operation", ATOMIC)
def test_deterministic_versions_repeat_bit_for_bit(operation, gpu):
    """Twenty times the case with the most additions to each slot."""
    kernel, results = getattr(select("cuda", deterministic=True).kernels, operation), set()
    case = next(case for case in CASES if case.name == "largest ids")._replace(rows=5000)
    call = calls(case)[operation]
    for _ in range(20):
        arrays = {n: gpu.to_device(a) if isinstance(a, np.ndarray) else a for n, a in call.copy().items()}
        kernel(*arrays.values())
        results.add(b"".join(gpu.to_host(arrays[output]).tobytes() for output in call.outputs))
    assert len(results) == 1


def test_a_host_array_is_refused(gpu):
    with pytest.raises(TypeError, match="host array"):
        gpu.kernels.sgd(np.zeros(5, np.float32), 0.1, np.zeros(5, np.float32))


def test_rounding_to_bfloat16_is_that_of_the_host(rng):
    words = rng.integers(0, 2**32, 100_000, dtype=np.uint64).astype(np.uint32)
    values = np.concatenate([words, words & ~np.uint32(0x7FFF), [0x7F800000, 0x7FFFFFFF]]).astype(np.uint32)
    values = values.view(np.float32)
    gpu = select("cuda", "bf16")
    words, found = (gpu.xp.empty(values.size, dtype) for dtype in (np.uint16, np.float32))
    gpu.short.store(gpu.to_device(values), words)
    gpu.short.load(words, found)
    np.testing.assert_array_equal(gpu.to_host(found), rounded(values, 7))  # NaN equals NaN here


@pytest.mark.parametrize("operation", WORDS)
def test_kernels_take_words_for_floats(operation, gpu):
    """What they make of the same numbers as floats, rounded; sums in another order perhaps."""
    call = calls(next(case for case in CASES if case.name == "Z < D")._replace(rows=500))[operation]
    short, names = select("cuda", "bf16").short, [n for n in versions(operation) if n.startswith("cuda")]
    for name in names:
        results = []
        for as_words in (True, False):
            arrays = {n: gpu.to_device(a) if isinstance(a, np.ndarray) else a for n, a in call.copy().items()}
            for argument in WORDS[operation]:
                words = gpu.xp.zeros(arrays[argument].shape, np.uint16)
                if argument not in call.outputs:
                    short.store(arrays[argument], words)
                    short.load(words, arrays[argument])
                if as_words:
                    arrays[argument] = words
            version(operation, name)(*arrays.values())
            results.append([gpu.to_host(arrays[output]) for output in call.outputs])
        for found, expected in zip(*results, strict=True):
            if found.dtype == np.uint16:
                found, expected = (found.astype(np.uint32) << 16).view(np.float32), rounded(expected, 7)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=name)


# Rounding both factors changes a product by at most 2^-bits of it, for 10 and 7 bits; float32 sums of 512
# products round by some 2^-23 each.
@pytest.mark.parametrize(
    ("precision", "least", "most"), [("fp32", 0, 1e-5), ("tf32", 1e-6, 1e-3), ("bf16", 1e-5, 8e-3)]
)
def test_products_are_of_their_precision(precision, least, most, rng):
    """As the layers multiply: whole, transposed, and with a strided view."""
    gpu = select("cuda", precision)

    def to_gpu(array):
        """In words where products want them."""
        whole = gpu.to_device(array)
        if not gpu.short:
            return whole
        words = gpu.xp.empty(array.shape, np.uint16)
        gpu.short.store(whole, words)
        return words

    a, b = rng.standard_normal((2, 512, 512)).astype(np.float32)
    wide = rng.standard_normal((512, 3, 512)).astype(np.float32)
    for x, y, x_there, y_there in (
        (a, b, to_gpu(a), to_gpu(b)),
        (a.T, b, to_gpu(a).T, to_gpu(b)),
        (wide[:, 0], b.T, to_gpu(wide)[:, 0], to_gpu(b).T),
        (a.T, wide[:, 0], to_gpu(a).T, to_gpu(wide)[:, 0]),
    ):
        out = gpu.xp.full((512, 512), np.nan, np.float32)
        gpu.matmul(x_there, y_there, out)
        exact, scale = x.astype(float) @ y.astype(float), abs(x).astype(float) @ abs(y).astype(float)
        error = (abs(gpu.to_host(out) - exact) / scale).max()
        assert least < error < most


# The layers of the MLPerf model, their inputs padded.
BOTTOM, TOP = (16, 512, 256, 128), (480, 1024, 1024, 512, 256, 1)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("widths", [BOTTOM, TOP, (13, 6, 5, 1)], ids=["bottom", "top", "small"])
@pytest.mark.parametrize("rows", [2048, 300, 1])
def test_layers_with_epilogues_are_those_without(rows, widths, precision):
    gpu, linear_end = select("cuda", precision), widths[-1] == 1
    results = []
    for backend in (gpu, dataclasses.replace(gpu, fused=None)):
        rng = np.random.default_rng(0)
        results.append(passed(layers(backend, rng, linear_end, widths, 2048), rng, rows, not linear_end))
    for found, expected in zip(*results, strict=True):
        # The same products, perhaps summed in another order; a value so near 0 that its sign is another then
        # changes its column.
        allowed = {"fp32": 1e-4, "tf32": 1e-3, "bf16": 1e-2}[precision] * np.linalg.norm(expected)
        assert np.linalg.norm(found - expected) <= allowed


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("widths", [BOTTOM, TOP], ids=["bottom", "top"])
def test_cublaslt_has_all_epilogues_of_the_mlperf_model(widths, precision):
    gpu = select("cuda", precision)
    rng = np.random.default_rng(0)
    passed(layers(gpu, rng, widths[-1] == 1, widths, 2048), rng, 2048, widths[-1] != 1)
    plans = gpu.fused.plans
    assert plans
    assert [key for key, plan in plans.items() if plan.algorithm is None] == []


def test_products_are_captured_on_the_stream_they_are_told(rng):
    import cupy

    gpu, stream = select("cuda"), cupy.cuda.Stream(non_blocking=True)
    x, weight = (gpu.to_device(rng.standard_normal((256, 256)).astype(np.float32)) for _ in range(2))
    bias, out = (cupy.empty(shape, np.float32) for shape in (256, (256, 256)))
    cupy.cuda.Stream.null.synchronize()
    gpu.matmul.use(stream.ptr)

    def products():
        bias.fill(1)
        gpu.matmul(x, weight, out)
        assert gpu.fused("rectified", x, weight, out, bias, None)

    with stream:
        products()  # loads what the library needs
        stream.begin_capture()
        products()
        graph = stream.end_capture()
        stream.synchronize()
        out.fill(0)
        graph.launch()
    stream.synchronize()
    np.testing.assert_allclose(out.get(), np.maximum(x.get() @ weight.get() + 1, 0), rtol=1e-4, atol=1e-3)
