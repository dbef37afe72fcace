"""Which kernels and products a backend gets, and what is refused."""

import importlib.util
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
from cublas_by_numpy import Blas, BlasLt, Shared

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

    @pytest.mark.parametrize(("package", "title"), [("cupy", "CuPy"), ("nvmath", "nvmath-python")])
    def test_a_missing_package_names_the_extra(self, package, title, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else name)
        assert f"needs {title}: {extra('cuda13')}" in backend.cuda_trouble()
        with pytest.raises(backend.BackendError, match=title):
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

    @pytest.fixture
    def libraries(self, monkeypatch):
        """Doubles of all that a device is used by; of cuBLAS those that compute."""
        for name in ("cupy", "cupyx", "numba.cuda.core"):
            monkeypatch.setitem(sys.modules, name, MagicMock())
        sys.modules["cupy"].empty = lambda shape, dtype: np.empty(shape, dtype).view(Shared)
        found = {"cublas": Blas(), "cublasLt": BlasLt()}
        monkeypatch.setattr(backend, "bindings", lambda *names: [found[name] for name in names])
        return found

    def test_products_of_a_device_share_precision_stream_and_workspace(self, libraries):
        made = select("cuda", "fp32")
        made.matmul.use(3)
        x, weight = np.ones((2, 8, 8), np.float32).view(Shared)
        bias, out = np.ones(8, np.float32).view(Shared), np.empty((8, 8), np.float32).view(Shared)
        assert made.fused("rectified", x, weight, out, bias, None)
        np.testing.assert_array_equal(out, np.full((8, 8), 9))
        ((_, space, _, stream),) = libraries["cublasLt"].calls
        assert (space, stream) == (libraries["cublas"].workspace[0], libraries["cublas"].stream)
        assert stream == 3
        assert made.padded(479) == 480

    def test_a_cublas_that_cannot_be_loaded_costs_a_line(self, libraries, monkeypatch):
        def create():
            raise RuntimeError("no library found")

        monkeypatch.setattr(libraries["cublasLt"], "create", create)
        with pytest.raises(
            backend.BackendError, match=r"^cuBLAS cannot be used \(no library found\): pip inst"
        ):
            select("cuda")

    @pytest.mark.parametrize("library", ["CUPY", "NUMBA"])
    def test_streams_of_their_own_are_refused(self, library, monkeypatch):
        """Kernels and CuPy would no longer run in one order."""
        variable = f"{library}_CUDA_PER_THREAD_DEFAULT_STREAM"
        monkeypatch.setenv(variable, "1")
        assert backend.cuda_trouble().startswith(f"{variable} is set")
        monkeypatch.setenv(variable, "0")
        assert backend.cuda_trouble() is None


@pytest.fixture
def nvmath(tmp_path, monkeypatch):
    """A package whose import is a mistake, and modules in it that are not."""
    folder = tmp_path / "nvmath" / "bindings"
    folder.mkdir(parents=True)
    (tmp_path / "nvmath" / "__init__.py").write_text("imported = True\n")
    (folder / "__init__.py").write_text("from nvmath.bindings import cublas\n")
    for name in ("cublas", "cublasLt"):
        (folder / f"{name}.py").write_text(f"name = {name!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "nvmath"]:
        del sys.modules[name]


def test_bindings_come_without_the_rest_of_nvmath(nvmath):
    assert [module.name for module in backend.bindings("cublas", "cublasLt")] == ["cublas", "cublasLt"]
    assert "nvmath" not in sys.modules
    import nvmath as whole

    assert whole.imported
    assert sys.modules["nvmath.bindings.cublas"] is backend.bindings("cublas")[0]
    assert sys.modules["nvmath"] is whole


@pytest.mark.parametrize("shape", [(3, 5), (1,), (7, 2, 16)])
def test_arrays_for_kernels_begin_on_a_cache_line(shape):
    for dtype in (np.float32, np.float64):
        arrays = [select("cpu").empty(shape, dtype) for _ in range(20)]
        assert {(a.shape, a.dtype, a.ctypes.data % 64) for a in arrays} == {(shape, np.dtype(dtype), 0)}
        assert all(a.flags.c_contiguous and a.flags.writeable for a in arrays)
