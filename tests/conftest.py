import numpy as np
import pytest

from robe.backend import select, simulator

# The versions of a kernel that these tests run, besides the reference. They hand over host arrays, which only
# the simulator takes as a device's.
VERSIONS = ["cpu", "cuda"] if simulator() else ["cpu"]


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
