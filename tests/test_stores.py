"""Logs in object stores, from a server of S3 on this machine to the shards, a training and predictions."""

import gzip
import io
import json
import subprocess
import sys
import urllib.request
from subprocess import PIPE

import numpy as np
import polars as pl
import pytest

from data_pipeline.input_files import input_files
from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.schema import DataError, load_schema
from data_pipeline.stores import Stored, located
from data_pipeline.synthetic import SyntheticConfig, write
from robe.cli import main

pytest.importorskip("moto", reason="of whose server of S3 nothing else here has need")

TOML = 'label = "click"\ndense = ["age"]\n[categorical]\nuser = "integer"\ncountry = "string"\n'
TINY = "--weights 200 --batch 64 --bottom 4 --width 4 --top 4 --block 4 --epochs 1".split()
KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
# A server of S3 that ends when its standard input does.
PROGRAM = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print("http://{}:{}".format(*server.get_host_and_port()), flush=True)
sys.stdin.read()
server.stop()
"""
ROWS = 120  # of each file


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of an empty server, which the variables of the environment name, with credentials."""
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=PIPE, stdout=PIPE, text=True) as process,
    ):
        address = process.stdout.readline().strip()
        for name, value in (KEYS | {"AWS_ENDPOINT_URL": address}).items():
            patch.setenv(name, value)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        put(address, "logs")
        yield address


def put(address, name, content=b""):
    """Make a bucket, or a file in one."""
    header = {"Content-Type": "binary/octet-stream"}
    request = urllib.request.Request(f"{address}/{name}", content, header, method="PUT")
    urllib.request.urlopen(request).close()


@pytest.fixture(scope="module")
def logs(server, tmp_path_factory):
    """A folder whose files lie in the bucket `logs` too."""
    folder, rng = tmp_path_factory.mktemp("logs"), np.random.default_rng(0)
    files = {}
    for date in (9, 10, 11):
        for country, part in (("A%20B", 2), ("A%20B", 10), ("__HIVE_DEFAULT_PARTITION__", 0)):
            user = rng.integers(20, size=ROWS)
            columns = {"click": (rng.random(ROWS) < user / 20) * 1, "age": rng.integers(80, size=ROWS)}
            frame = pl.DataFrame(columns | {"user": user if part else user * 1.0})
            frame.write_parquet(buffer := io.BytesIO())
            files[f"log/date=2024-01-{date}/country={country}/part-{part}.parquet"] = buffer.getvalue()
    text = frame.with_columns(pl.lit("DE").alias("country"))
    csv = text.write_csv().encode()
    files |= {"log/_SUCCESS": b"", "one.csv": csv.replace(b"\n", b"\r\n"), "one.csv.gz": gzip.compress(csv)}
    files |= {"one.jsonl": text.write_ndjson().encode(), "bad.csv": csv + b"1,\xff,2,DE\n"}
    write(SyntheticConfig(folder / "raw", rows=400, days=3))
    files |= {f"raw/{path.name}": path.read_bytes() for path in (folder / "raw").iterdir()}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        put(server, f"logs/{name.replace('%', '%25')}", content)
    (folder / "log.toml").write_text(TOML)
    return folder


@pytest.fixture(scope="module")
def data(logs):
    """The shards of the partitions in the store."""
    call(
        "prepare",
        "s3://logs/log",
        "--schema",
        logs / "log.toml",
        "--out",
        logs / "data",
        "--ids",
        "dictionary",
    )
    return logs / "data"


@pytest.fixture(scope="module")
def run(data):
    call("train", "--data", data, *TINY, "--out", data.parent / "run")
    return data.parent / "run"


def call(*words):
    main([str(word) for word in words])


def contents(folder, *places):
    """The bytes of all files; the `places` of a log have one name."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    for place in places:
        found["manifest.json"] = found["manifest.json"].replace(str(place).encode(), b"PLACE")
    return found


def test_partitions_become_the_bytes_that_those_on_a_disk_become(data, logs, tmp_path):
    options = {"schema": load_schema(logs / "log.toml"), "ids": "dictionary"}
    prepare(PrepareConfig((logs / "log",), tmp_path / "out", **options))
    manifest = json.loads((data / "manifest.json").read_text())
    assert [day["source"] for day in manifest["days"]] == [
        f"s3://logs/log/date=2024-01-{day}" for day in (9, 10, 11)
    ]
    assert [day["rows"] for day in manifest["days"]] == [3 * ROWS] * 3
    assert contents(data, "s3://logs") == contents(tmp_path / "out", logs)


def test_they_get_to_an_auc(run):
    found = json.loads((run / "summary.json").read_text())
    assert found["test"]["auc"] > 0.7  # the law has about 0.83; a model that learned nothing 0.5


@pytest.mark.parametrize("name", ["one.csv", "one.csv.gz", "one.jsonl", "log/**/part-2.parquet", "raw"])
def test_texts_and_patterns_become_the_same_bytes_too(name, logs, tmp_path):
    """Of the generator's logs it is known that they are synthetic."""
    schema = [] if name == "raw" else ["--schema", logs / "log.toml"]
    for place, out in ((logs, "disk"), ("s3://logs", "store")):
        call("prepare", f"{place}/{name}", *schema, "--out", tmp_path / out)
    mine, others = contents(tmp_path / "store", "s3://logs"), contents(tmp_path / "disk", logs)
    assert mine == others
    assert (b"bayes" in mine["manifest.json"]) == (name == "raw")


def test_a_text_is_the_same_however_it_is_cut(logs):
    with located("s3://logs/one.csv").open("rb") as file:
        pieces = [*iter(lambda: file.raw.read(1000), b"")]
        assert file.raw.tell() == sum(map(len, pieces))
    assert b"".join(pieces) == (logs / "one.csv").read_bytes().replace(b"\r\n", b"\n")
    assert len(pieces) > 1


@pytest.mark.parametrize("name", ["log", "one.csv", "one.jsonl"])
def test_schemas_are_proposed_alike(name, logs, capsys):
    texts = []
    for place in (logs, "s3://logs"):
        call("schema", f"{place}/{name}")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert 'country = "string"' in texts[0]


@pytest.mark.parametrize("name", ["one.csv.gz", "log/date=*/*/part-2.parquet"])
def test_predictions_are_the_same_bytes(name, logs, run, tmp_path):
    for place, out in ((logs, "disk"), ("s3://logs", "store")):
        call("predict", run, f"{place}/{name}", "--out", tmp_path / out)
    found = (tmp_path / "store").read_bytes()
    assert found == (tmp_path / "disk").read_bytes()
    assert found.count(b"\n") == (ROWS if "csv" in name else 3 * ROWS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("prepare s3://none/log", "s3://none/log: no such bucket ("),
        ("prepare s3://logs/log s3://logs/none", "s3://logs/none: not found; check the path"),
        ("prepare s3://logs/no*", "s3://logs/no*: no file matches; check the path"),
        ("prepare s3://logs/one.csv s3://logs/one.csv", "is the same file as s3://logs/one.csv"),
        (
            "prepare s3://logs/bad.csv",
            "s3://logs/bad.csv: no UTF-8 text, plain or packed with",
        ),
        ("prepare s3://logs/log --out s3://logs/out", "s3://logs/out: folders are written on a disk, not in"),
        ("schema s3://logs/none.parquet", "s3://logs/none.parquet: not found ("),
        ("schema s3://logs/none.csv", "s3://logs/none.csv: not found ("),
        ("predict RUN s3://logs/none.csv", "s3://logs/none.csv: not found ("),
        (
            "predict RUN s3://logs/one.csv --out s3://logs/p",
            "s3://logs/p: probabilities are written on",
        ),
        ("train --data s3://logs/log", "s3://logs/log: prepared folders are read on a disk, not in a store"),
        ("prepare gs://logs/log", "gs://logs/log: no credentials ("),
        (
            "prepare az://logs/log",
            "az://logs/log: no credentials (Generic MicrosoftAzure error: Account",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_line(words, expected, logs, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none"))
    command, *others = words.replace("RUN", str(run)).split()
    others += ["--schema", logs / "log.toml"] * (command == "prepare")
    others += ["--out", tmp_path / "out"] * ("--out" not in words and command != "schema")
    with pytest.raises(SystemExit) as ended:
        call(command, *others)
    (line,) = capsys.readouterr().err.splitlines()
    assert (ended.value.code, expected in line) == (2, True), line
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_does_not_answer_is_given_up_soon(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # where nothing listens
    with pytest.raises(DataError, match=r"s3://silent/log: the store does not answer \(.* after 3 retries"):
        input_files((located("s3://silent/log"),))


def test_what_is_added_between_two_attempts_is_noticed(server, logs, tmp_path):
    put(server, "grown")
    content = (logs / "log/date=2024-01-9/country=A%20B/part-2.parquet").read_bytes()
    for day in (0, 1):
        put(server, f"grown/date={day}/part-0.parquet", content)
    toml = tmp_path / "log.toml"
    toml.write_text(TOML.replace('country = "string"\n', ""))
    config = {"inputs": (located("s3://grown"),), "out": tmp_path / "out", "schema": load_schema(toml)}
    assert prepare(PrepareConfig(days="0", **config)) is None
    put(server, "grown/date=0/part-1.parquet", content)
    config["inputs"] = (located("s3://grown"),)
    with pytest.raises(DataError, match="s3://grown/date=0: has changed since day 0 was prepared from it"):
        prepare(PrepareConfig(**config))


def test_paths_in_stores_have_two_slashes():
    path = located("s3://logs/a//date=1/x.csv.gz")
    assert isinstance(path, Stored)
    assert [str(path), str(path.parent), str(path.parent / "y")] == [
        f"s3://logs/a/date=1{end}" for end in ("/x.csv.gz", "", "/y")
    ]
    assert located(path) is path
    assert located(path.relative_to("s3://logs")) == path.relative_to("s3://logs")
    assert not isinstance(located("s3/x"), Stored)
