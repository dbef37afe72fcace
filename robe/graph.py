"""A step, or an inference, as one CUDA graph: captured once, and then started by a single call.

The host takes some 100 microseconds to launch one kernel, and a step has tens of them, so small batches wait
for Python. A graph holds all launches of a step with their arguments, and is queued as one.

Addresses are among the arguments. So a graph has input arrays of its own, to which each batch is copied, and
the learning rate and whatever else changes from step to step lies in arrays too (kernels/parts/numbers.py).
Results lie in buffers of the model as ever. Temporary arrays come from a pool that belongs to the graph.

A batch of the size of the one before is captured and run, and those that follow replay it. Both ways call the
same kernels in the same order; the batch before, computed plainly, has had them compiled.

A `Graph` is CuPy's here; tests put in a recorder, with which all this runs in the simulator.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

MOST = 16  # graphs of a model: batches of all sizes may come twice in a row by chance


class Graph:
    """One graph of work that CuPy, Numba and cuBLAS queue.

    cuda: the module cupy.cuda. uses: functions that take the address of a stream, and have kernels and
    products run there; 0 is the legacy default stream, where everything else runs.
    """

    def __init__(self, cuda: ModuleType, uses: Sequence[Callable[[int], None]]):
        self.cuda, self.uses = cuda, uses
        # The default stream cannot be captured. What is captured can be started there.
        self.stream, self.compute = cuda.Stream(non_blocking=True), cuda.Stream.null
        self.pool = cuda.MemoryPool()
        self.graph: Any = None

    @contextmanager
    def _apart(self):
        """Queue on the stream of its own, with memory that no one else is given between two replays."""
        try:
            for use in self.uses:
                use(self.stream.ptr)
            with self.stream, self.cuda.using_allocator(self.pool.malloc):
                yield
        finally:
            for use in self.uses:
                use(0)

    def capture(self, function: Callable[[], Any]) -> Any:
        """What it returns; its work is done at each replay. Raises what a call says that is not allowed."""
        with self._apart():
            self.stream.begin_capture()
            try:
                result = function()
            except BaseException:
                with suppress(Exception):  # it says once more that this capture failed
                    self.stream.end_capture()
                raise
            self.graph = self.stream.end_capture()
        return result

    def replay(self) -> None:
        """Queue the work that was captured, behind all that was queued before."""
        self.graph.launch(self.compute)


class Replayed:
    """A function of arrays of these shapes, as a graph. Raises what `Graph.capture` does."""

    def __init__(self, backend: Any, function: Callable[..., Any], arrays: Sequence):
        self.inputs = [backend.empty(array.shape, array.dtype) for array in arrays]
        self.graph = backend.graph()
        self.result = self.graph.capture(lambda: function(*self.inputs))

    def __call__(self, arrays: Sequence) -> Any:
        for own, array in zip(self.inputs, arrays, strict=True):
            own[...] = array
        self.graph.replay()
        return self.result


class Graphs:
    """The functions of a model, each as a graph for each size of batch that comes twice in a row."""

    def __init__(self, backend: Any):
        self.backend = backend
        self.last: dict[str, tuple] = {}  # shapes and types of its arrays when a function was called last
        self.replayed: dict[tuple, Replayed] = {}
        self.refused: set[str] = set()
        self.numbers: list[Any] = []  # (1,) each, on the device

    def __call__(self, name: str, function: Callable[..., Any], *arrays: Any) -> Any:
        """function(*arrays), from a graph where the backend has any; valid until the next call."""
        if self.backend.graph is None or name in self.refused:
            return function(*arrays)
        kinds = tuple((array.shape, array.dtype) for array in arrays)
        again, self.last[name] = self.last.get(name) == kinds, kinds
        if (name, kinds) not in self.replayed:
            if not again or len(self.replayed) == MOST:
                return function(*arrays)
            try:
                self.replayed[name, kinds] = Replayed(self.backend, function, arrays)
            except Exception as error:
                self.refused.add(name)
                why = (str(error) or type(error).__name__).splitlines()[0]
                print(f"{name} runs without a CUDA graph, kernel by kernel: {why}", file=sys.stderr)
                return function(*arrays)
        return self.replayed[name, kinds](arrays)

    def held(self, numbers: Sequence) -> list[Any]:
        """NumPy's numbers in arrays (1,) of the device: the same arrays at each call, written anew."""
        for number in numbers[len(self.numbers) :]:
            self.numbers.append(self.backend.empty((1,), number.dtype))
        for array, number in zip(self.numbers, numbers, strict=True):
            array.fill(number)
        return self.numbers
