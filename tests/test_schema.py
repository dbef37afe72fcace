import dataclasses
import json

import polars as pl
import pytest

from data_pipeline.proposal import propose
from data_pipeline.schema import CRITEO, DataError, Schema, load_schema

TEXT = """
label = "stars"
threshold = 4
dense = ["age"]
dense_missing = 30
missing = ["", "NA"]
[categorical]
user = "integer"
"a b" = "string"
code = "hex"
"""
OWN = Schema(
    "own", "stars", ("age",), ("user", "a b", "code"), ("integer", "string", "hex"), ("", "NA"), 30.0, 4.0
)


def load(tmp_path, text):
    (tmp_path / "own.toml").write_text(text)
    return load_schema(tmp_path / "own.toml")


def test_a_schema_is_read_from_toml(tmp_path):
    assert load(tmp_path, TEXT) == OWN
    assert load(tmp_path, 'name = "x"\n' + TEXT).name == "x"
    least = load(tmp_path, 'label = "y"\ncategorical.user = "string"')
    assert least == Schema("own", "y", (), ("user",), ("string",))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("threshold = 4", "threshold =", r"not a TOML file \(Invalid value \(at line 3"),
        (
            "dense_missing",
            "dense_mising",
            "dense_mising is no key of a schema; there are categorical, ",
        ),
        ('label = "stars"', "", 'no label; write `label = "COLUMN"` above the first table, with the column'),
        ('"stars"', "3", "label must be a text"),
        ("threshold = 4", 'threshold = "4"', "threshold must be a number"),
        ("threshold = 4", "threshold = true", "threshold must be a number"),
        ("= 30", "= inf", "dense_missing must be a number"),
        ('["age"]', '"age"', "dense must be a list of texts"),
        ('"NA"]', "1]", "missing must be a list of texts"),
        ('"string"', '"text"', "categorical.a b must be one of hex, integer, string"),
        ('"string"', "['hex']", "categorical.a b must be one of hex, integer, string"),
        ("[categorical]", "[other]", "other is no key of a schema"),
        ('code = "hex"', 'age = "hex"', "column age must be named once, as label, dense or categorical"),
        ("[categorical]", "missing_in = 3\n[categorical]", "missing_in must be a table of COLUMN = "),
        ("[categorical]", "missing_in.age = '-'\n[categorical]", "missing_in.age must be a list of texts"),
        ("[categorical]", "missing_in.ag = []\n[categorical]", "missing_in.ag must be of a dense or categ"),
        ("[categorical]", "missing_in.stars = []\n[categorical]", "missing_in.stars must be of a dense or"),
        ("[categorical]", "transform = 'none'\n[categorical]", "transform must be a table of COLUMN = "),
        ("[categorical]", "transform.age = 'log'\n[categorical]", "transform.age must be one of log1p, none"),
        ("[categorical]", "transform.user = 'none'\n[categorical]", "transform.user must be of a column in"),
        ('["age"]', '["age", "*"]', r"column \* must be the name of one column"),
        ('["age"]', '["age", "^a.*$"]', r"column \^a\.\*\$ must be the name of one column"),
    ],
)
def test_a_bad_schema_is_refused(tmp_path, old, new, message):
    assert old in TEXT
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path, TEXT.replace(old, new))
    assert str(error.value).startswith(f"{tmp_path}/own.toml: ")
    assert len(str(error.value).splitlines()) == 1


def test_rules_of_single_columns(tmp_path):
    rules = "\n[missing_in]\ncode = []\nage = ['-']\n[transform]\nage = 'none'\n"
    found = load(tmp_path, TEXT + rules)
    assert (found.missing, found.missing_in, found.transforms) == (
        ("", "NA"),
        {"age": ("-",), "code": ()},
        {"age": "none"},
    )
    assert Schema.from_json(json.loads(json.dumps(found.to_json()))) == found
    # Neither the order in the file nor rules that there are not matter to the fingerprint, others do.
    turned = load(tmp_path, TEXT + rules.replace("code = []\nage = ['-']", "age = ['-']\ncode = []"))
    assert turned.fingerprint() == found.fingerprint() != OWN.fingerprint()
    assert load(tmp_path, TEXT + "\n[missing_in]\n[transform]\n").fingerprint() == OWN.fingerprint()
    with pytest.raises(ValueError, match="transform log2"):
        Schema.from_json(found.to_json() | {"transforms": {"age": "log2"}})


def test_a_schema_embeds_something(tmp_path):
    for text in ('label = "y"', 'label = "y"\ncategorical = {}', 'label = "y"\ncategorical = 1'):
        with pytest.raises(DataError, match="categorical must be a table of at least one COLUMN = KIND"):
            load(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"no.toml: No such file or directory; check the path"):
        load_schema(tmp_path / "no.toml")
    (tmp_path / "own.toml").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"own.toml: not a TOML file"):
        load_schema(tmp_path / "own.toml")


def test_a_schema_survives_json():
    for schema in (CRITEO, OWN):
        assert Schema.from_json(json.loads(json.dumps(schema.to_json()))) == schema
    # As written before there were rules.
    old = {key: CRITEO.to_json()[key] for key in ("name", "label", "dense", "categorical")}
    assert Schema.from_json(old) == CRITEO


def test_the_fingerprint_is_of_columns_and_rules():
    # Those of models trained before there were rules, and before there were rules of single columns.
    assert CRITEO.fingerprint() == "ba156a82786cc829"
    assert OWN.fingerprint() == "5f5147513cfde179"
    assert dataclasses.replace(CRITEO, name="other").fingerprint() == CRITEO.fingerprint()
    others = [
        {"label": "l"}, {"dense": ()}, {"categorical": ("user", "code", "a b")}, {"kinds": ("hex",) * 3},
        {"missing": ("",)}, {"dense_missing": 0.0}, {"threshold": None}, {"threshold": 5.0},
        {"missing_in": {"age": ()}}, {"missing_in": {"code": ()}}, {"transforms": {"age": "log1p"}},
    ]  # fmt: skip
    found = {OWN.fingerprint(), *(dataclasses.replace(OWN, **other).fingerprint() for other in others)}
    assert len(found) == 1 + len(others)


FRAME = pl.DataFrame(
    {
        "stars": [5, 3, 4, 1],
        "userId": [70, 80, 90, 70],
        "age": ["33", "NA", "20.5", ""],
        "visits": [100, 200, 300, 400] ,
        "kind": [1, 2, 1, 1],
        "land": ["NA", "DE", "", "NA"],
        "hash": ["00000001", "ffffffff", "", "0badcafe"],
        'a "b"': ["x", "y", "x", "y"],
        "nothing": ["", "", "", ""],
    }
)  # fmt: skip


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_schema_is_proposed_from_a_sample(tmp_path, suffix):
    """Numbers with many values are dense, with few or called id categorical; the missing texts are found."""
    many = pl.concat([FRAME.with_columns(visits=pl.col("visits") + i) for i in range(20)])
    path = tmp_path / f"own{suffix}"
    many.write_csv(path) if suffix == ".csv" else many.write_parquet(path)
    text = propose(path, 1000)
    assert load(tmp_path, text) == Schema(
        "own",
        "stars",
        ("age", "visits"),
        ("userId", "kind", "land", "hash", 'a "b"'),
        ("integer", "integer", "string", "hex", "string"),
        ("", "NA"),
        0.0,
        4.0,
    )
    assert "# Guessed from the first 80 rows of own" in text
    assert '# left out: "nothing", no value' in text
    assert '"age",  # 20.5 to 33, 2 distinct, 50.0% missing' in text
    assert "first 5 rows" in propose(path, 5)


def test_the_label_is_guessed_by_name_then_by_values(tmp_path):
    path = tmp_path / "own.csv"
    zeros, ones = [0, 1, 1], [1, 0, 0]
    for columns, label in (
        ({"b": zeros, "Clicked": ones, "x": [3, 4, 5]}, "Clicked"),
        ({"x": [3, 4, 5], "b": zeros, "c": ones}, "b"),
        ({"b": zeros, "rating": [3.5, 4, 5]}, "rating"),
        ({"y": [3, 4, 5], "b": zeros}, "b"),
    ):
        pl.DataFrame(columns).write_csv(path)
        assert f'\nlabel = "{label}"' in propose(path, 10)
    pl.DataFrame({"b": [1, 1, 1], "y": [0, 1, None]}).write_csv(path)
    with pytest.raises(DataError, match=r"own.csv: no column is just 0 and 1, or called rating"):
        propose(path, 10)


def test_files_of_which_no_schema_is_proposed(tmp_path):
    for name, data, message in (
        ("raw", b"1\t2\n", "raw: not called .parquet, .arrow, .ipc"),
        ("no.csv", None, "no.csv: not found"),
        ("own.csv", b"a,a\n1,2\n", "own.csv: has two columns of one name; rename one"),
        ("own.csv", b"a,b\n1,2\n1\n", r"own.csv, row 2 \(line 3\): 1 fields instead of 2; correct it"),
        ("own.csv", b"a,b\n", "own.csv: empty"),
        ("own.parquet", b"PAR1", "own.parquet: not a whole parquet file"),
    ):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=message) as error:
            propose(tmp_path / name, 10)
        assert len(str(error.value).splitlines()) == 1
