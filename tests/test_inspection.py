"""The views of the kernels, and what the compiled CUDA code must not contain."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from robe import cli
from robe.backend import simulator
from robe.config import ConfigError
from robe.kernels import bias_relu
from robe.kernels.operations import OPERATIONS, version, versions
from robe.kernels.workbench import inspection
from robe.kernels.workbench.cases import CASES, calls
from robe.kernels.workbench.inspection import InspectionError


def compiler_trouble():
    """Asked at sizes at which the arguments of a kernel are made at once."""
    try:
        with mock.patch.object(inspection, "BENCH", CASES[1]):
            inspection.show("sgd", "registers", "9.0")
    except InspectionError as error:
        return str(error)
    finally:
        inspection.kernels.cache_clear()
    return None


ROOT = Path(inspection.__file__).parents[1]
without_compiler = pytest.mark.skipif(compiler_trouble() is not None, reason=f"{compiler_trouble()}")


def needs_compiler(test):
    return pytest.mark.compiler(without_compiler(test))


@pytest.fixture(scope="module", autouse=True)
def made_once():
    """What the views make anew for each operation or test: arguments of the sizes of the benchmark, links."""
    with mock.patch.multiple(inspection, calls=cache(calls), cubin=cache(inspection.cubin)):
        yield


def each_kernel():
    """Every CUDA kernel that any version of an operation starts, by name."""
    return {
        name: kernel for operation in OPERATIONS for name, kernel in inspection.kernels(operation).items()
    }


# Operations that take the simulator a minute together, and of which another file holds every version against
# the reference on all cases: test_gather_scatter.py, test_half.py, test_code_step.py, test_trained_codes.py.
SLOW = {
    *("gather", "scatter_add", "interaction_scatter", "adagrad_step", "rowwise_step", "half_step"),
    *("code_step", "quantise_touched"),
}


@pytest.mark.kernels
def test_all_versions_agree_on_all_cases():
    operations = OPERATIONS.keys() - (SLOW if simulator() else ())
    results = list(inspection.check(operations))
    assert len(results) == sum(len(inspection.versions_here(name)) for name in operations) * len(CASES)
    assert [result for result in results if not result.good] == []


def test_one_operation_is_checked_alone():
    ((verdict, operation, *_),) = (line.split() for line in inspection.checking("sgd"))
    assert (verdict, operation) == ("ok", "sgd")
    with pytest.raises(InspectionError, match="no kernel 'mean'; name one of gather, "):
        list(inspection.checking("mean"))
    with pytest.raises(ConfigError, match="kernels bench takes no name, so not 'sgd'"):
        cli.kernels("bench", "sgd")


def test_a_wrong_kernel_is_noticed(monkeypatch):
    def wrong(vectors, out):
        version("interaction", "reference")(vectors, out)
        out *= 1.01

    monkeypatch.setattr("robe.kernels.interaction.interaction_cpu", wrong)
    monkeypatch.setattr(inspection, "versions_here", lambda operation: ["cpu"])
    monkeypatch.setattr(inspection, "BENCH", CASES[1])
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


def test_cpu_code_calls_no_128_bit_division():
    """LLVM may make one; where no library in the process has it, compiling the kernel ends the process."""
    # Those that take a slot map: nothing else divides numbers of 64 bits.
    program = """if True:
        from robe.kernels.operations import version
        from robe.kernels.parts.disk_cache import folder
        from robe.kernels.workbench.cases import CASES, calls
        for operation, call in calls(CASES[1]).items():
            if "slot_map" in call.arguments:
                version(operation, "cpu")(*call.copy().values())
        print(folder())
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:1000]
    # What is kept of a kernel is its machine code, with the names of the functions that it calls.
    code = b"".join(path.read_bytes() for path in Path(done.stdout.strip()).rglob("*.nbc"))
    assert b"_read" in code
    assert re.findall(rb"(?:div|mod)ti[34]", code) == []


def test_source_and_cpu_code():
    text = inspection.show("gather", "source", "9.0")
    assert "def gather_reference" in text
    for walk in ("rows", "elements", "pieces"):
        assert f"\n# parts/walks.py\ndef {walk}(" in text
    assert "def spans(" not in text
    assert "ModuleID = 'rows.gather._read'" in inspection.show("gather", "llvm", "9.0")
    for operation in ("scatter_add", "adagrad_step"):
        assert "ret" in inspection.show(operation, "asm", "9.0")


def test_no_two_kernels_share_a_name():
    """Numba names its cache files so; processes that compile at a time could mix up kernels of one name."""
    kernels = {
        id(function): function
        for operation in OPERATIONS
        for function in inspection.own_kernels(operation).values()
        if inspection.by_walk(function)
    }
    names = [function.__qualname__ for function in kernels.values()]
    assert "rows.gather._read" in names
    assert len(set(names)) == len(names) >= 12


def test_what_cannot_be_shown_is_said():
    for arguments, message in (
        (("nothing", "source", "9.0"), "no kernel 'nothing'; name one of gather"),
        ((None, "source", "9.0"), "no kernel None"),
        (("gather", "ptx", "1.0"), "--cc 1.0: choose one of 7.5"),
        (("interaction_scatter", "asm", "9.0"), "interaction_scatter_cpu calls the versions of other"),
    ):
        with pytest.raises(InspectionError, match=message):
            inspection.show(*arguments)


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "capability", "share"),
    # By hand: 64 registers are 2048 a warp, so 32 warps fit 65,536.
    [
        (32, 256, 0, "9.0", 1.0),
        (33, 256, 0, "9.0", 0.75),
        (64, 256, 0, "9.0", 0.5),
        (65, 256, 0, "9.0", 0.375),
        (64, 256, 0, "7.5", 1.0),
        (255, 256, 0, "8.0", 0.125),
        # Shared memory: 164 KB hold 10 blocks of 15 KB and 1 of the system's, 64 KB hold 4 of 15.
        (32, 64, 15 * 1024, "8.0", 20 / 64),
        (32, 64, 15 * 1024, "7.5", 8 / 32),
        (32, 32, 100, "9.0", 0.5),  # 32 blocks of a warp each
        (32, 33, 0, "8.6", 32 / 48),  # 16 blocks of two warps, one of them almost empty
    ],
)
def test_occupancy(registers, threads, shared, capability, share):
    assert inspection.occupancy(registers, threads, shared, capability) == share


def test_versions_are_found_by_name():
    assert list(versions("gather")) == ["reference", "cpu", "cuda_elements", "cuda"]
    assert "cuda_deterministic" in versions("scatter_add")
    # Operations whose names begin alike, in one file.
    assert versions("bias_relu").keys() == {"reference", "cpu", "cuda"}
    assert versions("bias_relu_backward")["cuda"] is bias_relu.bias_relu_backward_cuda


@needs_compiler
def test_every_kernel_is_looked_at():
    """The kernels of a file are those its launchers start; none is left over."""
    for file in set(OPERATIONS.values()):
        text = (ROOT / f"{file}.py").read_text()
        # A kernel is a function of its own, or made by a walk.
        written = set(re.findall(r"@cuda.jit.*\ndef (\w+)|^(?=_\w+_kernel = )(\w+)", text, re.MULTILINE))
        written = {own or made for own, made in written}
        operations = (operation for operation in OPERATIONS if OPERATIONS[operation] == file)
        started = {name.split()[0] for operation in operations for name in inspection.kernels(operation)}
        assert started == written


@needs_compiler
def test_cuda_kernels_compile_without_spills():
    """For the cards that the other tests compile for; each more takes a compiler more than a minute."""
    for name, started in each_kernel().items():
        assert ".target sm_90" in inspection.ptx(started, "9.0")
        used = inspection.resources(started, "9.0")
        assert used.spilled == 0, name
        # By teams of 32 threads, of which an SM holds few anyway. The first packs eight codes at a time;
        # limited to 64, it would spill.
        most = 80 if name in ("_quantise_few_kernel", "_code_step_kernel") else 64
        assert 0 < used.registers <= most, name


def kernels_with(pattern):
    return [
        name for name, started in each_kernel().items() if re.search(pattern, inspection.ptx(started, "9.0"))
    ]


@needs_compiler
def test_no_64_bit_division():
    """It is a function of some hundred instructions on a GPU, and one loop in the wrong form makes one."""
    assert kernels_with(r"\b(?:div|rem)\.[us]64") == []


@needs_compiler
def test_device_functions_are_inlined():
    """A call would push the shared and the register arrays that it is given out to memory."""
    assert kernels_with(r"\bcall\b|\.local\b") == []


@needs_compiler
def test_double_precision_stays_out():
    """A constant of the wrong type would turn float32 kernels into slow float64 ones."""
    assert kernels_with(r"\b(?:add|mul|fma\.rn|div\.rn)\.f64|cvt.*\.f64") == []


READERS = {"_gather_kernel", "_gather_elements_kernel", "_gather_interaction_kernel"}
TRAINED = {"_gather_interaction_backward_kernel"}  # read the weights of a training, which are no codes


@needs_compiler
def test_halves_are_read_as_such():
    """What reads the shared weights has a kernel for halves, and it takes 2 bytes at a time."""
    halves = {name: kernel for name, kernel in each_kernel().items() if name.endswith(" of halves")}
    assert {name.split()[0] for name in halves} == READERS | TRAINED
    for started in (*halves.values(), inspection.kernels("half_step")["_half_step_kernel"]):
        text = inspection.ptx(started, "9.0")
        assert "ld.global.u16" in text
        assert not re.search(r"\.ftz", text)  # small halves are subnormal as float32, on their way


@needs_compiler
def test_codes_are_read_as_such():
    """Likewise, a byte at a time, and finding a weight in its group takes no division."""
    codes = {name: kernel for name, kernel in each_kernel().items() if name.endswith(" of codes")}
    assert {name.split()[0] for name in codes} == READERS
    for started in codes.values():
        text = inspection.ptx(started, "9.0")
        assert re.search(r"ld\.global(\.nc)?\.u8", text)
        assert not re.search(r"(div|rem)\.[us]64", text)


@needs_compiler
def test_words_of_bfloat16_are_read_and_written_as_such():
    """What takes activations has a kernel for words: 2 bytes each, and small numbers are not flushed to 0."""
    words = {name: kernel for name, kernel in each_kernel().items() if name.endswith(" of words")}
    both = ("_interaction", "_interaction_backward", "_gather_interaction", "_interaction_scatter")
    assert {f"{name}_kernel of words" for name in (*both, "_bias_relu", "_bias_relu_backward")} < set(words)
    for started in words.values():
        text = inspection.ptx(started, "9.0")
        assert re.search(r"(ld|st)\.global\S*\.[ub]16", text)
        assert ".ftz" not in text


@needs_compiler
@pytest.mark.parametrize("capability", inspection.REPORTED)
def test_the_gather_writes_four_floats_at_once(capability):
    text = inspection.ptx(inspection.kernels("gather")["_gather_kernel"], capability)
    assert re.findall(r"\bst\.global\S*", text) == ["st.global.v4.f32"]
    assert "st.global.f32" in inspection.ptx(
        inspection.kernels("gather")["_gather_elements_kernel"], capability
    )


@needs_compiler
@pytest.mark.parametrize("capability", inspection.REPORTED)
def test_the_interaction_reads_four_floats_at_once(capability):
    """From shared memory in all kernels; what is gathered piece by piece is written there one by one."""
    for operation, reads in (
        ("interaction", 6),
        ("interaction_backward", 4),
        ("interaction_scatter", 4),
        ("gather_interaction", 6),
        ("gather_interaction_backward", 4),
    ):
        text = inspection.ptx(inspection.kernels(operation)[f"_{operation}_kernel"], capability)
        assert len(re.findall(r"ld\.shared\.v4\.f32", text)) == reads
        assert re.search(r"\.extern \.shared \.align 16 ", text)
        if not operation.startswith("gather"):
            assert len(re.findall(r"ld\.global\S*\.v4\.f32", text)) == 4
            assert len(re.findall(r"st\.shared\.v4\.f32", text)) == 4


@needs_compiler
def test_code_and_table_of_all_kernels(monkeypatch):
    text = inspection.show("interaction", "ptx", "9.0")
    assert text.count(".entry") == 4  # and those of words
    assert "// _interaction_elements_kernel" in text
    # 27 vectors in 132 places of 4 bytes each; 4 blocks of 64 threads fit the 64 KB of an SM with 32 warps.
    table = inspection.show("interaction", "registers", "7.5").splitlines()
    (line,) = (line for line in table if line.split()[:2] == ["_interaction_kernel", "7.5"])
    assert line.split()[5:] == ["14256", "B", "25%"]
    monkeypatch.setattr(inspection, "REPORTED", ("9.0",))  # which is compiled for anyway
    table = inspection.show(None, "registers", "9.0").splitlines()
    assert len(table) == 1 + len(each_kernel())


def test_machine_code_begins_with_its_first_instruction():
    directives = '\t.headerflags\t@"EF_CUDA_SM90"\n\t.section\t.text.step,"ax"\n.text.step:\n'
    code = "        /*0000*/  LDC R1, c[0x0][0x28] ;\n        /*0010*/  EXIT ;\n"
    assert inspection.from_first_instruction(directives + code) == code
    assert inspection.from_first_instruction(directives) == directives
