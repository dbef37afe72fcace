"""What a user gets who has no clone: the wheel brings the command, the source archive its own tests.

The fresh environment takes our package from the wheel and its dependencies from the environment that runs the
tests: to download and unpack them once more would test pip and take minutes.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from robe.kernels.parts import disk_cache

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import build_meta as b; import sys; b.build_sdist(sys.argv[1])"


def run(*command, cwd, **environment):
    """What a command printed, run as by a user who has set nothing of Python's or Numba's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "NUMBA_"))}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The sources as their archive holds them, unpacked."""
    folder = tmp_path_factory.mktemp("archive")
    ignore = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "*.egg-info", "build", "data", "runs")
    copy = shutil.copytree(ROOT, folder / "copy", ignore=ignore)
    builder = folder / "builder"
    venv.create(builder, with_pip=True)
    run(builder / "bin/pip", "install", "-q", "setuptools>=77", cwd=folder)
    run(builder / "bin/python", "-c", BUILD, folder, cwd=copy)
    (packed,) = folder.glob("*.tar.gz")
    with tarfile.open(packed) as file:
        file.extractall(folder, filter="data")
    run(
        builder / "bin/pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        copy,
        cwd=folder,
    )
    return folder / packed.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(archive):
    (found,) = archive.parent.glob("*.whl")
    return found


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"robe", "data_pipeline", "analysis"}
    tracked = {p.relative_to(ROOT).as_posix() for top in tops for p in (ROOT / top).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == tracked
    assert {"robe/py.typed", "data_pipeline/py.typed"} < set(names)


def test_the_command_trains_without_a_clone(wheel, tmp_path):
    fresh = tmp_path / "environment"
    venv.create(fresh)
    pip = wheel.parent / "builder/bin/pip", "--python", fresh / "bin/python"
    run(*pip, "install", "-q", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    site = next((fresh / "lib").glob("python*/site-packages"))
    # Behind the fresh environment's own packages; a path, so that no .pth there brings in a clone.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    work = tmp_path / "work"
    work.mkdir()

    # Of the same sources, which is all that compiled kernels depend on.
    kept = {"NUMBA_CACHE_DIR": str(disk_cache.folder().parent)}

    def robe(*arguments):
        return run(fresh / "bin/robe", *arguments, cwd=work, **kept)

    where = run(fresh / "bin/python", "-c", "import robe; print(robe.__file__)", cwd=work)
    assert Path(where.strip()).is_relative_to(site)
    robe("synth", "--out", "raw", "--rows", "700", "--days", "2")
    robe("prepare", "raw", "--out", "data")
    assert "AUC" in robe("train", "--data", "data", "--weights", "500", "--out", "run")
    assert (work / "run/curves.png").exists()
    robe("predict", "run", "data", "--out", "clicks.txt")
    assert len((work / "clicks.txt").read_text().splitlines()) == 700
    assert "error: " not in robe("plan", "--weights", "500", "--data", "data")
    assert sorted(p.name for p in work.iterdir()) == ["clicks.txt", "data", "raw", "run"]


def test_the_archive_holds_what_its_tests_need(archive):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():  # none where this is such an archive itself
        assert (archive / name).exists(), name
    chosen = [f"tests/test_{name}.py" for name in ("walls", "environment", "config", "packages")]
    # `archive` in front, so that its own sources are tested and not an installed clone's.
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, cwd=archive, PYTHONPATH=".")
