"""Comparing with another revision: bytes that differ are told, and times are paired turn by turn."""

import subprocess

import pytest

from benchmarks import against, same_bytes
from benchmarks.measure import BenchmarkError
from benchmarks.revision import ROOT, checked_out, git

WEIGHTS = "checkpoints/step_00000007/weights.safetensors"
STATE = "checkpoints/step_00000007/state.json"
FILES = {
    WEIGHTS: b"\x00weights",
    STATE: b'{\n "program": "0.1.0",\n "position": 7\n}\n',
    "probabilities.txt": b"0.25\n",
    "summary.json": b'{"seconds": 1}',
}


def made_run(folder, **changed):
    """A run's folder as a program leaves it, with other bytes in the files that are named."""
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for name, content in changed.items():
        (folder / {"weights": WEIGHTS, "state": STATE}.get(name, f"{name}.txt")).write_bytes(content)
    return folder


@pytest.fixture
def told(tmp_path):
    """What is told of a run beside one in which some files have other bytes."""
    here = made_run(tmp_path / "here")
    return lambda **changed: list(same_bytes.differences(here, made_run(tmp_path / "there", **changed)))


def test_equal_runs_do_not_differ(told):
    assert told() == []


def test_the_version_of_the_program_may_differ(told):
    assert told(state=FILES[STATE].replace(b"0.1.0", b"0.20.1")) == []


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("weights", b"\x00weighty", f"{WEIGHTS} differs"),
        ("weights", b"\x00weights\x00", f"{WEIGHTS} differs"),
        ("state", FILES[STATE].replace(b"7", b"8"), f"{STATE} differs"),
        ("probabilities", b"0.26\n", "probabilities.txt differs"),
        ("checkpoints/more", b"", "checkpoints/more.txt is there in one only"),
    ],
)
def test_one_byte_is_told(told, name, content, expected):
    assert told(**{name: content}) == [expected]


def test_nothing_is_not_the_same_as_nothing(tmp_path):
    assert list(same_bytes.differences(tmp_path, tmp_path)) == [f"{tmp_path} holds no checkpoint"]


@pytest.mark.parametrize("differ", [False, True])
def test_it_ends_as_the_bytes_say(tmp_path, monkeypatch, capsys, differ):
    def make_run(tree, name, data, runs):
        return made_run(runs / name, probabilities=b"1\n" if differ and tree != ROOT else b"0\n")

    monkeypatch.setattr(same_bytes, "make_data", lambda tree, folder: None)
    monkeypatch.setattr(same_bytes, "make_run", make_run)
    (tmp_path / "run.py").touch()
    with pytest.raises(SystemExit) as ended:
        same_bytes.compare(str(tmp_path), only=("hashing", "full to INT8"))
    assert ended.value.code == differ
    text = "probabilities.txt differs" if differ else "the same bytes"
    names = ["full, Adagrad", "hashing", "full to INT8"]  # what is converted is trained first
    lines = [f"{name}: {text}" for name in names]
    assert capsys.readouterr().out.splitlines()[:3] == lines


def test_only_names_of_runs_are_taken(tmp_path):
    with pytest.raises(BenchmarkError, match=r"no run 'magic'; choose of robe, SGD; "):
        same_bytes.compare(str(tmp_path), only=("magic",))


def test_a_command_that_fails_is_told(tmp_path):
    (tmp_path / "run.py").write_text("raise SystemExit('error: no such method')")
    with pytest.raises(BenchmarkError, match=r"run\.py train: error: no such method"):
        same_bytes.run(tmp_path, "train")


def test_a_revision_is_checked_out_and_goes(tmp_path):
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not a clone")
    with checked_out("HEAD") as tree:
        assert (tree / "run.py").read_text() == git("show", "HEAD:run.py") + "\n"
    assert not tree.exists()
    assert str(tree) not in git("worktree", "list")
    with (
        pytest.raises(BenchmarkError, match=r"git worktree: .*no-such-revision"),
        checked_out("no-such-revision"),
    ):
        pass


WORKER = """
import json, os, sys
new = os.environ["PYTHONPATH"].endswith("new")
print(json.dumps(["gather", "split" if new else "whole"]), flush=True)
for line in sys.stdin:
    print(3.0 if new else 2.0, flush=True)
"""


def test_turns_are_paired(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(against, "WORKER", worker)
    times, alone = against.paired((tmp_path / "new", tmp_path / "old"), ("kernels",), threads=1)
    assert times == {"gather": [(3.0, 2.0)] * against.STARTS * against.ROUNDS}
    assert alone == ["split", "whole"]
    row = against.row("gather", 1, times["gather"])
    assert (row["ratio"]["median"], row["seconds"], row["seconds_before"]) == (1.5, 3, 2)
    assert against.line(row).startswith(" 1  1.500 (1.500-1.500), fastest 1.500")


def test_processes_run_the_code_of_their_tree(tmp_path):
    variables = against.variables(tmp_path, threads=2)
    assert variables["PYTHONPATH"] == str(tmp_path)
    assert {variables[name] for name in ("NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS")} == {"2"}
