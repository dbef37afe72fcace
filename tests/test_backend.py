"""Which kernels and products a backend gets, and what is refused."""

import dataclasses
import importlib.util
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
from cublas_by_numpy import Blas, BlasLt, Shared

from robe import backend
from robe.backend import among, select, simulator
from robe.kernels import code_step, interaction_scatter, scatter_add
from robe.kernels.operations import OPERATIONS, version
from robe.nccl import Nccl
from robe.packages import extra


@pytest.fixture
def fixed_order(monkeypatch):
    """Stand-ins for the versions in a fixed order, and a device that runs nothing."""
    kernels = {}
    for module, name in (
        (scatter_add, "scatter_add"),
        (code_step, "code_step"),
        (interaction_scatter, "interaction_scatter"),
        (interaction_scatter, "gather_interaction_backward"),
    ):
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
    x = np.full((1, 1), 1 + 2.0**-11, np.float32)  # more than tf32's 10 bits
    for precision, expected in (("fp32", x), ("tf32", [[1]]), ("bf16", x)):
        out = np.empty((1, 1), np.float32)
        chosen = select(name, precision)
        chosen.matmul(x, np.ones((1, 1), np.float32), out)
        np.testing.assert_array_equal(out, expected)
        assert (chosen.short is not None) == (precision == "bf16")
        if chosen.short:
            chosen.short.store(x, out)
            np.testing.assert_array_equal(out, [[1]])
        assert ("emulated" in chosen.description) == (precision != "fp32")


class TestTrouble:
    @pytest.fixture(autouse=True)
    def device(self, monkeypatch):
        """A machine with a device, a driver for CUDA 13.0, numba-cuda and CuPy, by the look of it."""
        self.device_properties = SimpleNamespace(id=0, compute_capability="75")
        self.runtime = SimpleNamespace(
            getDeviceCount=lambda: 1, getDeviceProperties=lambda number: {"name": b"Old"}
        )
        cupy = SimpleNamespace(
            cuda=SimpleNamespace(Device=lambda: self.device_properties, runtime=self.runtime)
        )
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setitem(sys.modules, "cupyx", SimpleNamespace())
        monkeypatch.setattr("numba.cuda.implementation", "NVIDIA")
        monkeypatch.setattr(backend, "simulator", lambda: False)
        monkeypatch.setattr("numba.cuda.is_available", lambda: True)
        monkeypatch.setattr("numba.cuda.cudadrv.driver.get_version", lambda: (13, 0), raising=False)
        monkeypatch.setattr("numba.cuda.runtime.get_version", lambda: (13, 3), raising=False)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))

    def trouble(self):
        """What is said, by `select` too, in a line; `auto` goes on without a device."""
        with pytest.raises(backend.BackendError) as raised:
            select("cuda")
        assert str(raised.value) == backend.cuda_trouble()
        assert "\n" not in backend.cuda_trouble()
        assert select("auto").name == "cpu"
        return backend.cuda_trouble()

    def test_there_is_none(self):
        assert backend.cuda_trouble() is None

    @pytest.mark.parametrize(("package", "title"), [("cupy", "CuPy"), ("nvmath", "nvmath-python")])
    def test_a_missing_package_names_the_extra(self, package, title, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else name)
        assert f"needs {title}: {extra('cuda13')}" in self.trouble()

    def test_no_numba_cuda_names_the_extra_before_the_device_is_looked_for(self, monkeypatch):
        monkeypatch.setattr("numba.cuda.implementation", "Built-in")
        monkeypatch.setattr("numba.cuda.is_available", lambda: pytest.fail("asked Numba for a device"))
        assert "needs numba-cuda and CuPy: pip install" in self.trouble()

    def test_no_device_names_the_ways_out(self, monkeypatch):
        monkeypatch.setattr("numba.cuda.is_available", lambda: False)
        error = "numba.cuda.cudadrv.driver.driver.initialization_error"
        monkeypatch.setattr(error, "Found\nno library", raising=False)  # the simulator has none
        assert "driver was found; use --backend cpu, or set NUMBA_ENABLE_CUDASIM=1" in self.trouble()
        monkeypatch.setattr(error, "Call results in CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (803)")
        assert "was found (CUDA_ERROR_SYSTEM_DRIVER_MISMATCH); use --backend cpu" in self.trouble()
        monkeypatch.setattr(error, None)  # the driver is fine
        assert self.trouble().startswith(f"NVIDIA's compiler (NVVM) was not found: {extra('cuda13')}")

    def test_packages_that_do_not_fit_are_told(self, monkeypatch):
        trouble = ImportError("NVIDIA CUDA Python bindings not found.\nInstall them")
        monkeypatch.setattr(backend, "NUMBA_CUDA_TROUBLE", trouble)
        told = "numba-cuda does not load (ImportError: NVIDIA CUDA Python bindings not found. Install them): "
        assert self.trouble().startswith(told + extra("cuda13"))

    def test_an_older_driver_names_its_extra(self, monkeypatch):
        monkeypatch.setattr("numba.cuda.cudadrv.driver.get_version", lambda: (12, 4))
        assert self.trouble().startswith("the driver is for CUDA 12.4, numba-cuda for CUDA 13; update the")

    def test_cupy_that_does_not_load_is_told(self, monkeypatch):
        def too_old():
            raise RuntimeError("cudaErrorInsufficientDriver:\ndriver is insufficient")

        self.runtime.getDeviceCount = too_old
        told = "CuPy does not load (RuntimeError: cudaErrorInsufficientDriver: driver is insufficient): pip"
        assert self.trouble().startswith(told)
        monkeypatch.setitem(sys.modules, "cupy", None)
        assert self.trouble().startswith("CuPy does not load (ModuleNotFoundError: import of cupy")

    @pytest.mark.parametrize("precision", ["tf32", "bf16"])
    def test_a_device_without_a_precision_is_refused(self, precision, monkeypatch):
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

    def test_several_processes_exchange_by_nccl_on_a_stream_of_their_own(self, libraries, monkeypatch):
        cuda = sys.modules["cupy"].cuda
        monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
        cuda.Stream.side_effect = lambda non_blocking: object()
        made = select("cuda")
        ranks = among(made, SimpleNamespace(size=2, comm=SimpleNamespace(rank=1, size=2))).ranks
        assert (type(ranks), ranks.rank, ranks.nccl) == (Nccl, 1, cuda.nccl)
        (streams,) = made.feed.args
        assert ranks.streams == dataclasses.replace(streams, copies=ranks.streams.copies) != streams

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


BROKEN = """if True:
    import {module}, sys
    {damage}
    from robe.cli import main
    from robe.kernels.operations import OPERATIONS, module
    list(map(module, OPERATIONS))
    main({command})
"""
NO_BINDINGS = {
    "module": "importlib.util as util",
    "damage": "find = util.find_spec; util.find_spec = lambda name, *of: "
    "None if name == 'cuda.bindings' else find(name, *of)",
}
NO_ROW_STACK = {
    "module": "numpy as np",
    "damage": "np.__all__ = [n for n in np.__all__ if n != 'row_stack']; vars(np).pop('row_stack', None)",
}


def run_broken(damage, command):
    program = BROKEN.format(**damage, command=command)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)


def test_numba_cuda_that_does_not_load_costs_a_cpu_nothing():
    pytest.importorskip("numba_cuda")
    done = run_broken(NO_BINDINGS, ["plan"])
    assert done.returncode == 0, done.stderr
    done = run_broken(NO_BINDINGS, ["train", "--backend", "cuda"])
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: numba-cuda does not load (ImportError: NVIDIA CUDA Python bindings not ")
    assert line.endswith("or use --backend cpu")


@pytest.mark.skipif(simulator(), reason="the simulator compiles nothing")
def test_numpy_without_row_stack_compiles_for_cuda():
    """As from 2.5 on, where numba-cuda 0.30 still asks for it."""
    pytest.importorskip("numba_cuda")
    done = run_broken(NO_ROW_STACK, ["kernels", "show", "sgd", "--as", "ptx"])
    assert done.returncode == 0, done.stderr
    assert ".target sm_" in done.stdout


@pytest.mark.parametrize("shape", [(3, 5), (1,), (7, 2, 16)])
def test_arrays_for_kernels_begin_on_a_cache_line(shape):
    for dtype in (np.float32, np.float64):
        arrays = [select("cpu").empty(shape, dtype) for _ in range(20)]
        assert {(a.shape, a.dtype, a.ctypes.data % 64) for a in arrays} == {(shape, np.dtype(dtype), 0)}
        assert all(a.flags.c_contiguous and a.flags.writeable for a in arrays)
