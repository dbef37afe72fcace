"""CUDA kernels give the same whatever the launch, in the simulator."""

import sys
from threading import Barrier, Thread

import numpy as np
import pytest
from conftest import needs_simulator

from robe.kernels import launch
from robe.kernels.cases import CASES, calls
from robe.kernels.launch import block_shape, launch_shape
from robe.kernels.operations import OPERATIONS, version, versions

pytestmark = pytest.mark.kernels

# Of several tiles each; pieces of one, two and many elements, and around the end; many rows to a slot.
NAMES = ("Z = 1", "Z does not divide D", "M = Z: every block wraps", "repeated ids", "largest ids")
CUDA = [(operation, name) for operation in OPERATIONS for name in versions(operation) if "cuda" in name]
# Atomic sums have no order.
UNORDERED = {("scatter_add", "cuda"), ("scatter_add", "cuda_elements")}
UNORDERED |= {("adagrad_scatter", "cuda"), ("adagrad_scatter", "cuda_sweep")}


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


def test_shapes(monkeypatch):
    monkeypatch.setattr(launch, "BLOCKS", 1000)
    monkeypatch.setattr(launch, "THREADS", 256)
    assert launch_shape((128, 3000, 26)) == ((1, 1000, 26), (128, 2, 1))
    assert block_shape(3000) == (1000, 256, 0, 0)
    assert block_shape(7, 45, 100) == (7, 64, 0, 100)
