import os
import sys
from unittest import mock

import numpy as np
import pytest

from robe.backend import cuda_trouble, select, simulator
from robe.config import EmbeddingConfig, ModelConfig, OptimizerConfig, TrainConfig, resolve
from robe.kernels.operations import version
from robe.kernels.workbench.inspection import versions_here

# The backends that these tests run, besides the reference. They hand over host arrays, which only the
# simulator takes as a device's. It changes nothing in the reference and in kernels of the CPU: these run
# without it, and in it only where test_inspection.py compares them all.
VERSIONS = ["cuda"] if simulator() else ["cpu"]
EVERY = VERSIONS if simulator() else ["reference", *VERSIONS]

# What runs on a device has to have one; the reason of each skip is what a user would be told.
TROUBLE = "the simulator is no device" if simulator() else cuda_trouble()
on_a_device = pytest.mark.skipif(TROUBLE is not None, reason=str(TROUBLE))


def pytest_configure(config):
    # So that the tests of a file, and what their fixtures make, stay in one process while both are busy.
    if config.getoption("dist", "no") == "load":
        config.option.dist = "worksteal"


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk():
    """Files are written as ever. Whether the disk holds them shows only where the power is lost or a sync
    fails: in the processes of test_power_loss.py and test_faults.py, which sync like all that tests start."""
    with mock.patch.object(os, "fsync", os.fstat):  # which complains of what is no file, too
        yield


if simulator():
    # Threads of a block take turns often, or none would be seen not to wait for the others where it should.
    sys.setswitchinterval(1e-4)
    from sleeping_blocks import install

    install()
without_simulator = pytest.mark.skipif(simulator(), reason="runs nothing that the simulator changes")
needs_simulator = pytest.mark.skipif(not simulator(), reason="needs NUMBA_ENABLE_CUDASIM=1")


def resolved(model=None, embedding=None, optimizer=None, **others):
    """The configuration of these settings, by name, with all that follows from them."""
    parts = ModelConfig(**model or {}), EmbeddingConfig(**embedding or {}), OptimizerConfig(**optimizer or {})
    return resolve(TrainConfig(*parts, **others))


@pytest.fixture(params=VERSIONS)
def backend(request):
    """Every backend that runs here, to be compared with the reference."""
    return select(request.param)


def each_version(operation):
    """Run a test with every version of an operation that is tested here, as `run`."""
    names = [name for name in ("reference", *versions_here(operation)) if name.startswith(tuple(EVERY))]
    return pytest.mark.parametrize("run", [version(operation, name) for name in names], ids=names)


@pytest.fixture
def reference():
    return select("reference")


@pytest.fixture
def rng():
    return np.random.default_rng(0)
