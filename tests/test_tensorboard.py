"""What `train --tensorboard` writes, read back as TensorBoard reads it, also after a resume."""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from tensorboardX.proto.event_pb2 import Event

from robe import cli
from robe.config import ConfigError
from robe.tensorboard import scalars

TINY = "--bottom 8 --width 4 --top 8 --block 4 --weights 16 --backend reference".split()


def events(folder: Path) -> list:
    """The events of a folder's files, in the order in which they were written."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def shown(folder: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard shows of a folder: (tag, step) -> value."""
    values = {}
    for event in events(folder):
        if event.session_log.status == event.session_log.START:
            values = {key: value for key, value in values.items() if key[1] < event.step}
        for value in event.summary.value:
            values[value.tag, event.step] = value.simple_value
    return values


def logged(run: Path) -> dict[tuple[str, int], float]:
    """The numbers of metrics.jsonl, likewise."""
    entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {
        (f"{entry['kind']}/{name}", entry["step"]): value
        for entry in entries
        for name, value in entry.items()
        if name not in ("kind", "step") and value is not None
    }


def test_a_training_writes_what_its_log_holds(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "own.toml").write_text('label = "click"\n[categorical]\nuser = "integer"\n')
    rows = pl.DataFrame({"click": rng.integers(2, size=300), "user": rng.integers(4, size=300)})
    rows.write_ndjson(tmp_path / "own.jsonl")
    data, run, beside = tmp_path / "data", tmp_path / "mine", ["--tensorboard", tmp_path / "logs"]
    table = [tmp_path / "own.jsonl", "--schema", tmp_path / "own.toml", "--split", "0.8,0.1,0.1"]
    train = ["--data", data, *TINY, "--batch", 24, "--eval-every", 3, "--out", run, "--max-steps", 5]
    for words in (
        ["prepare", *table, "--out", data],
        ["train", *train, *beside],
        ["train", "--resume", run, *beside],
    ):
        cli.main([str(word) for word in words])
    expected = logged(run)
    assert {tag for tag, _ in expected} > {"train/loss", "train/lr", "validation/auc", "validation/log_loss"}
    assert {step for _, step in expected} > {3, 5, 10}
    # TensorBoard's numbers are float32.
    assert shown(tmp_path / "logs" / "mine") == {
        key: pytest.approx(value, rel=1e-6) for key, value in expected.items()
    }
    table[-1], others = "0.6,0.2,0.2", tmp_path / "others"
    cli.main([str(word) for word in ["prepare", *table, "--out", others]])
    refused = ["train", "--resume", run, "--data", others, "--tensorboard", tmp_path / "no"]
    with pytest.raises(SystemExit):
        cli.main([str(word) for word in refused])
    assert not (tmp_path / "no").exists()


def test_of_steps_that_were_repeated_the_last_numbers_are_shown(tmp_path):
    for losses in ({2: 0.9, 4: 0.8, 6: 0.7}, {4: 0.5, 8: 0.25}):
        with scalars(tmp_path) as told:
            for step, loss in losses.items():
                told({"kind": "train", "step": step, "loss": loss, "auc": None})
    assert shown(tmp_path) == {
        ("train/loss", step): pytest.approx(loss) for step, loss in ((2, 0.9), (4, 0.5), (8, 0.25))
    }


def test_what_cannot_be_written_is_refused_first(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--tensorboard: .*/logs: Not a directory; name another folder"):
        scalars(tmp_path / "file" / "logs")
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"--tensorboard needs tensorboardX: pip install .*tensorboard\]"):
        scalars(tmp_path)
