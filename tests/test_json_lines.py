"""Lines of JSON, from the file to shards; what is no row is told by its line."""

import json

import numpy as np
import polars as pl
import pytest

from data_pipeline.bags import Bags
from data_pipeline.batches import Rows
from data_pipeline.columns import hash_texts
from data_pipeline.logs import count_rows, has_rows, read_log
from data_pipeline.prepare import PrepareConfig, prepare
from data_pipeline.proposal import propose
from data_pipeline.schema import Bag, DataError, Schema, load_schema

SCHEMA = Schema(
    *("own", "click", ("age",), ("user", "ad"), ("string", "integer")), transforms={"age": "none"}
)


def hashed(*texts):
    return hash_texts(pl.Series(texts)).to_list()


def written(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 20])
def test_values_are_those_of_their_texts(tmp_path, block_bytes):
    """Keys in any order, some not there; numbers, texts and truths; and the parts of a file."""
    path = written(
        tmp_path / "a.jsonl",
        {"click": 1, "age": 2.5, "user": "ann", "ad": 7, "more": {"x": [1]}},
        {"ad": "7", "user": "ann", "click": False},
        {"click": "0", "age": None, "user": 3, "ad": 2**32, "more": 5},
        '{"click": true, "age": 1e3, "user": "[3]", "ad": 7.0}',
    )
    chunks = list(read_log(path, SCHEMA, block_bytes=block_bytes))
    assert np.concatenate([chunk.line for chunk in chunks]).tolist() == [1, 2, 3, 4]
    assert np.concatenate([chunk.label for chunk in chunks]).tolist() == [1, 0, 0, 1]
    assert np.concatenate([chunk.dense for chunk in chunks]).tolist() == [[2.5], [0], [0], [1000]]
    ann, three, listed, large = hashed("ann", "3", "[3]", str(2**32))
    expected = [[ann, 7], [ann, 7], [three, large], [listed, 7]]
    assert np.concatenate([chunk.ids for chunk in chunks]).tolist() == expected
    assert count_rows(path, SCHEMA) == 4
    assert has_rows(path, SCHEMA)


BAD = {
    "not json": r"not a JSON object \(JSON is malformed",
    '{"click": 1, "user": "a"': r"not a JSON object \(Input data was truncated\)",
    "": "blank line",
    "[1]": "JSON, but not an object",
    '{"click": 1, "user": ["a"], "ad": 2}': "a list where others have a text",
    '{"click": 1, "user": "a", "ad": 2.5}': "ad is '2.5', not an integer of up to 38 digits",
    '{"user": "a", "ad": 2}': "click is 'None', not 0 or 1",
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_is_told_and_can_be_skipped(tmp_path, bad):
    good = {"click": 1, "age": 1, "user": "ann", "ad": 7}
    path = written(tmp_path / "a.jsonl", good, good, bad, good)
    remedy = "correct it or the schema, or leave such rows out with --bad-rows skip"
    with pytest.raises(DataError, match=f"^{path}, line 3: {BAD[bad]}.*; {remedy}$"):
        list(read_log(path, SCHEMA))
    rejected = []
    chunks = list(read_log(path, SCHEMA, bad_rows="skip", on_reject=lambda *line: rejected.append(line)))
    assert np.concatenate([chunk.line for chunk in chunks]).tolist() == [1, 2, 4]
    assert [line for line, *_ in rejected] == [3]


def test_a_column_that_no_line_has_is_named(tmp_path):
    path = written(tmp_path / "a.jsonl", {"click": 1, "user": "ann"})
    with pytest.raises(DataError, match=r"a.jsonl: has no column 'age', but 'click, user'; give its columns"):
        list(read_log(path, SCHEMA))


def test_lists_are_bags(tmp_path):
    """With weights, lists of an id and its weight; the schema that is proposed reads them."""
    lines = [
        {
            "click": i % 2,
            "user": f"u{i % 3}",
            "tags": [],
            "seen": [{"id": i % 4, "w": 0.5}, {"id": 9, "w": 2}],
        }
        for i in range(40)
    ]
    lines[1]["tags"], lines[2]["tags"], lines[3]["tags"] = ["x", "y"], None, ["y"]
    path = written(tmp_path / "a.jsonl", *lines)
    (tmp_path / "own.toml").write_text(propose(path, 100))
    schema = load_schema(tmp_path / "own.toml")
    assert schema.bags == {"tags": Bag(), "seen": Bag(weights=True)}
    manifest = prepare(PrepareConfig((path,), tmp_path / "out", schema=schema, blocks=2))
    assert [day.rows for day in manifest.days] == [20, 20]
    ids = next(Rows(manifest, None).batches(4)).ids
    assert isinstance(ids, Bags)
    x, y, u0, u1, u2 = hashed("x", "y", "u0", "u1", "u2")
    expected = [[u0], [], [0, 9], [u1], [x, y], [1, 9], [u2], [], [2, 9], [u0], [y], [3, 9]]
    assert [part.tolist() for part in np.split(ids.values, ids.offsets[1:-1])] == expected
    assert ids.weights.tolist() == [1, 0.5, 2, 1, 1, 1, 0.5, 2, 1, 0.5, 2, 1, 1, 0.5, 2]
