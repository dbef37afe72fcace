"""Whatever a table holds, `prepare` takes the schema that is proposed for it."""

import re
from datetime import date

import numpy as np
import polars as pl
import pytest

from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.proposal import propose, unfilled
from data_pipeline.schema import load_schema

ROWS = 60
NAMES = [
    "user_id",
    "age",
    "x",
    "a b",
    'qu"ote',
    "é",
    "a.b",
    "n#1",
    "$",
    "ad",
    "price",
    "^odd$",
    "*",
    "label_2",
]


def cells(rng, *values):
    return [values[i] for i in rng.integers(len(values), size=ROWS)]


def ids(rng):
    return [f"i{i}" for i in rng.integers(9, size=ROWS)]


# What a column may hold, by name.
COLUMNS = {
    "codes": lambda rng: rng.integers(5, size=ROWS).tolist(),
    "large": lambda rng: rng.integers(-(2**62), 2**62, size=ROWS).tolist(),
    "unsigned": lambda rng: pl.Series(rng.integers(2**63, size=ROWS), dtype=pl.UInt64) * 2,
    "floats": lambda rng: rng.normal(0, 50, ROWS).tolist(),
    "float codes": lambda rng: cells(rng, 17.0, 3.0, None, 5.0),
    "float32 codes": lambda rng: pl.Series(cells(rng, 17.0, 3.0, None), dtype=pl.Float32),
    "huge floats": lambda rng: cells(rng, 1e300, 2.0**60, 3.0),
    "infinite": lambda rng: cells(rng, float("inf"), 3.5, float("nan")),
    "truths": lambda rng: cells(rng, True, False, None),
    "flags": lambda rng: cells(rng, "True", "False"),
    "decimals": lambda rng: pl.Series(cells(rng, "1.50", "2.25", "3.00")).cast(pl.Decimal(10, 2)),
    "whole decimals": lambda rng: pl.Series(cells(rng, "1", "2", "3")).cast(pl.Decimal(10, 0)),
    "texts": lambda rng: cells(rng, "a", "b c", "", None, "é", "NA"),
    "numbers as texts": lambda rng: cells(rng, "1", "2.5", "NA", "", "-3e2"),
    "codes as texts": lambda rng: cells(rng, "1", "2.0", "?", "007"),
    "with zeros": lambda rng: cells(rng, "001", "02", "3"),
    "beyond": lambda rng: cells(rng, "9" * 30, "9" * 45, "1e300"),
    "hexes": lambda rng: cells(rng, "00ff00aa", "12345678", "deadbeef"),
    "units": lambda rng: cells(rng, "5 km", "7km", "1,5"),
    "dates": lambda rng: cells(rng, "2024-01-01", "2024-02-03"),
    "typed dates": lambda rng: cells(rng, date(2024, 1, 1), date(2024, 1, 2)),
    "lists in texts": lambda rng: [f"{a}|{b}" for a, b in zip(ids(rng), ids(rng), strict=True)],
    "lists": lambda rng: [[a, b][: len(a + b) % 3] for a, b in zip(ids(rng), ids(rng), strict=True)],
    "number lists": lambda rng: cells(rng, [1, 2], [], None, [3]),
    "float lists": lambda rng: cells(rng, [1.0, 2.5], [3.0]),
    "weighted": lambda rng: cells(rng, [{"id": 1, "w": 0.5}], [{"id": 2, "w": 1.0}, {"id": 1, "w": 2.0}]),
    "nested": lambda rng: cells(rng, [[1]], [[2, 3]]),
    "objects": lambda rng: cells(rng, {"a": 1}, {"a": 2}),
    "bytes": lambda rng: cells(rng, b"a", b"\xff"),
    "enumerated": lambda rng: pl.Series(cells(rng, "x", "y", None), dtype=pl.Enum(["x", "y"])),
    "nothing": lambda rng: [None] * ROWS,
    "one": lambda rng: [1] * ROWS,
    "counting": lambda rng: list(range(ROWS)),
}

LABELS = [(0, 1), (1, 2, 3, 4, 5), ("yes", "no"), (False, True), (0.1, 0.5, 0.9), (1.0, 0.0)]


def table(rng):
    """A label, something to embed, and some columns of any kind under any names."""
    kinds = rng.choice(list(COLUMNS), size=5, replace=False).tolist()
    names = rng.choice(NAMES, size=5, replace=False).tolist()
    series = [pl.Series(name, COLUMNS[kind](rng)) for name, kind in zip(names, kinds, strict=True)]
    label = LABELS[rng.integers(len(LABELS))]
    outcome = pl.Series(rng.choice(["click", "rating", "z"]), cells(rng, *label))
    return [*kinds, label], pl.DataFrame([outcome, *series, pl.Series("city", ids(rng))])


def written(frame, path):
    """The columns that the format can hold, in a file."""
    if path.suffix == ".parquet":
        frame.write_parquet(path)
        return
    kept = [c for c in frame if c.dtype != pl.Binary and (path.suffix == ".jsonl" or not c.dtype.is_nested())]
    frame = pl.DataFrame(kept)
    frame.write_ndjson(path) if path.suffix == ".jsonl" else frame.write_csv(path)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_a_proposed_schema_is_one_that_prepare_takes(tmp_path, suffix):
    for seed in range(30):
        kinds, frame = table(np.random.default_rng(seed))
        path = tmp_path / f"{seed}{suffix}"
        written(frame, path)
        text = propose(path, ROWS)
        if unfilled(text):  # as its reader is asked to
            text = re.sub(r"# (label = .*\n)(?:# (threshold = .*\n))?", r"\1\2", text, count=1)
        (tmp_path / "own.toml").write_text(text)
        try:
            schema = load_schema(tmp_path / "own.toml")
            out = tmp_path / f"{path.name}.data"
            manifest = prepare(PrepareConfig((path,), out, schema=schema, blocks=2))
        except Exception as error:
            raise AssertionError(f"seed {seed}, {kinds}: {text}") from error
        assert [day.rows for day in manifest.days] == [ROWS // 2, ROWS // 2]
