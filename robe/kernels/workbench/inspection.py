"""Looking into the kernels: their code at every stage, what they occupy, whether they agree, their speed.

Compiling for a GPU needs none: NVVM makes PTX for any compute capability, and NVIDIA's linker makes machine
code of it and tells its registers. Both come with the extra `inspect`.
"""

import inspect
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest import mock

import numpy as np
from numba import config, cuda, njit, prange, typeof

from robe.errors import RobeError
from robe.kernels.operations import OPERATIONS, module, version, versions
from robe.kernels.parts import walks
from robe.kernels.parts.cost import Limits
from robe.kernels.workbench.cases import CASES, WORDS, Case, calls
from robe.packages import extra

# Warps that an SM of each compute capability holds, blocks, KB of shared memory, and how many of these the
# system takes with each block unless the linker counts them, as from 9.0 on. Every SM has 65,536 registers.
SM_LIMITS = {
    "7.5": (32, 16, 64, 0),
    "8.0": (64, 32, 164, 1),
    "8.6": (48, 16, 100, 1),
    "8.9": (48, 24, 100, 1),
    "9.0": (64, 32, 228, 0),
    "10.0": (64, 32, 228, 0),
}
REGISTERS = 65536
REPORTED = ("7.5", "8.0", "9.0")  # where no compute capability is named
# Sizes of the MLPerf model at its batch, with 10 MB of weights: what `kernels bench` runs.
BENCH = Case("mlperf", 2048, 26, 128, 32, 2_500_000)
EXTRA = extra("inspect")


class InspectionError(RobeError):
    """A view that cannot be had here; the message says what to install."""


class Agreement(NamedTuple):
    """How far a version is from the reference on a case: the worst |difference| / (1 + |reference|)."""

    operation: str
    version: str
    case: str
    error: float

    @property
    def good(self) -> bool:
        # float32 sums of up to 48 values of order 10 in another order; NaN is not good either.
        return self.error < 1e-4


class Resources(NamedTuple):
    """What one CUDA kernel occupies when compiled for a compute capability."""

    registers: int  # per thread
    spilled: int  # bytes of registers that went to memory, per thread
    shared: int  # bytes of shared memory per block
    occupancy: float  # share of an SM's warps that can be there at a time, for the block that is launched


class Started(NamedTuple):
    """A CUDA kernel as it is started at the sizes of the benchmark."""

    kernel: Callable
    signature: tuple  # types of its arguments
    threads: int  # of a block
    shared: int  # bytes of dynamic shared memory of a block


def versions_here(operation: str) -> list[str]:
    """The versions, besides the reference, that take host arrays here: CUDA's do in the simulator."""
    here = ("cpu", "cuda") if config.ENABLE_CUDASIM else ("cpu",)
    return [name for name in versions(operation) if name.startswith(here)]


def check(operations: Collection[str] = OPERATIONS) -> Iterator[Agreement]:
    """Every version of `operations` that runs here against the reference, on every case."""
    for case in CASES:
        made = calls(case)
        for operation in operations:
            call = made[operation]
            expected = call.copy()
            version(operation, "reference")(*expected.values())
            for name in versions_here(operation):
                found = call.copy()
                version(operation, name)(*found.values())
                error = max(_error(expected[output], found[output]) for output in call.outputs)
                yield Agreement(operation, name, case.name, error)


def listing() -> Iterator[str]:
    """Lines of text: every operation with what it does, its versions, and the cost of a call per row."""
    yield f"{BENCH.features} features, D = {BENCH.width}"
    yield f"{'operation':<29}{'bytes/row':>12}{'flops/row':>12}   what it does"
    for operation, call in calls(BENCH).items():
        moved, flops = version(operation, "cost")(*call.arguments.values())
        first = module(operation).__doc__.splitlines()[0]
        yield f"{operation:<29}{moved / BENCH.rows:>12,.0f}{flops / BENCH.rows:>12,.0f}   {first}"
    yield ""
    yield f"{'operation':<29}versions: functions OPERATION_VERSION in robe/kernels/; models run cpu or cuda"
    for operation in OPERATIONS:
        yield f"{operation:<29}{', '.join(versions(operation))}"


def checking(operation: str | None = None) -> Iterator[str]:
    """Lines of text: the worst disagreement of each version; raises InspectionError if any is too large."""
    found = sorted(check(OPERATIONS if operation is None else [_known(operation)]))
    bad = 0
    for (operation, name), group in groupby(found, key=lambda a: (a.operation, a.version)):
        worst = max(group, key=lambda a: (not a.good, a.error))
        bad += not worst.good
        verdict = "ok" if worst.good else "FAIL"
        yield f"{verdict:<5}{operation:<29}{name:<20}worst {worst.error:.1e} ({worst.case})"
    if bad:
        raise InspectionError(f"{bad} versions disagree with the reference; see the lines marked FAIL")


def timing() -> Iterator[str]:
    """Lines of text: the times of the CPU versions, each checked before it is timed."""
    c = BENCH
    yield f"{c.rows} rows, {c.features} features, D = {c.width}, Z = {c.block}, M = {c.memory:,}"
    yield f"{'operation':<29}{'median':>12}{'fastest':>12}{'slowest':>12}{'GB/s':>8}{'of a copy':>11}"
    for t in bench("cpu"):
        times = "".join(f"{1e3 * seconds:>9.3f} ms" for seconds in (t.seconds, t.fastest, t.slowest))
        yield f"{t.operation:<29}{times}{t.bandwidth / 1e9:>8.1f}{t.share:>10.0%}"


def show(operation: str | None, form: str, capability: str) -> str:
    """One operation as `source`, `ptx`, `sass`, `asm`, `llvm` or `registers`; these of all without a name."""
    if operation is None and form == "registers":
        return "\n".join(register_table(OPERATIONS, REPORTED))
    operation = _known(operation)
    if capability not in SM_LIMITS:
        raise InspectionError(f"--cc {capability}: choose one of {', '.join(SM_LIMITS)}")
    if form == "registers":
        return "\n".join(register_table([operation], [capability]))
    if form == "source":
        return source(operation)
    if form in ("asm", "llvm"):
        return cpu_code(operation, form)
    view = {"ptx": ptx, "sass": sass}[form]
    texts = (f"// {name}\n{view(started, capability)}" for name, started in kernels(operation).items())
    return "\n".join(texts) or f"{operation} has no CUDA kernel of its own"


def register_table(operations, capabilities) -> Iterator[str]:
    """Lines of text: what each CUDA kernel occupies."""
    yield f"{'kernel':<47}{'for':>6}{'registers':>11}{'spilled':>9}{'shared':>10}{'warps that fit':>16}"
    for operation in operations:
        for name, started in kernels(operation).items():
            for capability in capabilities:
                used = resources(started, capability)
                sizes = f"{used.registers:>11}{used.spilled:>7} B{used.shared:>8} B{used.occupancy:>16.0%}"
                yield f"{name:<47}{capability:>6}{sizes}"


def _known(operation: str | None) -> str:
    if operation not in OPERATIONS:
        raise InspectionError(f"no kernel {operation!r}; name one of {', '.join(OPERATIONS)}")
    return operation


def _error(expected: np.ndarray, found: np.ndarray) -> float:
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    return float(np.max(np.abs(found - expected) / (1 + np.abs(expected)), initial=0))


def source(operation: str) -> str:
    """The file of an operation, and the walks that its kernels are made by."""
    functions = own_kernels(operation).values()
    used = sorted({function.__qualname__.split(".")[0] for function in functions if by_walk(function)})
    texts = (f"# parts/walks.py\n{inspect.getsource(getattr(walks, name))}" for name in used)
    return "\n\n".join([inspect.getsource(module(operation)), *texts])


def own_kernels(operation: str) -> dict[str, Callable]:
    """Name in the file of an operation -> the plain function of each kernel there, CPU and CUDA."""
    file = module(operation)
    functions = ((name, plain(value)) for name, value in vars(file).items())
    return {name: f for name, f in functions if f and (by_walk(f) or f.__module__ == file.__name__)}


def plain(kernel) -> Callable | None:
    """The Python function of what Numba compiles, or its simulator runs."""
    return getattr(kernel, "py_func", None) or getattr(kernel, "fn", None)


def by_walk(function: Callable) -> bool:
    return function.__module__ == walks.__name__


def cpu_code(operation: str, form: str) -> str:
    """The CPU version as LLVM IR (`llvm`) or assembly of this machine (`asm`)."""
    call, name = calls(CASES[1])[operation], f"{operation}_cpu"
    kernel = f"_{operation}" if hasattr(module(operation), f"_{operation}") else name
    compiled = getattr(module(operation), kernel)
    if not hasattr(compiled, "targetoptions"):
        raise InspectionError(f"{name} calls the versions of other operations; show those")
    # Compiled anew, since what comes from the cache has lost its text.
    options = {name: value for name, value in compiled.targetoptions.items() if name != "nopython"}
    fresh = njit(**options)(compiled.py_func)
    with mock.patch.object(module(operation), kernel, fresh):
        version(operation, "cpu")(*call.copy().values())
    texts = fresh.inspect_llvm() if form == "llvm" else fresh.inspect_asm()
    return f"; {name}\n" + "\n".join(texts.values())


@cache
def kernels(operation: str) -> dict[str, Started]:
    """The CUDA kernels in an operation's file that its versions start, by name; those for halves, codes
    and words of bfloat16 besides."""
    if config.ENABLE_CUDASIM:
        raise InspectionError("the simulator compiles nothing; unset NUMBA_ENABLE_CUDASIM")
    found = {}
    names = {function: name for name, function in own_kernels(operation).items()}

    def note(stored, kernel, shape, arguments):
        _, threads, *further = shape
        if name := names.get(kernel.py_func):
            signature, shared = tuple(map(typeof, arguments)), further[1] if further else 0
            started = Started(kernel, signature, int(np.prod(threads)), shared)
            if found.setdefault(name, started).signature != signature:
                found.setdefault(f"{name} of {stored}", started)

    # The rows of a batch matter to the number of blocks, and to whether they are less than the array.
    sizes = ("float32", "floats", 256), ("float32", "floats", 1024)
    codes = ("int8", "codes", 256), ("int3", "codes", 256)
    others = ("float16", "halves", 256), *codes, ("float32", "words", 256)
    for memory_type, stored, rows in (*sizes, *others):
        call = calls(BENCH._replace(rows=rows, memory_type=memory_type))[operation]
        with mock.patch("robe.kernels.parts.launch.start", partial(note, stored)):
            for name, run in versions(operation).items():
                if name.startswith("cuda"):
                    arrays, short = call.copy(), WORDS.get(operation, ()) if stored == "words" else ()
                    run(*(arrays | {n: np.zeros(arrays[n].shape, np.uint16) for n in short}).values())
    return found


@cache
def ptx(started: Started, capability: str) -> str:
    """A CUDA kernel as PTX for a compute capability such as `9.0`."""

    class Device:
        compute_capability = tuple(map(int, capability.split(".")))

    if cuda.implementation == "Built-in":
        raise InspectionError(f"numba-cuda is not installed: {EXTRA}")
    try:
        # Numba compiles functions that a kernel calls for the device at hand. There may be none.
        with mock.patch("numba.cuda.dispatcher.get_current_device", return_value=Device):
            capability = Device.compute_capability
            return cuda.compile_ptx(started.kernel.py_func, started.signature, cc=capability)[0]
    except Exception as error:
        if "libnv" not in str(error) and "NVVM" not in str(error):
            raise
        raise InspectionError(f"NVIDIA's compiler is not installed: {EXTRA}") from None


def cubin(started: Started, capability: str) -> tuple[bytes, str]:
    """A CUDA kernel as machine code, and what the linker says of its registers."""
    try:
        from cuda.bindings import nvjitlink
    except ImportError:
        raise InspectionError(f"NVIDIA's linker is not installed: {EXTRA}") from None
    text, options = ptx(started, capability), [f"-arch=sm_{capability.replace('.', '')}", "-verbose"]
    if most := started.kernel.targetoptions.get("max_registers"):
        options.append(f"-maxrregcount={most}")
    handle = nvjitlink.create(len(options), options)
    try:
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, text.encode(), len(text), "kernel")
        nvjitlink.complete(handle)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
        code = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, code)
    finally:
        nvjitlink.destroy(handle)
    return bytes(code), log.decode(errors="replace")


def resources(started: Started, capability: str) -> Resources:
    """Registers, spills, shared memory and theoretical occupancy of a CUDA kernel."""
    _, log = cubin(started, capability)
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    shared = started.shared + sum(map(int, re.findall(r"(\d+) bytes smem", log)))
    share = occupancy(registers, started.threads, shared, capability)
    return Resources(registers, spilled, shared, share)


def occupancy(registers: int, threads: int, shared: int, capability: str) -> float:
    """Share of an SM's warps that fit, in blocks of so many threads and bytes of shared memory."""
    warps_per_block = -(-threads // 32)
    warps, blocks, kilobytes, system = SM_LIMITS[capability]
    # Registers are given out to a warp 256 at a time, and warps come in fours.
    fitting = REGISTERS // (-(-registers * 32 // 256) * 256) // 4 * 4
    blocks = min(blocks, min(fitting, warps) // warps_per_block)
    if shared:
        blocks = min(blocks, kilobytes * 1024 // (shared + system * 1024))
    return blocks * warps_per_block / warps


def sass(started: Started, capability: str) -> str:
    """A CUDA kernel as machine code, disassembled."""
    beside = [p for p in Path(cuda.__file__).parents if (p / "nvidia").is_dir()]
    tool = shutil.which("nvdisasm") or next(
        (str(t) for p in beside for t in p.glob("nvidia/*/bin/nvdisasm")), None
    )
    if tool is None:
        raise InspectionError(f"nvdisasm is not installed: {EXTRA}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin(started, capability)[0])
        file.flush()
        command = [tool, "-c", file.name]  # code alone, without sections of data
        return from_first_instruction(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
        )


def from_first_instruction(listing: str) -> str:
    """A listing of nvdisasm without the directives in front of its first instruction."""
    lines = listing.splitlines(keepends=True)
    first = next((i for i, line in enumerate(lines) if line.lstrip().startswith("/*0000*/")), 0)
    return "".join(lines[first:])


class Timing(NamedTuple):
    """Median and extremes of a call's time in seconds, and the bytes it moved per second at the median."""

    operation: str
    version: str
    seconds: float
    fastest: float
    slowest: float
    bandwidth: float
    share: float  # of the bandwidth of a plain copy


@njit(parallel=True, cache=True)
def copy(source, out):
    """out = source, with as many threads as kernels have, which NumPy's copies do not."""
    for i in prange(source.size):
        out[i] = source[i]


def limits(backend) -> Limits:
    """What a backend reaches here, in a copy larger than the caches and the largest MLPerf product."""
    xp = backend.xp
    source, out = xp.ones(2**24, "float32"), xp.ones(2**24, "float32")
    a, b, c = (xp.ones(shape, "float32") for shape in ((2048, 1024), (1024, 1024), (2048, 1024)))

    def copied():
        if xp is np:
            copy(source, out)
        else:
            out[...] = source

    def seconds(call, repeats=7):
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            call()
            backend.synchronize()
            times.append(time.perf_counter() - start)
        return median(times[1:])  # the first may compile

    rate = 2 * a.size * b.shape[1] / seconds(lambda: backend.matmul(a, b, c))
    return Limits(2 * source.nbytes / seconds(copied), rate)


def bench(name: str, repeats: int = 7) -> Iterator[Timing]:
    """Time a version of every operation on host arrays, after comparing it with the reference.

    The first row is a plain copy of the largest output, with as many threads: the limit of the rest.
    """
    sample = calls(BENCH)
    largest = sample["gather"].arguments["out"]
    copy_bandwidth = 0.0
    flat = np.ones(largest.size, np.float32)  # zeros would all be one page of memory
    jobs = {"copy": (lambda: copy(flat, largest.reshape(-1)), 2 * largest.nbytes)}
    for operation, call in sample.items():
        expected, found = call.copy(), call.copy()
        version(operation, "reference")(*expected.values())
        version(operation, name)(*found.values())
        error = max(_error(expected[o], found[o]) for o in call.outputs)
        if not error < 1e-3:
            raise InspectionError(f"{operation}: the {name} version is wrong by {error:g}; no time is told")
        cost = version(operation, "cost")(*found.values())
        jobs[operation] = (lambda o=operation, f=found: version(o, name)(*f.values()), cost.bytes_moved)
    for operation, (job, moved) in jobs.items():
        job()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            job()
            times.append(time.perf_counter() - start)
        bandwidth = moved / median(times)
        copy_bandwidth = copy_bandwidth or bandwidth
        share = bandwidth / copy_bandwidth
        yield Timing(operation, name, median(times), min(times), max(times), bandwidth, share)
