"""The recipes of docs/debugging.md, run as they stand there, on a copy of the sources."""

import re
import shutil

import numpy as np
import pytest
from recipes import ROOT, blocks, shell

from robe.kernels.parts.hashing import locate, slot_map, span_at

PAGE = "debugging.md"
RUN, TYPED = ([text for _, text in blocks(PAGE, kind)] for kind in ("run", "type"))


@pytest.fixture
def copy(tmp_path):
    """The sources, with the file that the recipes use."""
    shutil.copytree(ROOT / "robe", tmp_path / "robe", ignore=shutil.ignore_patterns("__pycache__"))
    ((name, text),) = blocks(PAGE, "file")
    (tmp_path / name).write_text(text)
    return tmp_path


def test_a_cuda_kernel_in_the_simulator(copy):
    ((words, lines),) = blocks(PAGE, "insert")
    name, before = re.fullmatch(r"(\S+) before (.*)", words).groups()
    source = (copy / name).read_text()
    visitor = source.index("def _read_four")
    start = source.rindex("\n", 0, source.index(before, visitor)) + 1
    (copy / name).write_text(source[:start] + lines + source[start:])
    done = shell(RUN[0], copy, TYPED[0])
    assert done.returncode == 0, done.stderr
    where, token, element = slot_map("mix", 8, 4, 1000), np.uint64(8), np.uint64(4)
    slot, _, bits = span_at(where, token, element)
    assert f"({slot}, {int(bits) & 1}, {float(slot)})" in done.stdout
    assert str([int(x) for x in locate(where, token, element)]) in done.stdout


def test_a_cpu_kernel_without_the_compiler(copy):
    lines = (copy / "robe" / "kernels" / "parts" / "spans.py").read_text().splitlines()
    command = re.sub(
        r"\{line of '(.*?)'\}",
        lambda m: str(next(n for n, line in enumerate(lines, 1) if m[1] in line)),
        RUN[1],
    )
    done = shell(command, copy, TYPED[1])
    slot, length, bits = span_at(slot_map("mix", 8, 4, 1000), np.uint64(7), np.uint64(0))
    assert f"({slot}, {length}, {bits})" in done.stdout
    assert f"{'-' if bits & np.uint64(1) else ''}{slot}." in done.stdout.replace(" ", "")


def test_where_a_nan_comes_from(copy):
    done = shell(RUN[2], copy)
    assert done.returncode == 1
    assert "interaction.py" in done.stderr
    assert "FloatingPointError: overflow encountered in matmul" in done.stderr


def test_bounds_checking(copy):
    done = shell(RUN[3], copy)
    assert done.returncode == 1
    assert "IndexError: index is out of bounds" in done.stderr


def test_checking_a_kernel():
    done = shell(RUN[4], ROOT)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^ok +(\w+) +(\w+) ", done.stdout, re.M) == [("gather", "cpu")]
    assert len(RUN) == 5
