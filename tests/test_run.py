"""The commands as a user gives them, from raw file to predictions, and every bad input."""

import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import robe
from data_pipeline.batches import Rows
from data_pipeline.manifest import Manifest
from data_pipeline.schema import DataError
from robe import cli as command_line
from robe import metrics, report, run_folder
from robe.config import ConfigError, TrainConfig, resolve
from robe.train import TrainingError, predict

ROOT = Path(__file__).parents[1]
TABLES = ["--bottom", "8", "--width", "4", "--top", "8", "--batch", "64"]
TINY = [*TABLES, "--block", "4"]


def run(*arguments, capsys):
    """Run a command in this process; returns (exit code, standard output, standard error)."""
    arguments = [str(a) for a in arguments]
    try:
        command_line.main(arguments)
        code = 0
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def start(*arguments, cwd):
    """Start a command in a process of its own."""
    command = [sys.executable, str(ROOT / "run.py"), *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Raw synthetic files, prepared both ways."""
    folder = tmp_path_factory.mktemp("data")
    command_line.main(["synth", "--out", str(folder / "raw"), "--rows", "6001", "--days", "3"])
    for ids in ("hash", "dictionary"):
        command_line.main(["prepare", str(folder / "raw"), "--out", str(folder / ids), "--ids", ids])
    return folder


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run of ROBE on hashed ids, and of full tables and of mixed-precision ones on a dictionary."""
    runs = tmp_path_factory.mktemp("runs")
    for method, ids in (("robe", "hash"), ("full", "dictionary"), ("mixed_precision", "dictionary")):
        arguments = [
            "train",
            "--data",
            str(folder / ids),
            "--out",
            str(runs / method),
            "--method",
            method,
            *(TINY if method == "robe" else TABLES),
        ]
        command_line.main([*arguments, "--baseline"] if method == "robe" else arguments)
    return runs


@pytest.mark.parametrize(
    "command", ["", "train", "evaluate", "predict", "synth", "prepare", "describe", "plan", "doctor"]
)
def test_help(command, capsys):
    code, out, _ = run(*command.split(), "--help", capsys=capsys)
    assert code == 0
    assert "usage: run.py" in out


def test_a_run_leaves_its_files(trained):
    names = {path.name for path in (trained / "robe").iterdir()}
    assert names == {
        *(".lock", "config.json", "data", "metrics.jsonl", "summary.json", "curves.png", "checkpoints"),
        "without_categories",
    }
    summary = json.loads((trained / "robe" / "summary.json").read_text())
    assert summary["data"].startswith("SYNTHETIC")
    assert summary["test"]["rows"] == 1000
    assert summary["validation"]["rows"] == 1000
    assert 0.5 < summary["test"]["auc"] < summary["bayes"]["test"]["auc"]
    assert summary["without_categories"]["embedding_parameters"] == 0
    assert summary["rows_trained"] == 4001
    assert summary["compression"] == pytest.approx(100, rel=0.01)
    assert re.fullmatch(
        r"[\d,]+ weights: [\d,]+ rows \(distinct ids in the data.*\), width 4", summary["compressed_from"]
    )
    assert (trained / "robe" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_first_line_names_the_data(folder, tmp_path, capsys):
    code, out, _ = run("train", "--data", folder / "hash", "--out", tmp_path / "r", *TINY, capsys=capsys)
    assert code == 0
    first = out.splitlines()[0]
    assert first.startswith(f"data: {folder / 'hash'}: SYNTHETIC")
    assert "test is the first half of the last day" in first
    assert "best possible on the test half (Bayes)" in out


@pytest.mark.parametrize(
    ("options", "expected"), [((), True), (("--no-graph",), False), (("--profile",), False)]
)
def test_who_wants_no_graph_gets_a_backend_without(
    options, expected, folder, trained, tmp_path, monkeypatch, capsys
):
    """Phases are of a step whose kernels are launched one by one."""
    asked = []

    def select(name, precision, deterministic, graph):
        asked.append(graph)
        raise ConfigError("enough")

    for module in ("robe.backend", "robe.checkpoint"):
        monkeypatch.setattr(f"{module}.select", select)
    commands = [("train", "--data", folder / "hash", "--out", tmp_path / "run", *TINY)]
    if "--profile" not in options:
        commands.append(("evaluate", trained / "robe"))
        commands.append(("predict", trained / "robe", folder / "hash", "--out", tmp_path / "p"))
    for command in commands:
        assert run(*command, *options, capsys=capsys)[2] == "error: enough\n"
    assert asked == [expected] * len(commands)


@pytest.mark.parametrize(
    ("method", "ids"), [("robe", "hash"), ("full", "dictionary"), ("mixed_precision", "dictionary")]
)
@pytest.mark.parametrize("form", ["labelled", "unlabelled", "gz"])
def test_predictions_from_raw_text_are_those_of_evaluation(
    method, ids, form, folder, trained, tmp_path, capsys
):
    """Row by row, the last day's raw file against the prepared test half and validation half."""
    raw = tmp_path / "rows"
    lines = (folder / "raw" / "day_2").read_bytes().splitlines(keepends=True)
    if form == "unlabelled":
        lines = [line.split(b"\t", 1)[1] for line in lines]
    raw.write_bytes(gzip.compress(b"".join(lines)) if form == "gz" else b"".join(lines))
    code, _, err = run("predict", trained / method, raw, "--out", tmp_path / "p", capsys=capsys)
    assert code == 0, err
    probabilities = np.loadtxt(tmp_path / "p")
    model = run_folder.load(trained / method, "cpu").model
    manifest = Manifest.load(folder / ids)
    logits = np.concatenate([predict(model, Rows(manifest, split))[1] for split in ("test", "validation")])
    # float32 matrix products of batches of other sizes, then nine digits.
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits.astype(float))), rtol=1e-5)
    run("predict", trained / method, folder / ids, "--out", tmp_path / "all", capsys=capsys)
    np.testing.assert_allclose(np.loadtxt(tmp_path / "all")[-len(probabilities) :], probabilities, rtol=1e-5)


def test_a_summary_tells_all_bytes_and_what_the_cache_did(trained):
    summary = json.loads((trained / "mixed_precision" / "summary.json").read_text())
    cache = summary["cache"]
    assert cache["hits"] + cache["misses"] == summary["rows_trained"] * 26
    assert sum(feature["hits"] for feature in cache["features"]) == cache["hits"]
    rows = int(re.search(r"([\d,]+) rows", summary["compressed_from"])[1].replace(",", ""))
    # Rows of 4 codes, scale and bias; places of 4 floats, a tag and a stamp.
    places = 32 * round(0.05 * rows / 32)
    assert summary["embedding_bytes"] == rows * 8 + places * 24
    assert summary["compression"] == rows * 16 / summary["embedding_bytes"]
    log = [
        json.loads(line) for line in (trained / "mixed_precision" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [entry["hits"] for entry in log if entry["kind"] == "validation"][-1] == cache["hits"]
    text = report.text(summary)
    assert f"{summary['compression']:.2f}x less than the {rows * 16:,} B" in text
    assert f"{cache['evictions']:,} rows evicted" in text


def test_evaluate_agrees_with_the_summary(trained, capsys):
    summary = json.loads((trained / "robe" / "summary.json").read_text())
    for split in ("test", "validation"):
        code, out, _ = run("evaluate", trained / "robe", "--split", split, capsys=capsys)
        assert code == 0
        assert "SYNTHETIC" in out
        result = json.loads(out)
        assert {key: result[key] for key in summary[split]} == summary[split]
        assert result["rows_per_second"] > 0
        assert 0 < result["busy"] < 1


def test_evaluate_tells_calibration_and_the_auc_by_a_column(trained, folder, capsys):
    command = ["evaluate", trained / "robe", "--backend", "cpu"]
    code, out, err = run(*command, "--group-by", "cat_5", capsys=capsys)
    assert code == 0, err
    loaded = robe.load(trained / "robe", "cpu")
    manifest = run_folder.open_folder(folder / "hash")
    rows = Rows(manifest, "test")
    label, logits = predict(loaded.model, rows)
    column = manifest.schema.categorical.index("cat_5")
    ids = np.concatenate([batch.ids[:, column] for batch in rows.batches(100)])
    expected = {"column": "cat_5", **metrics.grouped_auc(label, logits, ids)}
    result = json.loads(out)
    assert result["grouped"] == expected
    assert 1 < expected["groups"] <= len(np.unique(ids))
    assert result["reliability"] == metrics.reliability(label, logits)
    summary = json.loads((trained / "robe" / "summary.json").read_text())
    assert summary["reliability"] == result["reliability"]
    mean = 1 / (1 + np.exp(-logits.astype(float)))
    assert result["calibration"] == pytest.approx(mean.mean() / label.mean(), rel=1e-9)
    assert f"the mean prediction is {result['calibration']:.3f} times the base rate" in report.text(summary)
    code, _, err = run(*command, "--group-by", "label", capsys=capsys)
    assert code == 2
    assert "error: --group-by label: no categorical column of these data: " in err


def test_a_run_keeps_its_precision(folder, tmp_path, capsys):
    """Evaluation computes as training did, and the profile has the phases of a step."""
    train = ["train", "--data", folder / "hash", "--out", tmp_path / "r", *TINY]
    code, out, err = run(*train, "--precision", "bf16", "--deterministic", "--profile", capsys=capsys)
    assert code == 0, err
    assert re.search(
        r"load +63 .*forward +63 .*top +63 .*embedding +63 .*bottom +63 .*update +63 ", out, re.DOTALL
    )
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert "bf16 emulated" in summary["backend"]
    result = json.loads(run("evaluate", tmp_path / "r", capsys=capsys)[1])
    assert result["auc"] == summary["test"]["auc"]
    assert run("train", "--resume", tmp_path / "r", "--precision", "tf32", capsys=capsys)[0] == 2


def test_a_killed_run_resumes_to_the_same_bytes(folder, tmp_path):
    """SIGKILL at a random moment, twice; in a process of its own, as a user's would be."""
    common = ["--data", folder / "hash", *TINY, "--epochs", "6", "--checkpoint-every", "7"]
    whole = start("train", *common, "--out", tmp_path / "whole", cwd=tmp_path)
    _, errors = whole.communicate()
    assert whole.returncode == 0, errors
    generator = random.Random(1)
    arguments, killed = ["train", *common, "--out", tmp_path / "part"], 0
    log = tmp_path / "part" / "metrics.jsonl"
    while True:
        process = start(*arguments, cwd=tmp_path)
        if killed < 2:
            before = log.stat().st_size if log.exists() else 0
            while process.poll() is None and not (log.exists() and log.stat().st_size > before):
                time.sleep(0.002)
            time.sleep(generator.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
        killed += 1
        arguments = ["train", "--resume", tmp_path / "part"]
    assert killed >= 1
    weights = [
        sorted((tmp_path / name / "checkpoints").glob("step_*/weights.safetensors"))[-1]
        for name in ("whole", "part")
    ]
    assert weights[0].parent.name == weights[1].parent.name
    assert weights[0].read_bytes() == weights[1].read_bytes()
    test = [json.loads((tmp_path / name / "summary.json").read_text())["test"] for name in ("whole", "part")]
    assert test[0] == test[1]


def test_a_run_teaches_another(folder, trained, tmp_path, capsys):
    """What it says is computed once; resuming needs it only where that is gone, and refuses another."""
    data = shutil.copytree(folder / "dictionary", tmp_path / "data")
    teach = ["train", "--data", data, *TINY, "--teacher", tmp_path / "teacher", "--baseline"]
    teacher = shutil.copytree(trained / "full", tmp_path / "teacher")
    code, _, err = run(*teach, "--out", tmp_path / "a", capsys=capsys)
    assert code == 0, err
    files = sorted(data.glob("day_*_teacher_*.npy"))
    assert [path.name.split("_teacher_")[0] for path in files] == ["day_0", "day_1"]
    run("predict", teacher, data, "--out", tmp_path / "p", capsys=capsys)
    said = np.concatenate([np.load(path)[:, 0] for path in files])
    np.testing.assert_allclose(said, np.loadtxt(tmp_path / "p")[: len(said)], rtol=1e-5)
    plain = json.loads(
        (tmp_path / "a" / "without_categories" / "checkpoints" / "step_00000063" / "state.json").read_text()
    )
    assert "teacher" not in plain["config"]

    written = [path.stat().st_mtime_ns for path in files]
    assert run(*teach, "--out", tmp_path / "b", "--teacher-weight", "0.5", capsys=capsys)[0] == 0
    assert [path.stat().st_mtime_ns for path in files] == written
    whole, other = (
        next((tmp_path / name / "checkpoints").glob("step_00000063/weights.safetensors")) for name in "ab"
    )
    assert whole.read_bytes() != other.read_bytes()
    expected = whole.read_bytes()
    shutil.rmtree(whole.parent)
    teacher.rename(tmp_path / "away")
    assert run("train", "--resume", tmp_path / "a", capsys=capsys)[0] == 0
    assert whole.read_bytes() == expected
    files[1].unlink()
    code, _, err = run("train", "--resume", tmp_path / "a", capsys=capsys)
    assert (code, "no checkpoint here" in err) == (2, True)
    shutil.copytree(trained / "mixed_precision", teacher)
    code, _, err = run("train", "--resume", tmp_path / "a", capsys=capsys)
    assert (code, err.count("\n"), "is another model than it was" in err) == (2, 1, True)
    shutil.rmtree(teacher)
    (tmp_path / "away").rename(teacher)
    shutil.rmtree(whole.parent)
    assert run("train", "--resume", tmp_path / "a", capsys=capsys)[0] == 0
    assert whole.read_bytes() == expected

    settings = json.loads((tmp_path / "b" / "config.json").read_text())
    assert Path(settings.pop("teacher")) == teacher
    (tmp_path / "b" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="names no teacher, or one that taught nothing"):
        run_folder.read(tmp_path / "b")

    for content, message in (
        (
            np.full((2000, 1), 1.5, np.float32),
            "is no probability; delete it, and the training makes it again",
        ),
        (np.full((2000, 1), np.nan, np.float32), "is no probability"),
        (np.zeros((3, 1), np.float32), "holds float32 (3, 1), not float32 (2000, 1); delete it"),
    ):
        np.save(files[1], content)
        code, _, err = run(*teach, "--out", tmp_path / "c", capsys=capsys)
        assert (code, err.count("\n"), message in err) == (2, 1, True), err
        assert not (tmp_path / "c").exists()


def test_a_teacher_of_other_data_is_refused(folder, trained, tmp_path, capsys):
    code, _, err = run(
        *("train", "--data", folder / "dictionary", *TINY, "--out", tmp_path / "r"),
        *("--teacher", trained / "robe"),
        capsys=capsys,
    )
    assert (code, err.count("\n")) == (2, 1)
    assert f"--teacher {trained / 'robe'}: {folder / 'dictionary'}: its columns or ids do not mean" in err
    assert not (tmp_path / "r").exists()
    code, out, _ = run("plan", "--teacher", "r", "--data", folder / "hash", capsys=capsys)
    assert re.search(r"probabilities of the teacher +24,004 B", out)


def test_without_data_a_demonstration_is_made(tmp_path, monkeypatch, capsys):
    """The default command, with fewer rows and a smaller model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "DEMO_ROWS", 3000)
    code, out, err = run("train", *TINY, capsys=capsys)
    assert code == 0, err
    assert "SYNTHETIC" in out.splitlines()[0]
    assert "the same model without categorical features" in out
    again = run("train", *TINY, "--out", "second", capsys=capsys)[1]
    assert again.splitlines()[0].startswith("data: data/demo/hash_zscore: SYNTHETIC")


def test_the_default_command_follows_the_best_recipe(tmp_path, monkeypatch, capsys):
    """Its line names options that make the same run of the same rows, in three bits and two passes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "DEMO_ROWS", 3000)
    code, out, err = run("train", "--seed", 3, "--out", "demo", capsys=capsys)
    assert code == 0, err
    options = out.splitlines()[0].partition("as with ")[2].split()
    data = "--data", "data/demo/hash_zscore"
    code, _, err = run("train", *data, *options, "--seed", 3, "--out", "told", capsys=capsys)
    assert code == 0, err
    demo, told = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("demo", "told"))
    assert demo["test"] == told["test"]
    assert demo["embedding_bytes"] == told["embedding_bytes"]
    config = json.loads((tmp_path / "demo" / "config.json").read_text())["config"]
    assert (config["embedding"]["memory"], config["embedding"]["compression"]) == ("int3", 11)
    assert (config["epochs"], config["fresh_embeddings"], config["average"]) == (2, True, 0.9)
    assert (config["optimizer"]["optimizer"], config["optimizer"]["lr"]) == ("adam", 0.001)
    assert demo["averaged"]["test"] == told["averaged"]["test"] != demo["test"]


def test_plan_prints_bytes(folder, capsys):
    code, out, _ = run("plan", "--preset", "mlperf", "--weights", "27000000", capsys=capsys)
    assert code == 0
    assert re.search(r"embedding weights +108,000,000 B", out)
    assert "96,136,908,288 B" in out
    assert "890.2x" in out
    assert re.search(
        r"train an epoch +[\d.,]+ h +[\d.,]+ h  4,195,197,692 rows / \(2,048 rows / .* mlperf, ROBE", out
    )
    code, out, _ = run("plan", "--preset", "mlperf", "--processes", "5", "--link", "10", capsys=capsys)
    assert code == 0
    assert re.findall(r"^ +(\d+) +\S+ +\S+ ms +\S+ ms +[\d.]+$", out, re.M) == ["2", "4", "5"]
    assert "at 10 GB/s" in out
    code, out, _ = run("plan", "--data", folder / "dictionary", "--method", "full", capsys=capsys)
    assert code == 0
    code, _, err = run("plan", "--data", folder / "hash", "--method", "full", capsys=capsys)
    assert code == 2
    assert err.startswith("error: --method full cannot use the ids of these data (hash); prepare them with")
    mixed = ["plan", "--preset", "mlperf", "--method", "mixed_precision", "--bits", "4"]
    assert "6.99x in bytes" in run(*mixed, capsys=capsys)[1]
    shards = sum(path.stat().st_size - 128 for path in (folder / "dictionary").glob("day_*.npy"))
    assert re.search(rf"shards +{shards:,} B", out)


def test_describe(folder, tmp_path, capsys):
    data, out = folder / "hash", tmp_path / "look.png"
    code, text, _ = run("describe", data, "--rows", "500", "--all", "--out", out, capsys=capsys)
    assert code == 0
    assert text.startswith(f"{data}: SYNTHETIC data")
    assert re.search(r"looked at ([\d,]+) of \1 rows; sample: 50\d of all days", text)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_doctor(folder, capsys):
    code, out, _ = run("doctor", "--data", folder / "hash", capsys=capsys)
    assert code == 0
    assert "FAIL" not in out
    assert "overfits one batch of it" in out
    assert "all checksums hold" in out


def test_messages_name_the_command_as_it_was_started(tmp_path, capsys, monkeypatch):
    """As `robe` where the package is installed, and so in whatever it raises; as run.py in a clone."""
    script = tmp_path / "robe"
    script.write_text("from robe.cli import main\nmain()\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def installed(*arguments):
        command = [sys.executable, str(script), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)

    monkeypatch.chdir(tmp_path)
    remedy = "make the folder with `{} prepare FILE --out no`"
    assert remedy.format("robe") in installed("train", "--data", "no").stderr
    assert remedy.format("python run.py") in run("train", "--data", "no", capsys=capsys)[2]
    assert "usage: robe" in installed("plan", "--help").stdout
    with pytest.raises(DataError, match="`robe prepare FILE"):
        Manifest.load("no")
    sources = [path.read_text() for room in ("robe", "data_pipeline") for path in (ROOT / room).rglob("*.py")]
    assert len(sources) > 50
    assert [text for text in sources if "`python run.py " in text or "`run.py " in text] == [
        (ROOT / "robe" / "cli.py").read_text()
    ]


def test_version_and_help_without_a_command(capsys, monkeypatch):
    assert run("--version", capsys=capsys) == (0, f"robe-dlrm {robe.__version__}\n", "")
    monkeypatch.setattr(sys, "argv", ["run.py"])
    command_line_help = run("--help", capsys=capsys)
    with pytest.raises(SystemExit) as exit:
        command_line.main()
    assert (exit.value.code or 0, capsys.readouterr().out) == command_line_help[:2]
    assert "doctor" in command_line_help[1]


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    command = f"'{sys.executable}' '{ROOT / 'run.py'}' plan | true"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""


def test_the_remedy_for_a_missing_folder_is_a_command_that_exists(folder, tmp_path, capsys):
    _, _, err = run("train", "--data", tmp_path / "new", capsys=capsys)
    remedy = re.search(r"`python run.py (.*)`", err)[1].replace("FILE", str(folder / "raw"))
    assert run(*remedy.split(), capsys=capsys)[0] == 0
    assert Manifest.load(tmp_path / "new").rows("test") == 1000


class TestBadInput:
    """One line that names the file and the remedy, exit code 2, and nothing half written."""

    @pytest.fixture
    def line(self, folder):
        return (folder / "raw" / "day_0").read_bytes().splitlines()[0].split(b"\t")

    @pytest.fixture
    def refused(self, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

        def check(*arguments, message):
            before = sorted(tmp_path.rglob("*"))
            code, _, err = run(*arguments, capsys=capsys)
            assert code == 2
            assert re.search(message, err), err
            assert len(err.strip().splitlines()) == 1
            assert err.startswith("error: ")
            assert sorted(tmp_path.rglob("*")) == before

        return check

    @pytest.mark.parametrize(
        ("column", "value", "message"),
        [
            (0, b"2", "label"),
            (0, b"", "label"),
            (3, b"1.5", "integer"),
            (20, b"xyz", "hex"),
            (20, b"123456789", "hex"),
            (39, b"1\t2", "41 columns"),
        ],
    )
    @pytest.mark.parametrize("packed", [False, True])
    def test_bad_lines(self, column, value, message, packed, line, refused, tmp_path):
        bad = list(line)
        bad[column] = value
        text = b"\n".join(map(b"\t".join, [line, line, bad, line])) + b"\n"
        raw = tmp_path / "raw"
        raw.write_bytes(gzip.compress(text) if packed else text)
        where = rf"{raw}, line 3: .*{message}.*--bad-rows skip"
        refused("prepare", raw, "--out", tmp_path / "out", message=where)

    def test_bad_lines_can_be_skipped(self, line, capsys, tmp_path):
        raw = tmp_path / "raw"
        raw.write_bytes(b"\n".join([b"\t".join(line)] * 30 + [b"rubbish"]) + b"\n")
        code, out, _ = run("prepare", raw, "--out", tmp_path / "out", "--bad-rows", "skip", capsys=capsys)
        assert code == 0
        assert "1 bad lines were left out" in out
        assert (
            tmp_path / "out" / "rejected.tsv"
        ).read_text() == f"{raw}\t31\t1 columns instead of 40\trubbish\n"

    def test_names_of_files_stay_in_their_line(self, line, refused, tmp_path, capsys):
        """Those with line ends, escapes for a terminal, marks of direction, and bytes that are not UTF-8."""
        name = b"a\n\x1b[31m\t\xe2\x80\xae\xff"
        raw, told = tmp_path / os.fsdecode(name), r"a\n\x1b[31m\t\u202e\udcff"
        refused("prepare", raw, "--out", tmp_path / "out", message=re.escape(f"{tmp_path}/{told}: "))
        raw.write_bytes(b"\n".join([b"\t".join(line)] * 30 + [b"rubbish"]) + b"\n")
        out = tmp_path / f"{raw.name}.out"
        code, printed, err = run("prepare", raw, "--out", out, "--bad-rows", "skip", capsys=capsys)
        assert (code, err) == (0, "")
        assert all(text.isprintable() for text in printed.splitlines())
        assert f"{tmp_path}/{told}.out: criteo data" in printed
        rejected = (out / "rejected.tsv").read_text()
        assert rejected == f"{tmp_path}/{told}\t31\t1 columns instead of 40\trubbish\n"
        for command in (["describe", out], ["prepare", "--verify", out]):
            code, printed, err = run(*command, capsys=capsys)
            assert (code, err) == (0, "")
            assert f"{told}.out" in printed
            assert all(text.isprintable() for text in printed.splitlines())

    def test_a_run_remembers_a_folder_whose_name_is_not_utf_8(self, tmp_path):
        settings = run_folder.Settings(resolve(TrainConfig()), Path(os.fsdecode(b"/d\xff")), False)
        settings.write(tmp_path)
        assert run_folder.read(tmp_path) == settings

    def test_another_dialect_is_not_what_was_learned(self, folder, trained, refused, tmp_path):
        """Ids modulo something feed full tables, and no model of other ids; nor do other dense values."""
        options = {"modulo": ["--ids", "modulo", "--max-ind-range", "50"], "none": ["--dense", "none"]}
        for name, dialect in options.items():
            command_line.main(["prepare", str(folder / "raw"), "--out", str(tmp_path / name), *dialect])
            for method in ("robe", "full"):
                evaluate = ["evaluate", trained / method, "--data", tmp_path / name]
                refused(*evaluate, message="do not mean what they meant in training")
        train = ["train", "--data", tmp_path / "modulo", "--out", tmp_path / "r", "--method", "full", *TABLES]
        command_line.main([str(argument) for argument in train])
        summary = json.loads((tmp_path / "r" / "summary.json").read_text())
        assert summary["embedding_parameters"] == 26 * 50 * 4

    def test_verify(self, folder, refused, tmp_path, capsys):
        shutil.copytree(folder / "hash", tmp_path / "data")
        code, out, _ = run("prepare", "--verify", tmp_path / "data", capsys=capsys)
        assert code == 0
        assert "all shards are as they were written" in out
        refused("prepare", "--verify", tmp_path / "data", "--out", tmp_path, message="give neither logs nor")
        refused("prepare", folder / "raw", message="--out: name the folder to write")
        shard = tmp_path / "data" / "day_1_dense.npy"
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
        refused("prepare", "--verify", tmp_path / "data", message=f"{shard}: its bytes are not those")

    def test_damaged_files(self, folder, refused, tmp_path):
        packed = gzip.compress((folder / "raw" / "day_0").read_bytes())
        files = {
            "empty": b"",
            "truncated": packed[:-100],
            "corrupt": packed[:1000] + b"\0" * 100 + packed[1100:],
        }
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        for name, message in (
            ("empty", "empty"),
            ("truncated", "gzip damaged after line"),
            ("corrupt", "gzip damaged after line"),
            ("missing", "No such file"),
        ):
            where = f"{tmp_path / name}.*{message}"
            refused(
                "prepare",
                tmp_path / name,
                "--out",
                tmp_path / "out",
                message=where,
            )

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
    def test_a_full_disk(self, folder, refused, tmp_path, monkeypatch):
        """Every write to /dev/full fails as on a full disk."""
        monkeypatch.setattr("data_pipeline.shard_files.partial_name", lambda path: Path("/dev/full"))
        message = "out: No space left on device; .*make room"
        refused("prepare", folder / "raw", "--out", tmp_path / "out", message=message)

    def test_an_existing_folder_is_not_overwritten(self, folder, refused, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("keep")
        for command in (["prepare", folder / "raw"], ["synth"]):
            refused(
                *command,
                "--out",
                tmp_path / "out",
                message="not an empty folder",
            )

    @pytest.mark.parametrize("kind", ["labels", "dense", "sparse"])
    def test_a_shard_that_does_not_match(self, kind, folder, trained, refused, tmp_path):
        data = tmp_path / "data"
        data.mkdir()
        for path in (folder / "hash").iterdir():
            (data / path.name).write_bytes(path.read_bytes())
        shard = data / f"day_2_{kind}.npy"
        content = shard.read_bytes()
        commands = (
            ["train", "--data", data, "--out", tmp_path / "r"],
            ["evaluate", trained / "robe", "--data", data],
        )
        for command in commands:
            shard.write_bytes(content[:-4])
            refused(*command, message=f"{shard}: damaged")
            np.save(shard, np.zeros((7, 1), np.int32))
            refused(
                *command,
                message=f"{shard}: holds int32.*manifest.json says",
            )
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        refused(
            "doctor",
            "--data",
            data,
            message=f"{shard}: its bytes are not those",
        )
        shard.unlink()
        refused(*commands[0], message=f"{shard}: missing")

    def test_a_run_does_not_go_on_with_other_rows(self, folder, trained, refused, tmp_path):
        """Neither with those of another folder, nor with others that came to stand in the same one."""
        raw = folder / "raw"
        for name, files in (("first", ("day_0", "day_1", "day_2")), ("other", ("day_1", "day_0", "day_2"))):
            made = "--out", str(tmp_path / name), "--input-order", "given"
            command_line.main(["prepare", *(str(raw / f) for f in files), *made])
        command_line.main(["train", "--data", str(tmp_path / "first"), "--out", str(tmp_path / "r"), *TINY])
        resume = ["train", "--resume", tmp_path / "r"]
        refused(*resume, "--data", tmp_path / "other", message="not the rows .*r was trained")
        (tmp_path / "first").rename(tmp_path / "moved")
        (tmp_path / "other").rename(tmp_path / "first")
        refused(*resume, message="not the rows")
        refused("evaluate", tmp_path / "r", message="no longer the rows of")
        command_line.main(["train", "--resume", str(tmp_path / "r"), "--data", str(tmp_path / "moved")])

    def test_a_run_in_use_is_refused(self, folder, trained, refused):
        from robe.files import alone

        # A lock belongs to the open file, so the same process is refused as another would be.
        with alone(trained / "robe"):
            refused("train", "--resume", trained / "robe", message="another process is training in it")

    def test_predictions_do_not_replace_what_they_should_not(self, folder, trained, refused, tmp_path):
        raw = tmp_path / "raw"
        raw.write_bytes((folder / "raw" / "day_0").read_bytes())
        os.mkfifo(tmp_path / "pipe")
        predict = ["predict", trained / "robe", raw, "--out"]
        refused(*predict, raw, message="is the input")
        refused(*predict, tmp_path / "pipe", message="not an ordinary file")
        refused(*predict, tmp_path, message="not an ordinary file")
        assert raw.read_bytes() == (folder / "raw" / "day_0").read_bytes()

    def test_where_nothing_can_be_written(self, folder, refused, tmp_path):
        (tmp_path / "file").write_text("")
        for command in (["train", "--data", folder / "hash"], ["prepare", folder / "raw"], ["synth"]):
            refused(*command, "--out", tmp_path / "file" / "out", message="Not a directory")

    def test_a_checkpoint_that_does_not_fit_on_the_disk(self, folder, tmp_path, capsys, monkeypatch):
        from robe import checkpoint

        def full(arrays, path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint, "save_file", full)
        code, _, err = run("train", "--data", folder / "hash", "--out", tmp_path / "r", *TINY, capsys=capsys)
        assert code == 2
        assert re.search(r"step_\d+: cannot be written .*No space left.*--resume", err)
        assert list((tmp_path / "r" / "checkpoints").iterdir()) == []
        monkeypatch.undo()
        assert run("train", "--resume", tmp_path / "r", capsys=capsys)[0] == 0

    def test_more_than_there_is_memory(self, folder, refused):
        train = ["train", "--data", folder / "hash"]
        refused(*train, "--weights", 10**14, message="not enough memory.*run.py plan")
        refused(*train, "--weights", 10**23, message="--weights must be from 1 to")
        refused(*train, "--seed", "-1", message="--seed must be from 0")
        refused("describe", folder / "hash", "--rows", 0, message="--rows must be at least 1, not 0")
        refused(*train, "--target-auc", "nan", message="--target-auc must be from 0 to 1")

    def test_folders_that_are_something_else(self, folder, trained, refused, tmp_path):
        (tmp_path / "manifest.json").write_text("{}")
        for arguments, message in (
            (
                ["train", "--data", tmp_path / "nowhere"],
                "nowhere/manifest.json: not found; make the folder with",
            ),
            (["train", "--data", tmp_path], "manifest.json: not a valid manifest"),
            (["train", "--resume", tmp_path], "config.json: not the settings of a run"),
            (["evaluate", tmp_path], "no checkpoint here"),
            (["predict", tmp_path, folder / "raw" / "day_0", "--out", tmp_path / "p"], "no checkpoint here"),
            (["predict", trained / "robe", tmp_path / "no", "--out", tmp_path / "p"], "no: not found"),
            (
                ["predict", trained / "robe", folder / "dictionary", "--out", tmp_path / "p"],
                "its columns or ids do not mean",
            ),
            (
                ["evaluate", trained / "robe", "--data", folder / "dictionary"],
                "its columns or ids do not mean",
            ),
            (["train", "--data", folder / "hash", "--method", "full"], "--ids dictionary"),
            (
                ["train", "--data", folder / "hash", "--out", trained / "robe"],
                "choose another --out, or go on with it",
            ),
            (["train", "--resume", trained / "robe", "--epochs", "3"], "give no others"),
            (["train", "--data", folder / "hash", "--lr", "-1"], "--lr must be positive"),
            (["train", "--data", folder / "hash", "--weights", "3"], "smaller than one block"),
        ):
            refused(*arguments, message=message)

    def test_a_bad_line_in_prediction_leaves_no_file(self, folder, trained, refused, tmp_path):
        lines = (folder / "raw" / "day_0").read_bytes().splitlines(keepends=True)
        (tmp_path / "raw").write_bytes(b"".join([*lines[:50], b"rubbish\n"]))
        arguments = ["predict", trained / "robe", tmp_path / "raw", "--out", tmp_path / "p"]
        refused(*arguments, message="raw, line 51: 1 columns")


class TestNothingIsLearnedInSilence:
    """What training, evaluation and prediction say of models that are of no use, and of spoilt shards."""

    @pytest.fixture
    def data(self, folder, tmp_path):
        shutil.copytree(folder / "hash", tmp_path / "data")
        return tmp_path / "data"

    def spoil(self, data, day, kind, rows, value):
        shard = np.load(data / f"day_{day}_{kind}.npy", mmap_mode="r+")
        shard[rows] = value
        shard.flush()
        return data / f"day_{day}_{kind}.npy"

    def train(self, data, out, *options, capsys):
        """(exit code, standard error, summary) of a training."""
        code, _, err = run("train", "--data", data, "--out", out, *TINY, *options, capsys=capsys)
        path = out / "summary.json"
        return code, err, json.loads(path.read_text()) if path.exists() else None

    def test_one_probability_for_all_rows(self, data, tmp_path, capsys):
        """Layers of one number, whose rectifiers are soon deaf."""
        options = ["--bottom", "2", "--top", "1", "1", "--lr", "1"]
        code, err, summary = self.train(data, tmp_path / "r", *options, capsys=capsys)
        assert code == 0
        assert err == f"warning: {summary['warnings'][0]}\n"
        assert "every row gets the probability" in err
        assert "nothing was learned: try another --lr (it was 1), wider layers" in err
        code, out, err = run("evaluate", tmp_path / "r", capsys=capsys)
        assert code == 0
        assert json.loads(out)["lowest_probability"] == json.loads(out)["highest_probability"]
        assert err.startswith("warning: test rows: every row gets the probability")
        code, _, err = run("predict", tmp_path / "r", data, "--out", tmp_path / "p", capsys=capsys)
        assert code == 0
        assert "warning: all 6,001 rows get the probability" in err
        assert len(set((tmp_path / "p").read_text().split())) == 1

    def test_a_training_that_diverged_ends_with_1(self, data, tmp_path, capsys):
        code, err, summary = self.train(
            data, tmp_path / "r", "--memory", "fp16", "--lr", "100", capsys=capsys
        )
        assert code == 1
        assert summary["diverged"]
        assert "the training diverged" in summary["warnings"][0]
        assert "with a lower --lr (it was 100)" in err
        assert err.endswith(f"error: {tmp_path / 'r'}: the training diverged, and its model is of no use\n")
        assert run("train", "--resume", tmp_path / "r", capsys=capsys)[0] == 1

    def test_a_loss_that_is_not_finite_is_in_the_summary_too(self, data, tmp_path, capsys):
        code, err, summary = self.train(data, tmp_path / "r", "--lr", "1e30", capsys=capsys)
        assert code == 1
        assert err == f"error: {command_line.as_started(summary['stopped'])}\n"
        assert summary["warnings"] == [summary["stopped"]]

    @pytest.mark.parametrize("label", [0, 1])
    def test_training_rows_of_one_class(self, label, data, tmp_path, capsys):
        for day in (0, 1):
            self.spoil(data, day, "labels", slice(None), label)
        code, err, summary = self.train(data, tmp_path / "r", capsys=capsys)
        assert code == 0
        line = f"train rows: every label of the 4,001 is {label}, so there is nothing to learn"
        assert summary["warnings"][0].startswith(line)
        assert err.startswith(f"warning: {line}")  # said before the training, and after it

    def test_test_rows_of_one_class(self, data, tmp_path, capsys):
        self.spoil(data, 2, "labels", slice(0, 1000), 0)
        code, err, summary = self.train(data, tmp_path / "r", capsys=capsys)
        assert code == 0
        assert "test rows: every label of the 1,000 is 0, so AUC is undefined" in err
        assert len(summary["warnings"]) == 1
        code, out, err = run("evaluate", tmp_path / "r", capsys=capsys)
        assert (code, json.loads(out)["auc"]) == (0, None)
        assert err.startswith("warning: test rows: every label of the 1,000 is 0, so AUC is undefined")

    @pytest.mark.parametrize(
        ("day", "kind", "row", "value"),
        [
            (2, "dense", 10, np.nan),
            (2, "dense", 1500, np.inf),
            (0, "labels", 0, 256),
            (1, "labels", 1999, -1),
            (2, "labels", 3, 2),
        ],
    )
    def test_values_that_cannot_be_are_found_before_training(
        self, day, kind, row, value, data, tmp_path, capsys
    ):
        shard = self.spoil(data, day, kind, (row, 0), value)
        code, err, _ = self.train(data, tmp_path / "r", capsys=capsys)
        assert code == 2
        assert err.startswith(f"error: {shard}, row {row} (from 0), column ")
        assert not (tmp_path / "r").exists()

    def test_a_number_of_a_training_row_is_found_when_it_shows(self, data, tmp_path, capsys):
        shard = self.spoil(data, 1, "dense", (77, 3), np.nan)
        code, err, _ = self.train(data, tmp_path / "r", capsys=capsys)
        assert code == 2
        assert err.startswith(f"error: {shard}, row 77 (from 0), column int_3: nan is not finite")

    def test_evaluation_and_prediction_find_them(self, data, trained, tmp_path, capsys):
        shard = self.spoil(data, 2, "dense", (10, 3), np.nan)
        evaluate = ["evaluate", trained / "robe", "--data", data]
        predict = ["predict", trained / "robe", data, "--out", tmp_path / "p"]
        for command in (evaluate, predict):
            code, out, err = run(*command, capsys=capsys)
            assert (code, out) == (2, "")
            assert err.startswith(f"error: {shard}, row 10 (from 0), column int_3: nan is not finite")
        assert not (tmp_path / "p").exists()
        assert run(*evaluate, "--split", "validation", capsys=capsys)[0] == 0  # other rows of that day

    def test_a_baseline_that_diverges_does_not_cost_the_scores(self, data, tmp_path, capsys, monkeypatch):
        fit = run_folder.fit

        def failing(model, config, *others):
            if config.embedding.method == "none":
                raise TrainingError("the loss became nan")
            return fit(model, config, *others)

        monkeypatch.setattr(run_folder, "fit", failing)
        code, err, summary = self.train(data, tmp_path / "r", "--baseline", capsys=capsys)
        assert code == 0
        assert summary["test"]["auc"] > 0.5
        assert "warning: the same model without categorical features: the loss became nan" in err


@pytest.mark.skipif(
    "ROBE_SAMPLE_DIR" not in os.environ, reason="ROBE_SAMPLE_DIR names no folder of real rows"
)
def test_real_kaggle_rows_from_raw_file_to_auc(tmp_path, capsys):
    sample = Path(os.environ["ROBE_SAMPLE_DIR"]) / "criteo_kaggle_10k.txt"
    assert run("prepare", sample, "--out", tmp_path / "kaggle", capsys=capsys)[0] == 0
    code, out, err = run("train", "--data", tmp_path / "kaggle", "--out", tmp_path / "run", capsys=capsys)
    assert code == 0, err
    assert out.startswith(f"data: {tmp_path / 'kaggle'}: criteo data")
    # 8,572 training rows are next to nothing, but some of what they say holds for the next 714.
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test"]["auc"] > 0.6
