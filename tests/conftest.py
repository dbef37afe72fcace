import numpy as np
import pytest

from robe.backend import cuda_trouble, select

# The versions of a kernel that run here, besides the reference: CUDA on a device or in the simulator.
VERSIONS = ["cpu"] if cuda_trouble() else ["cpu", "cuda"]


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
