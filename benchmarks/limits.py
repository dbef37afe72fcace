"""What the machine can do: bandwidth of copies and reads, random rows of a table, matrix products.

Kernels are told as shares of these.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numba import njit, prange

from benchmarks.measure import Effort, agree, figure, rotate, rounds, table_limit
from benchmarks.workload import Workload
from robe.backend import Backend
from robe.config import ModelConfig, TrainConfig, resolve
from robe.kernels.parts.lanes import prefetch_span
from robe.kernels.workbench.inspection import copy
from robe.model import layer_shapes

ROW = 128  # float32: 512 bytes, a row of mlperf's tables
# Rows asked for ahead of the one that is copied; 4 to 32 are alike.
AHEAD = 8


@njit(parallel=True, fastmath={"reassoc"})
def read_numba(source):
    total = np.float32(0)
    for i in prange(source.size):
        total += source[i]
    return total


@njit(parallel=True)
def rows_numba(table, rows, ahead, out):
    """out[n] = table[rows[n]], a cache line at a time asked for `ahead` rows before, if ahead > 0."""
    for n in prange(rows.size):
        if ahead and n + ahead < rows.size:
            prefetch_span(table, np.uint64(rows[n + ahead]) * np.uint64(ROW), np.uint64(ROW))
        start = np.uint64(rows[n]) * np.uint64(ROW)
        for i in range(ROW):
            out[n, i] = table[start + np.uint64(i)]


def copier(backend: Backend) -> Callable:
    """copy(source, out) of flat arrays, with all threads."""
    return copy if backend.name == "cpu" else lambda source, out: backend.xp.copyto(out, source)


class Products:
    """The matrix products of a stack of layers, one after the other, on buffers of their own.

    shapes: (in, out) of each layer, in order. transposed: for each layer, whether its weight lies as
    (out, in), as in PyTorch, rather than (in, out). The first layer's input has a gradient only if `inner`.
    """

    def __init__(self, shapes, batch: int, backend: Backend, inner: bool, transposed=None):
        xp, rng = backend.xp, np.random.default_rng(0)
        transposed = transposed or [False] * len(shapes)

        def numbers(*shape):
            return backend.to_device(rng.standard_normal(shape, np.float32))

        x = numbers(batch, shapes[0][0])
        self.forward, self.input_gradients, self.weight_gradients = [], [], []
        for i, ((n_in, n_out), turned) in enumerate(zip(shapes, transposed, strict=True)):
            stored = numbers(n_out, n_in) if turned else numbers(n_in, n_out)
            weight, y, d_y = (stored.T if turned else stored), numbers(batch, n_out), numbers(batch, n_out)
            self.forward.append((x, weight, y))
            left, right = (d_y, x) if turned else (x, d_y)
            self.weight_gradients.append((left.T, right, xp.empty_like(stored)))
            if i or inner:
                self.input_gradients.append((d_y, weight.T, xp.empty_like(x)))
            x = y
        self.matmul = xp.matmul

    def infer(self) -> None:
        for left, right, out in self.forward:
            self.matmul(left, right, out=out)

    def train(self) -> None:
        for left, right, out in [*self.forward, *self.weight_gradients, *self.input_gradients]:
            self.matmul(left, right, out=out)


def preset_shapes(preset: str) -> dict[str, list[tuple[int, int]]]:
    config = resolve(TrainConfig(model=ModelConfig(preset)))
    return layer_shapes(config, Workload(preset, 1e9).data())


def best_orientation(
    shape: tuple[int, int], batch: int, backend: Backend, inner: bool, effort: Effort
) -> bool:
    """Whether the three products of a layer are faster with the weight as (out, in)."""
    short, batch = effort._replace(seconds=effort.seconds / 5), min(batch, 2048)  # alike for larger ones
    layers = {turned: Products([shape], batch, backend, inner, [turned]) for turned in (False, True)}
    jobs = {turned: short.job(products.train, backend.synchronize) for turned, products in layers.items()}
    times = rounds(f"orientation of {shape}", jobs, 5, pause=0)
    return bool(np.median(times[True]) < np.median(times[False]))


def run(backend: Backend, effort: Effort) -> Iterator[dict]:
    yield from bandwidths(backend, effort)
    if backend.name == "cpu":
        yield from random_rows(backend, effort)
    for preset in ("kaggle", "tb10m", "mlperf"):
        yield from matrix_products(preset, backend, effort)


def bandwidths(backend: Backend, effort: Effort) -> Iterator[dict]:
    """Bytes per second, read and written, of an array like a look-up's output and of a larger one."""
    xp = backend.xp
    for rows in effort.pick((2048, 65536), (8, 16)):
        source, out = (xp.ones(rows * 26 * ROW, np.float32) for _ in range(2))
        calls = {
            f"copy, {xp.__name__}": (xp.copyto, (out, source), 2),
            f"read, {xp.__name__}": (xp.sum, (source,), 1),
        }
        if backend.name == "cpu":
            calls["copy, Numba"] = (copy, (source, out), 2)
            calls["read, Numba"] = (read_numba, (source,), 1)
        jobs = {
            name: effort.job(partial(call, *arguments), backend.synchronize)
            for name, (call, arguments, _) in calls.items()
        }
        for name, times in rounds("bandwidth", jobs, effort.rounds).items():
            moved = calls[name][2] * source.nbytes
            yield figure("bandwidth", f"{name}, {source.nbytes / 1e6:.0f} MB", moved / times, "B/s")


def random_rows(backend: Backend, effort: Effort) -> Iterator[dict]:
    """Rows per second at random rows of tables of growing size, with and without prefetch."""
    sizes = effort.pick((1e6, 1e7, 1e8, 1e9, table_limit(effort)), (1e5, 1e6))
    table = np.empty(int(sizes[-1]) // 4, np.float32)
    table.fill(1)
    count = effort.pick(2048 * 26, 500)
    out = np.empty((count, ROW), np.float32)
    agree("prefetching rows", _rows_of(np.arange(9 * ROW, dtype=np.float32)), np.arange(9.0 * ROW)[::-1], 0)
    rng = np.random.default_rng(0)
    jobs = {}
    for size in sizes:
        rows = [rng.integers(0, int(size) // (4 * ROW), count) for _ in range(8)]
        for ahead in (0, AHEAD):
            name = f"{size / 1e6:,.0f} MB, {f'prefetch {ahead} rows ahead' if ahead else 'no prefetch'}"
            jobs[name] = effort.job(
                rotate(lambda r, ahead=ahead: rows_numba(table, r, ahead, out), rows), backend.synchronize
            )
    for name, times in rounds("random rows", jobs, effort.rounds).items():
        yield figure("random rows of 512 bytes", name, count / times, "rows/s")


def _rows_of(table: np.ndarray) -> np.ndarray:
    """A table backwards, through the kernel."""
    out = np.empty((table.size // ROW, ROW), np.float32)
    rows_numba(table, np.arange(len(out))[::-1].copy(), 2, out)
    return out[:, ::-1].ravel()


def matrix_products(preset: str, backend: Backend, effort: Effort) -> Iterator[dict]:
    """Operations per second of every layer's three products, for both orientations of the weight."""
    batch = effort.pick(2048, 16)
    jobs, flops = {}, {}
    short = effort._replace(seconds=effort.seconds / 5)
    layers = [(part, shape) for part, shapes in preset_shapes(preset).items() for shape in shapes]
    backend.limit_threads(2 * batch * max(n_in * n_out for _, (n_in, n_out) in layers))
    for part, shape in layers:
        for turned in (False, True):
            p = Products([shape], batch, backend, True, [turned])
            for kind in ("forward", "input_gradients", "weight_gradients"):
                left, right, out = getattr(p, kind)[0]
                lies = "(out, in)" if turned else "(in, out)"
                name = f"{part} {shape[0]} x {shape[1]}, {kind.replace('_', ' ')}, weight {lies}"
                flops[name] = 2 * left.shape[0] * left.shape[1] * right.shape[1]
                jobs[name] = short.job(
                    lambda a=left, b=right, o=out: backend.xp.matmul(a, b, out=o), backend.synchronize
                )
    for name, times in rounds(f"products of {preset}", jobs, effort.pick(5, 2), pause=0).items():
        yield figure(f"matrix products, {preset}, batch {batch}", name, flops[name] / times, "flop/s")
