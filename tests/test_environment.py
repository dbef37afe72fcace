"""The conda environment and the pip package ask for the same versions."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def split(requirement):
    name, ranges = re.fullmatch(r"([a-z0-9._-]+)(\S*)", requirement).groups()
    return name, ranges


def test_environment_yml_and_pyproject_are_in_step():
    lines = (ROOT / "environment.yml").read_text().split("dependencies:")[1].splitlines()
    conda = dict(split(line.strip()[2:]) for line in lines if line.startswith("  - "))
    conda["xxhash"] = conda.pop("python-xxhash")  # conda-forge's xxhash is the library in C
    assert conda.pop("python") == PROJECT["requires-python"]
    conda["isal"] = conda.pop("python-isal")  # as conda-forge calls it
    assert conda == dict(map(split, PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]))


def test_every_version_has_both_ends():
    extras = [requirement for extra in PROJECT["optional-dependencies"].values() for requirement in extra]
    for requirement in PROJECT["dependencies"] + extras:
        assert re.search(r">=\d[\d.]*,<\d[\d.]*$", requirement), requirement


def test_figures_in_the_pages_are_those_of_the_results():
    from benchmarks.readme import PAGES, fill

    for page in PAGES:
        assert fill(page) == page.read_text()
