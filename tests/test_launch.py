"""How arguments reach a CUDA kernel on a device, with doubles for CuPy's arrays and for Numba."""

from types import SimpleNamespace

import numpy as np
import pytest

from robe.kernels import launch


class DeviceArray:
    """What a kernel's launcher asks of CuPy's arrays; to ask for the interface itself is slow there."""

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
