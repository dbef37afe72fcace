"""Compiled kernels: where they are kept, that damage to them costs a compilation and not a command."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from numba.core.registry import CPUDispatcher
from test_inspection import ROOT, needs_compiler

from robe.kernels.operations import OPERATIONS, module
from robe.kernels.parts import disk_cache

PROGRAM = """if True:
    import numpy as np
    from robe.kernels.sgd import sgd_cpu
    weights = np.ones(3, np.float32)
    sgd_cpu(np.ones(3, np.float32), 0.25, weights)
    print(weights.tolist())
"""
STEPPED = ["[0.75, 0.75, 0.75]"]


# Compiles two CUDA kernels, one made by a walk, for an H100 that is not there, and prints how many came from
# the folder and how many were compiled.
CUDA_PROGRAM = """if True:
    from types import SimpleNamespace as Fake
    import numpy as np
    import numba.cuda
    from numba import typeof
    device = Fake(compute_capability=(9, 0), id=0)
    loaded = Fake(get_function=lambda name: Fake(name=name, module=Fake(initialized=True)))
    context = Fake(device=device, create_module_image=lambda *image: loaded)
    numba.cuda.cudadrv.devices.get_context = lambda: context
    numba.cuda.dispatcher.get_current_device = lambda: device
    from robe.kernels.gather import gather_cuda
    from robe.kernels.parts import launch
    from robe.kernels.parts.hashing import slot_map
    from robe.kernels.sgd import sgd_cuda
    started = []
    def start(kernel, shape, arguments):
        kernel.compile(tuple(map(typeof, arguments))).library.get_cubin()
        started.append(kernel)
    launch.start = start
    sgd_cuda(np.ones(3, np.float32), 0.25, np.ones(3, np.float32))
    ids, base, out = np.zeros((2, 1), np.uint32), np.zeros(1, np.uint64), np.zeros((2, 1, 8), np.float32)
    gather_cuda(np.ones(100, np.float32), ids, base, slot_map("mix", 8, 4, 100), out)
    stats = [kernel.stats for kernel in started]
    print(sum(sum(s.cache_hits.values()) for s in stats), sum(sum(s.cache_misses.values()) for s in stats))
"""
NO_COMPILER = """if True:
    from numba.cuda.cudadrv import driver, nvvm
    nvvm.compile_ir = driver._Linker = None
""" + CUDA_PROGRAM.removeprefix("if True:\n")


def run(cache, program=PROGRAM, sources=None):
    """(what the program printed, its complaints, whether it read a kernel that was kept in `cache`).

    sources: the folder of the packages that it imports, if not these.
    """
    environment = os.environ if sources is None else {**os.environ, "PYTHONPATH": str(sources)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=sources,
        env={**environment, "NUMBA_CACHE_DIR": str(cache), "NUMBA_DEBUG_CACHE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    printed = [line for line in lines if not line.startswith("[cache]")]
    return printed, done.stderr, any(line.startswith("[cache] data loaded") for line in lines)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with one compiled kernel."""
    folder = tmp_path_factory.mktemp("kept")
    assert run(folder) == (STEPPED, "", False)
    assert run(folder) == (STEPPED, "", True)
    return folder


def copy_of_the_sources(folder):
    for package in ("robe", "data_pipeline"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT.parents[1] / package, folder / package, ignore=ignore)
    return folder


def flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("suffix", "damages"),
    [
        (".nbi", (lambda data: b"", lambda data: data[:-40])),
        (".nbc", (lambda data: b"", lambda data: data[:-1], lambda data: bytes(len(data)), flip)),
    ],
)
def test_a_damaged_kernel_is_compiled_anew(kept, suffix, damages):
    for damage in damages:
        (path,) = kept.rglob(f"*{suffix}")
        path.write_bytes(damage(path.read_bytes()))
        complaint = f"{path.parents[1]}: held damaged kernels, which are compiled anew\n"
        assert run(kept) == (STEPPED, complaint, False)
    assert run(kept) == (STEPPED, "", True)


def test_the_same_sources_elsewhere_share_what_was_compiled(kept, tmp_path):
    copy = copy_of_the_sources(tmp_path)
    assert run(kept, sources=copy) == (STEPPED, "", True)
    with (copy / "robe/kernels/parts/hashing.py").open("a") as file:
        file.write("# edited\n")
    assert run(kept, sources=copy) == (STEPPED, "", False)


def test_kernels_of_one_walk_do_not_collide(tmp_path):
    """Both are the function `walk` with the same types of arguments; a second process compiles nothing."""
    program = """if True:
        import numpy as np
        from numba.extending import register_jitable
        from robe.kernels.parts.walks import nothing, rows
        def kernel(number):
            @register_jitable
            def write(state, layout, base, kept, b, ids, following):
                state[0][b] = number
            return rows(nothing, write)
        ids, base = np.zeros((2, 1), np.uint32), np.zeros(1, np.uint64)
        for walk in (kernel(3.0), kernel(5.0)):
            out = np.zeros(2, np.float32)
            walk((out,), 0, ids, base)
            stats = walk.stats
            print(out.tolist(), sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
    """
    assert run(tmp_path, program)[0] == ["[3.0, 3.0] 0 1", "[5.0, 5.0] 0 1"]
    assert run(tmp_path, program)[0] == ["[3.0, 3.0] 1 0", "[5.0, 5.0] 1 0"]


@pytest.fixture(scope="module")
def kept_cuda(tmp_path_factory):
    """A folder with two compiled CUDA kernels."""
    folder = tmp_path_factory.mktemp("kept")
    assert run(folder, CUDA_PROGRAM)[:2] == (["0 2"], "")
    return folder


@needs_compiler
def test_a_second_process_compiles_no_cuda_kernel(kept_cuda):
    assert run(kept_cuda, NO_COMPILER) == (["2 0"], "", True)


@needs_compiler
def test_a_damaged_cuda_kernel_is_compiled_anew(kept_cuda):
    (path,) = kept_cuda.rglob("sgd.*.nbc")
    path.write_bytes(flip(path.read_bytes()))
    complaint = f"{path.parents[1]}: held damaged kernels, which are compiled anew\n"
    assert run(kept_cuda, CUDA_PROGRAM)[:2] == (["1 1"], complaint)
    assert run(kept_cuda, NO_COMPILER)[:2] == (["2 0"], "")


@needs_compiler
def test_an_edit_of_the_hash_is_noticed(kept_cuda, tmp_path):
    """All kernels are compiled anew, though their own files are as they were; in a copy of them none is."""
    copy = copy_of_the_sources(tmp_path)
    assert run(kept_cuda, NO_COMPILER, copy)[0] == ["2 0"]
    with (copy / "robe/kernels/parts/hashing.py").open("a") as file:
        file.write("# edited\n")
    assert run(kept_cuda, CUDA_PROGRAM, copy)[0] == ["0 2"]


@needs_compiler
def test_every_cuda_kernel_is_kept():
    from numba.cuda.dispatcher import CUDADispatcher

    for operation in OPERATIONS:
        for name, kernel in vars(module(operation)).items():
            if isinstance(kernel, CUDADispatcher):
                assert type(kernel._cache).__name__ == "CudaKernelCache", f"{name} has no cache=True"


def test_what_a_parallel_loop_calls_is_compiled_once():
    """Its body divides as NumPy does, so the function around it must, or Numba compiles each callee twice."""
    found = [
        (name, kernel.targetoptions.get("error_model"))
        for operation in OPERATIONS
        for name, kernel in vars(module(operation)).items()
        if isinstance(kernel, CPUDispatcher) and kernel.targetoptions.get("parallel")
    ]
    assert len(found) > 20
    assert {model for _, model in found} == {"numpy"}, found


def test_what_cannot_be_kept_is_compiled_each_time(tmp_path):
    (tmp_path / "file").write_text("")
    complaint = (
        "compiled kernels can be kept nowhere; they are compiled anew each time; "
        "set NUMBA_CACHE_DIR to a folder with room that you may write\n"
    )
    assert run(tmp_path / "file") == (STEPPED, complaint, False)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ('OSError(28, "No space left")', "compiled kernels cannot be kept (No space left)"),
        ('RuntimeError("it is linked")', "cannot be kept, and is compiled anew each time: it is linked"),
    ],
)
def test_what_cannot_be_written_is_said_once(error, told, tmp_path):
    program = f"""if True:
        import numpy as np
        from numba.core.caching import IndexDataCacheFile
        from robe.kernels.sgd import sgd_cpu
        def full(*arguments):
            raise {error}
        IndexDataCacheFile._save_data = full
        for dtype in (np.float32, np.float64):
            weights = np.ones(3, dtype)
            sgd_cpu(np.ones(3, dtype), 0.25, weights)
        print(weights.tolist())
    """
    printed, complaints, _ = run(tmp_path, program)
    assert printed == STEPPED
    assert complaints.count("\n") == 1
    assert told in complaints


def test_functions_of_others_are_cached_where_numba_would(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numba, robe.kernels.sgd\n"
        "@numba.njit(cache=True)\n"
        "def twice(x): return 2 * x\n"
        "print(twice(4), numba.config.CACHE_DIR == '')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    path = os.pathsep.join([str(Path(disk_cache.__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "mine.py")],
        env=environment | {"PYTHONPATH": path},
        **{"capture_output": True, "text": True, "timeout": 300},
    )
    assert done.stdout == "8 True\n", done.stderr
    assert len(list((tmp_path / "__pycache__").glob("mine.twice-*.nbi"))) == 1


class TestFolder:
    """Root may write everywhere, so what may not be written is told by a stand-in for `os.access`."""

    @pytest.fixture(autouse=True)
    def user(self, monkeypatch, tmp_path):
        """A user with a home, who may not write the installation."""
        self.forbidden = [disk_cache.KERNELS]
        monkeypatch.setattr(
            os, "access", lambda path, mode: not any(Path(path).is_relative_to(f) for f in self.forbidden)
        )
        monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
        self.tmp, self.temporary = tmp_path, tmp_path / f"robe-dlrm-{os.getuid()}"

    def parent(self):
        found = disk_cache.folder.__wrapped__()
        assert found is None or found.name.startswith("kernels-")
        return found and found.parent

    def test_beside_the_kernels_where_that_may_be_written(self):
        self.forbidden.clear()
        assert self.parent() == disk_cache.KERNELS / "__pycache__"

    def test_with_the_user_of_a_readonly_installation(self):
        assert self.parent() == self.tmp / "home/.cache/robe-dlrm"

    def test_where_the_user_keeps_caches(self, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.tmp / "caches"))
        assert self.parent() == self.tmp / "caches/robe-dlrm"
        monkeypatch.setenv("XDG_CACHE_HOME", "caches")  # to be ignored
        assert self.parent() == self.tmp / "home/.cache/robe-dlrm"

    def test_where_it_is_asked_for(self, monkeypatch):
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(self.tmp / "asked"))
        assert self.parent() == self.tmp / "asked"
        self.forbidden.append(self.tmp / "asked")
        (self.tmp / "asked").mkdir()
        assert self.parent() is None

    def test_in_a_folder_that_another_user_made_inside_ours(self):
        """As root did, who ran the program before."""
        self.forbidden = [disk_cache.folder.__wrapped__()]
        self.forbidden[0].mkdir(parents=True, exist_ok=True)
        assert self.parent() != self.forbidden[0].parent

    def test_among_temporary_files_without_a_home(self, monkeypatch):
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user that the system does not know
        assert self.parent() == self.temporary
        assert self.temporary.stat().st_mode & 0o777 == 0o700
        assert self.parent() == self.temporary

    def test_never_in_a_temporary_folder_that_others_may_have_filled(self):
        self.forbidden.append(self.tmp / "home")
        (self.tmp / "home").mkdir()
        self.temporary.mkdir(mode=0o777)
        self.temporary.chmod(0o777)
        assert self.parent() is None
        self.temporary.chmod(0o700)
        assert self.parent() == self.temporary

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
    def test_never_in_a_temporary_folder_of_another_user(self):
        self.forbidden.append(self.tmp / "home")
        (self.tmp / "home").mkdir()
        self.temporary.mkdir(mode=0o700)
        os.chown(self.temporary, 54321, -1)
        assert self.parent() is None

    def test_never_behind_a_link(self):
        self.forbidden.append(self.tmp / "home")
        (self.tmp / "home").mkdir()
        (self.tmp / "elsewhere").mkdir(mode=0o700)
        self.temporary.symlink_to(self.tmp / "elsewhere")
        assert self.parent() is None
