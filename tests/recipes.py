"""Pages of docs/ whose code blocks are run as they stand there; a comment before a block marks it."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(page, kind, text=None):
    """What stands in the code blocks behind a comment of that kind, with the rest of the comment.

    text: a part of the page, instead of all of it.
    """
    text = (ROOT / "docs" / page).read_text() if text is None else text
    found = re.findall(rf"<!-- {kind}(.*?) -->\n```\w*\n(.*?)```", text, re.DOTALL)
    return [(words.strip(), code) for words, code in found]


def sections(page):
    """Title -> text of what stands under each heading of the second level."""
    text = (ROOT / "docs" / page).read_text()
    return dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))


def shell(command, folder, typed=""):
    # Plain `python` is the one of this environment, and what a user's shell would not set is left out.
    dropped = ("NUMBA_ENABLE_CUDASIM", "NUMBA_DISABLE_JIT", "PYTHONBREAKPOINT")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = f"set -e; {command}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        input=typed,
        capture_output=True,
        text=True,
        timeout=300,
    )
