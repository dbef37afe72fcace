"""Remedies name options that exist, and that the command has which names them."""

import ast
import re

import pytest
import tyro
from recipes import ROOT

from robe.cli import COMMANDS, main

OPTION = r"(?<![\w-])--[a-z][a-z0-9-]*"
# What is said before a command is chosen, and what other programs are told.
OTHERS = {"--help", "--version", "--no-"}


def options(command):
    """The options of a command, as its parser has them."""
    with pytest.warns(DeprecationWarning, match="get_parser"):
        parser = tyro.extras.get_parser(COMMANDS[command])
    return {option for action in parser._actions for option in action.option_strings} | {"--help"}


@pytest.fixture(scope="module")
def known():
    return {command: options(command) for command in COMMANDS}


def texts(path):
    """The string literals of a file, but for its docstrings."""
    tree = ast.parse(path.read_text())
    documented = ast.Module | ast.FunctionDef | ast.ClassDef
    first = [node.body[0] for node in ast.walk(tree) if isinstance(node, documented) and node.body]
    docstrings = {id(node.value) for node in first if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


@pytest.mark.parametrize("room", ["robe", "data_pipeline", "analysis"])
def test_every_option_that_is_named_exists(room, known):
    everything = set().union(*known.values(), OTHERS)
    named = [
        (f"{path.relative_to(ROOT)}:{line}", option)
        for path in sorted((ROOT / room).rglob("*.py"))
        for line, text in texts(path)
        for option in re.findall(OPTION, text)
    ]
    assert len(named) >= {"robe": 50, "data_pipeline": 30, "analysis": 2}[room]
    assert [(where, option) for where, option in named if option not in everything] == []


def foreign(message, commands, known):
    """Options that a message names, but neither these commands have nor another that it names too."""
    said = [*commands, *re.findall(r"\b(prepare|train|evaluate|convert|doctor)\b", message)]
    said += ["prepare"] * ("when preparing" in message)
    return set(re.findall(OPTION, message)) - {"--no-"}.union(*(known[one] for one in said))


# Whose messages a file's are, by its name or its room: all commands named must have what a message names.
SETTINGS = "train", "plan"
SPEAKERS = {
    "robe/config.py": SETTINGS,
    "robe/optim.py": SETTINGS,
    "robe/embeddings": SETTINGS,
    "robe/convert.py": ("convert",),
    "robe/export.py": ("export",),
    "robe/export_weights.py": ("export",),
    "robe/import_weights.py": ("import",),
    "robe/doctor.py": ("doctor",),
    "robe/backend.py": ("train", "evaluate", "predict"),
    "robe/kernels": ("kernels",),
    "robe/train.py": ("train",),
    "robe/serve.py": ("serve",),
    "data_pipeline/describe.py": ("describe",),
    "data_pipeline/prepare.py": ("prepare",),
    "data_pipeline/splits.py": ("prepare",),
    "data_pipeline/input_files.py": ("prepare",),
    "data_pipeline/appearing.py": ("prepare", "convert"),
    "data_pipeline/manifest.py": ("train", "evaluate", "describe"),
    "data_pipeline/folders.py": ("train", "evaluate", "describe"),
    "data_pipeline/batches.py": ("train", "evaluate", "predict"),
}


def messages(path):
    """(line, text) of each statement's literals, joined: a message and what is put into it."""
    tree = ast.parse(path.read_text())
    docstrings = {id(node) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    simple = ast.Raise | ast.Return | ast.Assign | ast.Expr | ast.AugAssign
    for node in ast.walk(tree):
        if isinstance(node, simple) and not (id(node) in docstrings and isinstance(node.value, ast.Constant)):
            parts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
            yield node.lineno, " ".join(part for part in parts if isinstance(part, str))


@pytest.mark.parametrize("room", SPEAKERS)
def test_what_a_file_says_fits_all_that_say_it(room, known):
    paths = [ROOT / room] if room.endswith(".py") else sorted((ROOT / room).rglob("*.py"))
    said = [(f"{path.name}:{line}", text) for path in paths for line, text in messages(path)]
    wrong = {
        where: options
        for where, text in said
        if (options := set.union(*(foreign(text, [command], known) for command in SPEAKERS[room])))
    }
    assert wrong == {}


TRAIN = "click,user,price,city\n" + "".join(f"{i % 2},u{i % 7},{i},c{i % 3}\n" for i in range(60))
SCHEMA = "label='click'\ndense=['price']\n[categorical]\nuser='string'\ncity='string'\n"
RAW = "\n".join("\t".join(["1"] + ["2"] * 13 + ["ff"] * 26) for _ in range(60)) + "\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of a table's and one of raw logs."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "own.csv").write_text(TRAIN)
    (folder / "own.toml").write_text(SCHEMA)
    (folder / "raw").write_text(RAW)
    tiny = "--weights 200 --batch 16 --bottom 4 --width 4 --top 4 --block 4".split()
    for name, log, more in (("own", "own.csv", ["--schema", folder / "own.toml"]), ("logs", "raw", [])):
        call("prepare", folder / log, *more, "--out", folder / f"{name}-data")
        call("train", "--data", folder / f"{name}-data", *tiny, "--out", folder / name)
    return folder


def call(*words):
    main([str(word) for word in words])


def refused(capsys, *words):
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as ended:
        call(*words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


UNFIT = {
    "no city": ("own", "user,price\nu1,1\n", "give all columns that the model was trained on"),
    "no number": ("own", "user,price,city\nu1,much,c1\n", "price is 'much', not a number below 1e+38"),
    "too few fields": ("own", "user,price,city\nu1\n", "1 fields instead of 3; correct it"),
    "quotes": ("own", 'user,price,city\nu"1,1,c\n', "quotes that do not match"),
    "GBK": ("own", "user,price,city\n张,1,c\n", "if it is GBK"),
    "a header in GBK": ("own", "张,price,city\nu,1,c\n", "if it is GBK"),
    "nothing": ("own", "", "empty, there is no"),
    "a header alone": ("own", "user,price,city\n", "empty, there is no row"),
    "a web page": ("own", "<html>", "a web page"),
    "twice": ("own", "user,user,price,city\nu,u,1,c\n", "has two columns 'user'; rename one"),
    "a raw log": ("own", RAW, "has no column 'price'"),
    "a header": ("logs", "label\tint_0\n", "2 columns; give 40, or 39 if there is no label"),
    "a word": ("logs", RAW.replace("ff", "word"), "cat_0 is 'word', not a number of up to 8 hex digits"),
    "a comma": ("logs", RAW.replace("\t2", "\t2,5"), "int_0 is '2,5', not an integer"),
    "a table": ("logs", TRAIN, "1 columns; give 40"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_predict_names_what_it_has(case, runs, tmp_path, capsys, known):
    run, text, expected = UNFIT[case]
    path = tmp_path / ("rows.csv" if run == "own" else "rows")
    path.write_bytes(text.encode("gbk"))
    line = refused(capsys, "predict", runs / run, path, "--out", tmp_path / "p")
    assert expected in line
    assert foreign(line, ["predict"], known) == set()
    assert not (tmp_path / "p").exists()


def test_a_label_is_not_needed(runs, tmp_path, capsys):
    """Empty, absent or no label at all: predictions are the same bytes."""
    forms = [
        "click,user,price,city\n,u1,3,c1\n",
        "user,price,city\nu1,3,c1\n",
        "user,click,city,price\nu1,x,c1,3\n",
    ]
    found = set()
    for i, text in enumerate(forms):
        (tmp_path / f"{i}.csv").write_text(text)
        call("predict", runs / "own", tmp_path / f"{i}.csv", "--out", tmp_path / "p")
        found.add((tmp_path / "p").read_bytes())
    assert len(found) == 1
    rows = RAW.splitlines(keepends=True)[:3]
    (tmp_path / "raw").write_text(
        "".join(label + row[1:] for label, row in zip(["", "?", "1"], rows, strict=True))
    )
    call("predict", runs / "logs", tmp_path / "raw", "--out", tmp_path / "p")
    assert len(set((tmp_path / "p").read_text().split())) == 1
    assert "probabilities" in capsys.readouterr().out


def test_predictions_are_not_written_to_a_file_called_minus(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.csv").write_text(TRAIN)
    assert "--out -: " in refused(capsys, "predict", runs / "own", "own.csv", "--out", "-")
    assert [path.name for path in tmp_path.iterdir()] == ["own.csv"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("predict", ["{runs}/none", "{runs}/own.csv", "--out", "{tmp}/p"]),
        ("predict", ["{runs}/own", "{runs}/none", "--out", "{tmp}/p"]),
        ("predict", ["{runs}/own", "{runs}", "--out", "{tmp}/p"]),
        ("predict", ["{runs}/own", "{runs}/logs-data", "--out", "{tmp}/p"]),
        ("predict", ["{runs}/own", "{runs}/own.csv", "--out", "{runs}/own.csv"]),
        ("predict", ["{runs}/own", "{runs}/own.csv", "--out", "{tmp}"]),
        ("predict", ["{runs}/own", "{runs}/own.csv", "--out", "/proc/p"]),
        ("evaluate", ["{runs}/own", "--data", "{runs}/logs-data"]),
        ("evaluate", ["{runs}/own", "--data", "{runs}"]),
        ("convert", ["{runs}/own", "--to", "int8", "--compression", "3", "--out", "{tmp}/c"]),
        ("convert", ["{runs}/own", "--to", "robe", "--out", "{tmp}/c"]),
        ("convert", ["{runs}/own", "--to", "int8", "--out", "{runs}/logs"]),
        ("describe", ["{runs}"]),
        ("describe", ["{runs}/own-data", "--rows", "0"]),
        ("schema", ["{runs}/raw"]),
        ("schema", ["{runs}"]),
        ("doctor", ["--data", "{runs}"]),
        ("plan", ["--method", "full", "--block", "4"]),
        ("plan", ["--weights", "1", "--compression", "2"]),
        ("plan", ["--processes", "1"]),
        ("plan", ["--processes", "2", "--link", "0"]),
        ("plan", ["--card", "{runs}/own.csv"]),
        ("plan", ["--processes", "2", "--card", "{runs}/own.csv"]),
        ("train", ["--data", "{runs}/own-data", "--method", "full"]),
        ("train", ["--data", "{runs}/own-data", "--out", "{runs}/own"]),
        ("train", ["--resume", "{runs}/own", "--lr", "3"]),
        ("synth", ["--out", "{runs}"]),
        ("prepare", ["{runs}/own.csv", "--schema", "{runs}/own.toml", "--blocks", "60", "--out", "{tmp}/d"]),
        ("prepare", ["{runs}/own.csv", "--out", "{tmp}/d"]),
    ],
)  # fmt: skip
def test_other_commands_name_what_they_have(command, words, runs, tmp_path, capsys, known):
    words = [word.format(runs=runs, tmp=tmp_path) for word in words]
    with pytest.raises(SystemExit) as ended:
        call(command, *words)
    line = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code in (1, 2)
    assert foreign(line, [command], known) == set()
