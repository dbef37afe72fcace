"""The direction of the imports: what keeps the project readable."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = "robe", "data_pipeline", "analysis", "benchmarks"
SOURCES = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))
# How files are written knows nothing of data or models, and both write by it.
SHARED = "data_pipeline/whole_files.py"


@cache
def imports(path):
    """All modules a file imports, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def rooms(prefix):
    return [p for p in SOURCES if p.relative_to(ROOT).as_posix().startswith(prefix)]


# Where models and data meet; nothing else in robe/ knows both.
TOP = ("robe/cli.py", "robe/run_folder.py", "robe/serve.py")


def below_top():
    return [p for p in rooms("robe/") if p.relative_to(ROOT).as_posix() not in TOP]


def forbidden(paths, *packages):
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in paths
        for name in imports(path)
        if any(name == package or name.startswith(package + ".") for package in packages)
    ]


def test_there_are_sources():
    assert len(rooms("robe/kernels/")) > 8
    assert len(rooms("data_pipeline/")) > 4


def test_robe_and_the_data_pipeline_do_not_know_each_other():
    """But for run folders and commands, which bring them together, and for how files are written."""
    known = forbidden(below_top(), "data_pipeline")
    assert [line for line in known if "imports data_pipeline.whole_files" not in line] == []
    assert forbidden(rooms("data_pipeline/"), "robe") == []


def test_what_every_room_writes_by_knows_no_room():
    assert forbidden(rooms(SHARED), *ROOMS) == []


def test_nothing_below_knows_the_top():
    assert all((ROOT / top).exists() for top in TOP)
    # robe/__init__.py is the door: it names what the top offers, and imports that when it is asked for.
    below = [p for p in below_top() if p != ROOT / "robe/__init__.py"] + rooms("data_pipeline/")
    assert forbidden(below, "robe.cli", "robe.run_folder", "robe.serve", "run") == []
    assert forbidden(rooms("robe/run_folder.py"), "robe.cli", "robe.serve", "run") == []


def test_only_the_command_line_uses_analysis_and_benchmarks():
    outside = [p for p in rooms("robe/") + rooms("data_pipeline/") if p.name != "cli.py"]
    assert forbidden(outside, "analysis", "benchmarks") == []


def test_only_the_backend_imports_cupy_and_cublas():
    assert forbidden([p for p in SOURCES if p.name != "backend.py"], "cupy", "cupyx", "nvmath") == []


def test_mpi_is_loaded_by_what_finds_out_that_there_is_need():
    """All else is given a communicator."""
    outside = [p for p in SOURCES if p != ROOT / "data_pipeline/ranks.py"]
    assert forbidden(outside, "mpi4py") == []


def test_torch_stays_where_it_is_used():
    """And in the benchmarks, whose peers it has."""
    users = "torch.py", "import_weights.py", "export_weights.py"
    outside = [p for p in SOURCES if p.relative_to(ROOT).parts[0] != "benchmarks" and p.name not in users]
    assert forbidden(outside, "torch", "robe.torch") == []


def test_polars_stays_in_the_data_pipeline():
    assert forbidden(rooms("robe/"), "polars") == []


def test_matplotlib_draws_what_is_described_and_nothing_else_of_the_data_pipeline():
    assert forbidden([p for p in rooms("data_pipeline/") if p.name != "describe.py"], "matplotlib") == []


def test_numba_compiles_in_the_kernels_only():
    """backend.py, threads.py and doctor.py ask Numba for its threads and devices; nothing else knows it."""
    outside = [
        p
        for p in rooms("robe/")
        if "kernels" not in p.parts and p.name not in ("backend.py", "threads.py", "doctor.py")
    ]
    assert forbidden(outside + rooms("data_pipeline/"), "numba") == []


@pytest.mark.parametrize(
    ("above", "below"),
    [
        ("robe/kernels/", ("robe.backend", "robe.embeddings", "robe.model", "robe.train", "robe.config")),
        ("robe/backend.py", ("robe.embeddings", "robe.model", "robe.train", "robe.config")),
        ("robe/feed.py", ("robe.backend", "robe.kernels", "robe.model", "robe.train", "robe.config")),
        ("robe/matmul.py", ("robe.backend", "robe.kernels", "robe.model", "robe.train", "robe.config")),
        ("robe/config.py", ("robe.backend", "robe.kernels", "robe.optim", "robe.embeddings", "robe.model")),
        ("robe/ranks.py", ("robe.backend", "robe.kernels", "robe.model", "robe.train", "robe.config")),
        ("robe/optim.py", ("robe.embeddings", "robe.interaction", "robe.model", "robe.train")),
        (
            "robe/embeddings/",
            (
                *("robe.interaction", "robe.kernels.interaction", "robe.model", "robe.layers"),
                *("robe.train", "robe.checkpoint"),
            ),
        ),
        ("robe/interaction.py", ("robe.model", "robe.layers", "robe.train", "robe.checkpoint")),
        ("robe/model.py", ("robe.train", "robe.checkpoint", "robe.report", "robe.plan", "robe.doctor")),
    ],
)
def test_arrows_point_down(above, below):
    assert forbidden(rooms(above), *below) == []


def test_only_the_backend_asks_which_backend_it_is():
    """Others ask for what a backend says that it can do."""
    for path in below_top():
        assert path.name == "backend.py" or "backend.name" not in path.read_text(), path


def circles(paths, root):
    """The modules that import themselves through others, and those that lie between such circles."""
    names = {".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}
    needs = {name: set(imports(path)) for name, path in names.items()}
    # `from robe import train` needs robe.train; what robe itself offers is for users.
    left = {name: needed & (names.keys() - {name, "robe"}) for name, needed in needs.items()}
    while ends := [
        name for name in left if not left[name] & left.keys() or name not in set().union(*left.values())
    ]:
        for name in ends:
            del left[name]
    return sorted(left)


def test_no_module_imports_itself_through_others():
    """An import inside a function counts: it hides a circle from Python, but not from who reads the code."""
    assert circles(SOURCES, ROOT) == []


def test_nothing_is_ever_unpickled():
    assert forbidden([*SOURCES, ROOT / "run.py"], "pickle", "cloudpickle", "joblib", "shelve", "dill") == []
    for path in SOURCES:
        text = path.read_text()
        assert "allow_pickle=True" not in text, path
        assert all("weights_only=True" in call for call in re.findall(r"torch\.load\((.*)\)", text)), path
