"""Whatever stream, terminal or environment the program is started in: it works, or says in a line why not."""

import os
import subprocess
import sys

import pytest
from recipes import ROOT

RUN = f"{sys.executable} {ROOT / 'run.py'}"


def started(command, **environment):
    """(exit status, stdout, stderr) of a shell's command; RUN in it starts the program."""
    done = subprocess.run(
        ["bash", "-c", command.replace("RUN", RUN)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        timeout=300,
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("command", ["plan", "--help", "--version"])
def test_output_may_be_closed(command):
    assert started(f"RUN {command} >&-") == (0, "", "")
    assert started(f"RUN {command} 2>&-")[0] == 0
    assert started(f"RUN {command} >&- 2>&- <&-") == (0, "", "")


def test_errors_may_be_closed():
    assert started("RUN plan --data none >&- 2>&-") == (2, "", "")


@pytest.mark.parametrize("command", ["plan", "--version"])
def test_a_full_disk_below_the_output_is_said(command):
    code, _, err = started(f"RUN {command} > /dev/full")
    assert (code, err.count("\n")) == (2, 1)
    assert err == "error: the output: No space left on device; make room\n"


def test_who_reads_may_go():
    assert started("RUN plan | true; exit ${PIPESTATUS[0]}") == (1, "", "")


ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, ASCII])
def test_a_terminal_may_know_ascii_alone(environment, tmp_path):
    code, out, err = started("RUN --help", **environment)
    assert (code, err) == (0, "")
    assert "* train " in out
    (tmp_path / "名.csv").write_text("click,名\n1,张\n0,李\n1,张\n0,张\n", encoding="utf-8")
    code, out, err = started(f"RUN schema {tmp_path}/*.csv", **environment)
    assert (code, err) == (0, "")
    assert '"\\u540d" = "string"' in out  # which TOML reads as the name
    code, _, err = started(f"RUN train --data {tmp_path}/名", **environment)
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize("columns", ["0", "1", "20", "-3", "x", "100000"])
def test_a_terminal_may_have_any_width(columns):
    code, out, err = started("RUN evaluate --help", COLUMNS=columns, TERM="dumb")
    assert (code, err) == (0, "")
    assert "--data" in out


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("NUMBA_THREADING_LAYER", "none", "NUMBA_THREADING_LAYER=none: not one of default, safe"),
        ("NUMBA_CPU_FEATURES", "avx2", "NUMBA_CPU_FEATURES=avx2: must be like +avx2,-fma; unset it"),
    ],
)
def test_what_would_end_numba_is_refused(name, value, message):
    code, out, err = started("RUN plan", **{name: value})
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize(("numba", "polars"), [("0", "-1"), ("-1", "0")])
def test_a_number_of_threads_that_cannot_be_is_not_used(numba, polars):
    numbers = {"NUMBA_NUM_THREADS": numba, "POLARS_MAX_THREADS": polars}
    code, out, err = started("RUN plan", **numbers)
    told = [f"{name}={value}: must be at least 1, so all cores are used" for name, value in numbers.items()]
    assert (code, sorted(err.splitlines())) == (0, told)
    assert "memory:" in out


def test_a_library_of_threads_that_is_not_there_is_named():
    program = (
        "from robe import threads; import sys, numba\n"
        "def launch(): raise ValueError('No threading layer could be loaded.\\nHINT: install tbb')\n"
        "numba.set_num_threads = lambda count: launch()\n"
        "try: threads.limit_threads(1)\n"
        "except threads.ThreadsError as error: sys.exit(str(error))\n"
    )
    code, _, err = started(f'{sys.executable} -c "$PROGRAM"', PROGRAM=program, NUMBA_THREADING_LAYER="tbb")
    assert (code, err.count("\n")) == (1, 1)
    assert "NUMBA_THREADING_LAYER=tbb: No threading layer could be loaded." in err


def test_matplotlib_says_nothing_of_where_it_keeps_its_fonts(tmp_path):
    (tmp_path / "file").write_text("")
    program = "from robe.terminal import prepare_streams; prepare_streams(); import matplotlib.pyplot"
    command = f'{sys.executable} -c "$PROGRAM"'
    assert started(command, PROGRAM=program, MPLCONFIGDIR=str(tmp_path / "file")) == (0, "", "")
