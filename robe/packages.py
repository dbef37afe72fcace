"""What is installed of the packages that only some commands need, and how to install the rest."""

import importlib.metadata
from pathlib import Path

CLONE = Path(__file__).parents[1]


def extra(name: str) -> str:
    """The command that installs what an extra of pyproject.toml asks for, in a clone and without one.

    The project itself stands on no index, so its name would find nothing there.
    """
    if (CLONE / "pyproject.toml").exists():
        return f"pip install -e '{CLONE}[{name}]'"
    wanted = importlib.metadata.requires("robe-dlrm") or []
    packages = [line.split(";")[0].strip() for line in wanted if line.endswith(f'extra == "{name}"')]
    return " ".join(["pip install", *(f"'{package}'" for package in packages)])
