"""The views of the kernels, and what the compiled CUDA code must not contain."""

import re

import numpy as np
import pytest

from robe.kernels import inspection
from robe.kernels.cases import CASES, calls
from robe.kernels.inspection import InspectionError
from robe.kernels.operations import OPERATIONS, version


def compiler_trouble():
    try:
        inspection.resources("sgd", "9.0")
    except InspectionError as error:
        return str(error)
    return None


needs_compiler = pytest.mark.skipif(compiler_trouble() is not None, reason=f"{compiler_trouble()}")
KERNELS = [name for name in OPERATIONS if name != "adagrad_scatter"]


@pytest.mark.kernels
def test_all_versions_agree_on_all_cases():
    results = list(inspection.check())
    assert len(results) == len(OPERATIONS) * len(CASES) * len(inspection.versions_here())
    assert [result for result in results if not result.good] == []


def test_a_wrong_kernel_is_noticed(monkeypatch):
    def wrong(vectors, out):
        version("interaction", "reference")(vectors, out)
        out *= 1.01

    monkeypatch.setattr("robe.kernels.interaction.interaction_cpu", wrong)
    monkeypatch.setattr(inspection, "versions_here", lambda: ["cpu"])
    failing = []
    with pytest.raises(InspectionError, match="1 versions disagree"):
        failing.extend(line.split()[1] for line in inspection.checking() if line.startswith("FAIL"))
    assert failing == ["interaction"]
    with pytest.raises(InspectionError, match="interaction: the cpu version is wrong"):
        list(inspection.bench("cpu", repeats=1))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_reference_leaves_its_inputs_alone(operation):
    """What `calls` says is only read must be, or comparing versions would mean nothing."""
    call = calls(CASES[1])[operation]
    before = {name: np.copy(value) for name, value in call.arguments.items()}
    version(operation, "reference")(*call.copy().values())
    for name, value in call.arguments.items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_source_and_cpu_code():
    assert "def gather_reference" in inspection.show("gather", "source", "9.0")
    assert re.search(r"^define .*_gather", inspection.show("gather", "llvm", "9.0"), re.MULTILINE)
    assert "ret" in inspection.show("scatter_add", "asm", "9.0")


def test_what_cannot_be_shown_is_said():
    for arguments, message in (
        (("nothing", "source", "9.0"), "no kernel 'nothing'; name one of gather"),
        ((None, "source", "9.0"), "no kernel None"),
        (("gather", "ptx", "1.0"), "--cc 1.0: choose one of 7.5"),
        (("adagrad_scatter", "ptx", "9.0"), "made of others"),
    ):
        with pytest.raises(InspectionError, match=message):
            inspection.show(*arguments)


@pytest.mark.parametrize(
    ("registers", "capability", "share"),
    # By hand, for blocks of 256 threads = 8 warps: 64 registers are 2048 a warp, so 32 warps fit 65,536.
    [
        (32, "9.0", 1.0),
        (33, "9.0", 0.75),
        (64, "9.0", 0.5),
        (65, "9.0", 0.375),
        (64, "7.5", 1.0),
        (255, "8.0", 0.125),
    ],
)
def test_occupancy(registers, capability, share, monkeypatch):
    monkeypatch.setattr("robe.kernels.launch.THREADS", 256)
    assert inspection.occupancy(registers, capability) == share


@needs_compiler
@pytest.mark.parametrize("capability", ["7.5", "8.0", "9.0"])
@pytest.mark.parametrize("operation", KERNELS)
def test_cuda_kernels_compile_without_spills(operation, capability):
    text = inspection.ptx(operation, capability)
    assert f".target sm_{capability.replace('.', '')}" in text
    used = inspection.resources(operation, capability)
    assert used.spilled == 0
    assert 0 < used.registers <= 128


@needs_compiler
@pytest.mark.parametrize("operation", ["gather", "scatter_add", "interaction", "interaction_backward"])
def test_no_64_bit_division_where_it_is_hot(operation):
    """A 64-bit division is a function of some hundred instructions on a GPU."""
    text = inspection.ptx(operation, "9.0")
    assert re.findall(r"\b(?:div|rem)\.[us]64", text) == []
    assert "mul.hi.u64" in text or "mad" in text or "fma" in text


@needs_compiler
def test_double_precision_stays_out():
    """A constant of the wrong type would turn float32 kernels into slow float64 ones."""
    arithmetic = r"\b(?:add|mul|fma\.rn|div\.rn)\.f64"
    assert [name for name in KERNELS if re.search(arithmetic, inspection.ptx(name, "9.0"))] == []
