"""Which kernels and products a backend gets, and what is refused."""

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from robe import backend
from robe.backend import select
from robe.kernels import interaction_scatter, scatter_add
from robe.kernels.operations import OPERATIONS, version
from robe.packages import extra


@pytest.fixture
def fixed_order(monkeypatch):
    """Stand-ins for the versions in a fixed order, and a device that runs nothing."""
    kernels = {}
    for module in (scatter_add, interaction_scatter):
        name = module.__name__.split(".")[-1]
        kernels[name] = object()
        monkeypatch.setattr(module, f"{name}_cuda_deterministic", kernels[name], raising=False)
    monkeypatch.setattr(backend, "simulator", lambda: True)
    return kernels


def test_deterministic_takes_the_kernels_in_a_fixed_order(fixed_order):
    chosen = select("cuda", deterministic=True)
    for operation, kernel in vars(chosen.kernels).items():
        assert kernel is fixed_order.get(operation, version(operation, "cuda"))
    assert not chosen.fuses_scatter
    assert select("cuda").fuses_scatter


@pytest.mark.parametrize(("name", "deterministic"), [("cuda", False), ("cpu", True), ("reference", True)])
def test_other_backends_have_one_version(name, deterministic, fixed_order):
    kernels = select(name, deterministic=deterministic).kernels
    assert all(getattr(kernels, operation) is version(operation, name) for operation in OPERATIONS)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_precision_is_that_of_the_products(name):
    x = np.full((1, 1), 1 + 2.0**-9, np.float32)  # more than bf16's 7 bits
    for precision, expected in (("fp32", x), ("tf32", x), ("bf16", [[1]])):
        out = np.empty((1, 1), np.float32)
        chosen = select(name, precision)
        chosen.matmul(x, np.ones((1, 1), np.float32), out)
        np.testing.assert_array_equal(out, expected)
        assert ("emulated" in chosen.description) == (precision != "fp32")


class TestTrouble:
    @pytest.fixture(autouse=True)
    def device(self, monkeypatch):
        """A machine with a device, numba-cuda and CuPy, by the look of it."""
        monkeypatch.setattr("numba.cuda.implementation", "NVIDIA")
        monkeypatch.setattr(backend, "simulator", lambda: False)
        monkeypatch.setattr("numba.cuda.is_available", lambda: True)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))

    def test_there_is_none(self):
        assert backend.cuda_trouble() is None

    def test_no_cupy_names_the_extra(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert f"needs CuPy: {extra('cuda13')}" in backend.cuda_trouble()
        with pytest.raises(backend.BackendError, match="CuPy"):
            select("cuda")

    def test_no_numba_cuda_names_the_extra_before_the_device_is_looked_for(self, monkeypatch):
        monkeypatch.setattr("numba.cuda.implementation", "Built-in")
        monkeypatch.setattr("numba.cuda.is_available", lambda: pytest.fail("asked Numba for a device"))
        with pytest.raises(backend.BackendError, match="needs numba-cuda and CuPy: pip install"):
            select("cuda")
        assert select("auto").name == "cpu"

    def test_no_device_names_the_ways_out(self, monkeypatch):
        monkeypatch.setattr("numba.cuda.is_available", lambda: False)
        assert "--backend cpu, or set NUMBA_ENABLE_CUDASIM=1" in backend.cuda_trouble()

    @pytest.mark.parametrize("precision", ["tf32", "bf16"])
    def test_a_device_without_a_precision_is_refused(self, precision, monkeypatch):
        device = SimpleNamespace(id=0, compute_capability="75")
        runtime = SimpleNamespace(getDeviceProperties=lambda number: {"name": b"Old"})
        cupy = SimpleNamespace(cuda=SimpleNamespace(Device=lambda: device, runtime=runtime))
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setitem(sys.modules, "cupyx", SimpleNamespace())
        with pytest.raises(backend.BackendError, match=f"Old has no {precision}; use --backend cpu"):
            select("cuda", precision)

    @pytest.mark.parametrize("library", ["CUPY", "NUMBA"])
    def test_streams_of_their_own_are_refused(self, library, monkeypatch):
        """Kernels and CuPy would no longer run in one order."""
        variable = f"{library}_CUDA_PER_THREAD_DEFAULT_STREAM"
        monkeypatch.setenv(variable, "1")
        assert backend.cuda_trouble().startswith(f"{variable} is set")
        monkeypatch.setenv(variable, "0")
        assert backend.cuda_trouble() is None


@pytest.mark.parametrize("shape", [(3, 5), (1,), (7, 2, 16)])
def test_arrays_for_kernels_begin_on_a_cache_line(shape):
    for dtype in (np.float32, np.float64):
        arrays = [select("cpu").empty(shape, dtype) for _ in range(20)]
        assert {(a.shape, a.dtype, a.ctypes.data % 64) for a in arrays} == {(shape, np.dtype(dtype), 0)}
        assert all(a.flags.c_contiguous and a.flags.writeable for a in arrays)
