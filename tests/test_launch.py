"""How CUDA kernels are started: any launch gives the same, and arguments are wrapped once."""

import sys
from threading import Barrier, Thread
from time import sleep
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import needs_simulator
from numba import cuda

from robe.kernels.operations import OPERATIONS, version, versions
from robe.kernels.parts import launch
from robe.kernels.parts.launch import block_shape, launch_shape
from robe.kernels.workbench.cases import CASES, calls

pytestmark = pytest.mark.kernels

# Of several tiles each; pieces of one, two and many elements, and around the end; many rows to a slot.
NAMES = ("Z = 1", "Z does not divide D", "M = Z: every block wraps", "repeated ids", "largest ids")
CUDA = [(operation, name) for operation in OPERATIONS for name in versions(operation) if "cuda" in name]
# Atomic sums have no order.
SUMMING = ("interaction_scatter", "gather_interaction_backward")
UNORDERED = {("scatter_add", "cuda"), ("scatter_add", "cuda_elements")}
UNORDERED |= {(operation, name) for operation in SUMMING for name in ("cuda", "cuda_apart")}


@needs_simulator
@pytest.mark.parametrize("case", [case for case in CASES if case.name in NAMES], ids=lambda c: c.name)
@pytest.mark.parametrize(("operation", "name"), CUDA, ids=map(" ".join, CUDA))
def test_any_launch_gives_the_same(operation, name, case, monkeypatch):
    call = calls(case)[operation]
    expected = call.copy()
    version(operation, "reference")(*expected.values())
    before = None
    for blocks, threads in ((2, 4), (1, 1), (3, 2), (3, 2)):
        monkeypatch.setattr(launch, "BLOCKS", blocks)
        monkeypatch.setattr(launch, "THREADS", threads)
        found = call.copy()
        version(operation, name)(*found.values())
        for output in call.outputs:
            # float32 sums of some ten values in another order.
            np.testing.assert_allclose(found[output], expected[output], rtol=1e-4, atol=1e-4)
        outputs = [found[output].tobytes() for output in call.outputs]
        assert (operation, name) in UNORDERED or before in (None, outputs)
        before = outputs


@needs_simulator
def test_threads_of_a_block_share_their_memory():
    """In the simulator as it is, some of a thousand blocks have two arrays where there should be one."""
    from numba.cuda.simulator.kernelapi import FakeCUDAShared

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(1500):
            block, together, arrays = FakeCUDAShared(0), Barrier(4), []

            def thread(block=block, together=together, arrays=arrays):
                together.wait()
                arrays.append(block.array(4, np.int64))

            threads = [Thread(target=thread) for _ in range(4)]
            for each in threads:
                each.start()
            for each in threads:
                each.join()
            assert len(set(map(id, arrays))) == 1
    finally:
        sys.setswitchinterval(before)


@needs_simulator
def test_threads_of_a_block_wait_for_all_that_still_run():
    """They see what a slow one wrote, twice, though one has ended; where one fails, so does the launch."""

    @cuda.jit
    def kernel(written, seen, failing):
        i = cuda.threadIdx.x
        if i == 3:
            return
        for turn in range(2):
            if i == turn:
                sleep(0.02)
            if turn == failing:
                raise ValueError("no")
            written[i, turn] = 1
            cuda.syncthreads()
            seen[i, turn] = written[:, turn].sum()

    written, seen = np.zeros((2, 4, 2))
    kernel[1, 4](written, seen, -1)
    np.testing.assert_array_equal(seen, [[3, 3]] * 3 + [[0, 0]])
    for failing in range(2):
        with pytest.raises(ValueError, match=r"tid=\[\d, 0, 0\] ctaid=\[0, 0, 0\]: no"):
            kernel[1, 4](written, seen, failing)


def test_shapes(monkeypatch):
    monkeypatch.setattr(launch, "BLOCKS", 1000)
    monkeypatch.setattr(launch, "THREADS", 256)
    assert launch_shape((128, 3000, 26)) == ((1, 1000, 26), (128, 2, 1))
    assert block_shape(3000) == (1000, 256, 0, 0)
    assert block_shape(7, 45, 100) == (7, 64, 0, 100)


class DeviceArray:
    """What a launcher asks of CuPy's arrays; to ask for the interface itself is slow on a device."""

    def __init__(self, address, shape, strides, dtype="float32"):
        self.data, self.shape, self.strides = SimpleNamespace(ptr=address), shape, strides
        self.dtype = np.dtype(dtype)

    @property
    def __cuda_array_interface__(self):
        raise AssertionError("asked for at a launch")


@pytest.fixture
def wrapped(monkeypatch):
    """The descriptions that were wrapped, in order."""
    descriptions = []

    def wrap(description):
        descriptions.append(description)
        return len(descriptions)

    monkeypatch.setattr(launch, "cuda", SimpleNamespace(from_cuda_array_interface=wrap))
    monkeypatch.setattr(launch, "_wrapped", {})
    return descriptions


def test_an_array_is_wrapped_once(wrapped):
    assert launch.on_device(DeviceArray(4096, (2, 3), (12, 4))) == 1
    assert launch.on_device(DeviceArray(4096, (2, 3), (12, 4))) == 1
    assert wrapped == [
        {"data": (4096, False), "shape": (2, 3), "strides": (12, 4), "typestr": "<f4", "version": 3}
    ]


@pytest.mark.parametrize(
    "other",
    [
        DeviceArray(8192, (2, 3), (12, 4)),
        DeviceArray(4096, (1, 3), (12, 4)),
        DeviceArray(4096, (2, 3), (24, 4)),
        DeviceArray(4096, (2, 3), (12, 4), "uint32"),
    ],
)
def test_another_view_is_another_array(other, wrapped):
    launch.on_device(DeviceArray(4096, (2, 3), (12, 4)))
    assert launch.on_device(other) == 2


def test_the_cache_is_bounded(wrapped, monkeypatch):
    monkeypatch.setattr(launch, "WRAPPED_MOST", 3)
    for address in range(0, 400, 4):
        launch.on_device(DeviceArray(address, (1,), (4,)))
        assert len(launch._wrapped) <= 3
    assert len(wrapped) == 100


def test_numbers_and_tuples_pass_as_they_are(wrapped):
    for argument in (1, np.float32(2), (np.uint64(3), True)):
        assert launch.on_device(argument) is argument
    assert wrapped == []


@pytest.mark.skipif(launch.config.ENABLE_CUDASIM, reason="the simulator works on host arrays")
def test_host_arrays_are_refused():
    def kernel(*arguments):
        raise AssertionError("launched")

    with pytest.raises(TypeError, match=r"given a host array of shape \(5,\)"):
        launch.launch({launch.launch_shape((5,)): kernel}, (5,), np.zeros(5))
