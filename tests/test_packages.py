"""The commands that install what is missing work with a clone and without one."""

import importlib
import re
import sys

import pytest
from test_environment import PROJECT, ROOT

from robe import packages
from robe.packages import extra


def test_in_a_clone_an_extra_is_installed_from_it():
    assert extra("mpi") == f"pip install -e '{ROOT}[mpi]'"


def test_without_a_clone_its_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "CLONE", tmp_path)
    wanted = ["numpy<2.5,>=2.2", 'torch<3,>=2.9; extra == "torch"', 'cupy-cuda13x[ctk]<15; extra == "cuda13"']
    wanted.append('numba-cuda[cu13]>=0.30; extra == "cuda13"')
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
    assert extra("cuda13") == "pip install 'cupy-cuda13x[ctk]<15' 'numba-cuda[cu13]>=0.30'"


def test_without_torch_its_module_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "robe.torch", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"^robe\.torch needs PyTorch: pip install .*\[torch\]'$"):
        importlib.import_module("robe.torch")


def test_prepare_names_the_package_that_the_extra_asks_for():
    """data_pipeline knows nothing of robe, so the range stands there once more."""
    source = (ROOT / "data_pipeline/ranks.py").read_text()
    assert re.search(r"pip install '(mpi4py\S+)'", source)[1] == PROJECT["optional-dependencies"]["mpi"][0]


@pytest.mark.parametrize("folder", ["robe", "data_pipeline", "analysis", "benchmarks"])
def test_no_message_sends_to_an_index_that_does_not_have_the_project(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert not re.search(r"pip install \S*robe-dlrm", path.read_text()), path
