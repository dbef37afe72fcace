"""Another revision of this repository beside the one at hand: its files, and programs that run its code."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measure import BenchmarkError

ROOT = Path(__file__).parents[1]


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A folder with the files of a revision, gone in the end; BenchmarkError if git knows no such revision.

    revision: what git calls it, or the folder where it is checked out already.
    """
    if (Path(revision) / "run.py").exists():
        yield Path(revision).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="revision-") as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--detach", tree, revision)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", tree)


def git(*arguments) -> str:
    done = subprocess.run(["git", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(f"git {arguments[0]}: {done.stderr.strip() or 'failed'}")
    return done.stdout.strip()


def environment(tree: Path) -> dict[str, str]:
    """The variables of a program that imports the packages of this tree, wherever it is started."""
    return os.environ | {"PYTHONPATH": str(tree)}
