import numpy as np
import pytest

from robe.backend import cuda_trouble, select, simulator

# The versions of a kernel that these tests run, besides the reference. They hand over host arrays, which only
# the simulator takes as a device's.
VERSIONS = ["cpu", "cuda"] if simulator() else ["cpu"]

# What runs on a device has to have one; the reason of each skip is what a user would be told.
TROUBLE = "the simulator is no device" if simulator() else cuda_trouble()
on_a_device = pytest.mark.skipif(TROUBLE is not None, reason=str(TROUBLE))


@pytest.fixture(params=VERSIONS)
def backend(request):
    """Every backend that runs here, to be compared with the reference."""
    return select(request.param)


@pytest.fixture
def reference():
    return select("reference")


@pytest.fixture
def rng():
    return np.random.default_rng(0)
