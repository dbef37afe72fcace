"""Where compiled kernels are kept between two runs of the program, and what happens to damaged ones.

Numba's own cache trusts its files: one that a power cut left half written ends every command with a
traceback. It also misses an edit to a function that a kernel imports, such as the hash, and would go on
running the old code. Both are mended here, for the functions of this project alone; others under
`@njit(cache=True)` or `@cuda.jit(cache=True)` are cached by Numba as ever.
"""

import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import numba
import numba.core.dispatcher
from numba.core.caching import (
    CompileResultCacheImpl,
    FunctionCache,
    IndexDataCacheFile,
    InTreeCacheLocator,
    NullCache,
)

KERNELS = Path(__file__).parents[1]
HOME = KERNELS.parents[1]  # of the packages
# Analyses have compiled functions too, which call the kernels' functions.
SERVED = (KERNELS, HOME / "analysis")
DIGEST = hashlib.sha256().digest_size
REMEDY = "they are compiled anew each time; set NUMBA_CACHE_DIR to a folder with room that you may write"


@cache
def folder() -> Path | None:
    """The folder of compiled kernels, one for each state of their sources and each version of Numba; None if
    it can be made nowhere."""
    sources = b"".join(path.read_bytes() for path in sorted(KERNELS.rglob("*.py")))
    name = f"kernels-{hashlib.sha256(sources + numba.__version__.encode()).hexdigest()[:16]}"
    for home in _homes():
        if _writable(home / name):
            return home / name
    return None


def _homes() -> Iterator[Path]:
    """Where it may lie, best first: where it is asked for, beside Python's own compiled files, at home."""
    if "NUMBA_CACHE_DIR" in os.environ:
        yield Path(os.environ["NUMBA_CACHE_DIR"])
        return
    yield KERNELS / "__pycache__"
    for base in (Path(os.environ.get("XDG_CACHE_HOME", "")), Path(os.path.expanduser("~")) / ".cache"):
        if base.is_absolute():  # a relative one is to be ignored, and without a home `~` stays as it is
            yield base / "robe-dlrm"
    if temporary := _temporary():
        yield temporary


def _writable(path: Path) -> bool:
    """Whether a folder can be written, or made."""
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def _temporary() -> Path | None:
    """A folder in the system's for temporary files that nobody else can have filled: kernels are code."""
    try:
        path = Path(tempfile.gettempdir()) / f"robe-dlrm-{os.getuid()}"
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError:
        return None
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return path if own else None


@cache
def _say(text: str) -> None:
    """Print a line to stderr, once."""
    print(text, file=sys.stderr, flush=True)


class _Locator(InTreeCacheLocator):
    """Tells Numba the folder, and leaves it to be made when there is something to keep.

    Numba would have the files of each installation apart. Here those with the same sources share them.
    """

    def __init__(self, function, file):
        super().__init__(function, file)
        self._cache_path = str(folder() / ".".join(Path(file).parent.relative_to(HOME).parts))

    @classmethod
    def from_function(cls, function, file):
        return cls(function, file)


class _Cached(CompileResultCacheImpl):
    _locator_classes = (_Locator,)


class _Checked:
    """Files that end in a digest of what stands before: a changed bit of machine code would do anything."""

    def _dump(self, thing):
        data = super()._dump(thing)
        return data + hashlib.sha256(data).digest()

    def _load_data(self, name):
        data = Path(self._data_path(name)).read_bytes()
        if hashlib.sha256(data[:-DIGEST]).digest() != data[-DIGEST:]:
            raise ValueError(f"{name} is damaged")
        return super()._load_data(name)  # which stops reading before the digest


class _Files(_Checked, IndexDataCacheFile):
    pass


class _Mended:
    """The cache of one kernel. A damaged file is dropped, and what cannot be written is not kept."""

    def __init__(self, function):
        super().__init__(function)
        locator, name = self._impl.locator, self._impl.filename_base
        self._cache_file = self._files(self.cache_path, name, locator.get_source_stamp())

    def load_overload(self, signature, context):
        try:
            return super().load_overload(signature, context)
        except Exception:
            # Whatever was read is not what was written: no kind of error can be ruled out.
            _say(f"{folder()}: held damaged kernels, which are compiled anew")
            for path in Path(self.cache_path).glob(f"{self._impl.filename_base}.*"):
                with suppress(OSError):
                    path.unlink()
            return None

    def save_overload(self, signature, compiled):
        try:
            super().save_overload(signature, compiled)
        except OSError as error:
            _say(f"{folder()}: compiled kernels cannot be kept ({error.strerror}); {REMEDY}")
        except Exception as error:  # of what Numba makes that cannot be written, such as code of a library
            _say(f"{self._impl.filename_base} cannot be kept, and is compiled anew each time: {error}")


class KernelCache(_Mended, FunctionCache):
    _impl_class, _files = _Cached, _Files


@cache
def _cuda_kernel_cache() -> type:
    """The same for CUDA, of whose caches numba-cuda has classes of its own."""
    from numba.cuda.core.caching import IndexDataCacheFile
    from numba.cuda.dispatcher import CUDACache, CUDACacheImpl

    class Cached(CUDACacheImpl):
        _locator_classes = (_Locator,)

    class Files(_Checked, IndexDataCacheFile):
        pass

    class Numbas(CUDACache):
        def load_overload(self, signature, context):
            # As the base class does, but for two seconds of preparing to compile, before it is known whether.
            return self._load_overload(signature, context)

    class CudaKernelCache(_Mended, Numbas):
        _impl_class, _files = Cached, Files

    return CudaKernelCache


def _is_served(function) -> bool:
    file = Path(function.__code__.co_filename)
    return any(file.is_relative_to(served) for served in SERVED)


def _kept(cache_of, function):
    """The cache of a function that is served here; where nothing can be kept, that which keeps nothing."""
    if folder() is None:
        _say(f"compiled kernels can be kept nowhere; {REMEDY}")
        return NullCache()
    return cache_of(function)


def _cache_of(function):
    """What a function under `@njit(cache=True)` is cached by."""
    return _kept(KernelCache, function) if _is_served(function) else FunctionCache(function)


def install() -> None:
    """Have Numba ask here for the cache of a function."""
    numba.core.dispatcher.FunctionCache = _cache_of
    if not numba.config.ENABLE_CUDASIM:
        _install_for_cuda()


def _install_for_cuda() -> None:
    from numba import cuda
    from numba.cuda.dispatcher import CUDADispatcher

    numbas = CUDADispatcher.enable_caching

    def enable_caching(kernel):
        if not _is_served(kernel.py_func):
            numbas(kernel)
        elif cuda.implementation != "Built-in":  # which compiles none of our kernels
            kernel._cache = _kept(_cuda_kernel_cache(), kernel.py_func)

    CUDADispatcher.enable_caching = enable_caching
