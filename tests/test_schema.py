import dataclasses
import json
import re
import tomllib
from datetime import date

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.logs import read_log
from data_pipeline.proposal import propose, unfilled
from data_pipeline.schema import CRITEO, Bag, DataError, Schema, load_schema
from robe import cli as command_line

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
            "dense_mising is no key of a schema; there are bags, categorical, ",
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
        (
            'code = "hex"',
            'age = "hex"',
            "column age must be named once, as label, weight, split, dense or categorical",
        ),
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
    assert msgspec.convert(json.loads(json.dumps(dataclasses.asdict(found))), Schema) == found
    # Neither the order in the file nor rules that there are not matter to the fingerprint, others do.
    turned = load(tmp_path, TEXT + rules.replace("code = []\nage = ['-']", "age = ['-']\ncode = []"))
    assert turned.fingerprint() == found.fingerprint() != OWN.fingerprint()
    assert load(tmp_path, TEXT + "\n[missing_in]\n[transform]\n").fingerprint() == OWN.fingerprint()
    with pytest.raises(ValueError, match="transform log2"):
        dataclasses.replace(found, transforms={"age": "log2"})


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
        assert msgspec.convert(json.loads(json.dumps(dataclasses.asdict(schema))), Schema) == schema
    # As written before there were rules.
    old = {key: dataclasses.asdict(CRITEO)[key] for key in ("name", "label", "dense", "categorical")}
    assert msgspec.convert(old, Schema) == CRITEO


def test_the_fingerprint_is_of_columns_and_rules():
    # Those of models trained before there were rules, and before there were rules of single columns.
    assert CRITEO.fingerprint() == "ba156a82786cc829"
    assert OWN.fingerprint() == "5f5147513cfde179"
    assert dataclasses.replace(CRITEO, name="other").fingerprint() == CRITEO.fingerprint()
    others: list[dict] = [
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
        missing_in={"age": ("", "NA")},
        threshold=4.0,
    )
    assert "# Guessed from the first 80 rows of own" in text
    assert '# left out: "nothing", no value' in text
    assert '"age",  # 20.5 to 33, 2 distinct, 50.0% missing' in text
    assert "first 5 rows" in propose(path, 5)


def propose_for(tmp_path, columns, name="own.csv"):
    """The proposal for a table, and what of it is read; None for the latter where the label is left open."""
    frame, path = pl.DataFrame(columns), tmp_path / name
    path.write_text(frame.write_csv()) if name.endswith(".csv") else frame.write_parquet(path)
    text = propose(path, 10_000)
    tomllib.loads(text)
    assert unfilled(text) == ("label" not in tomllib.loads(text))
    if unfilled(text):
        with pytest.raises(DataError, match=r'no label; write `label = "COLUMN"` above the first table'):
            load(tmp_path, text)
        return text, None
    found = load(tmp_path, text)
    assert sum(len(chunk.line) for chunk in read_log(path, found)) == frame.height
    return text, found


N = 120
TURN = np.arange(N)
RNG = np.random.default_rng(0)
CLICK = (TURN % 7 == 3) * 1
USER = TURN * 17 % 23
WORDS = np.array(["ab", "cd", "ef"])[TURN % 3]


@pytest.mark.parametrize(
    ("columns", "label"),
    [
        ({"gender": TURN % 2, "clk": CLICK}, "clk"),
        ({"device": TURN % 2, "Clicked": CLICK}, "Clicked"),
        ({"is_like": TURN % 2, "is_click": CLICK}, "is_click"),
        ({"click": TURN % 2, "target": CLICK}, "target"),
        ({"b": TURN % 2, "rating": TURN % 5}, "rating"),
        ({"b": TURN % 2, "Book-Rating": TURN % 11}, "Book-Rating"),
        ({"purchased": CLICK, "rating": TURN % 5}, "purchased"),
        ({"is_attributed": CLICK, "x": TURN % 2 / 2}, "is_attributed"),
        ({"x": TURN % 3, "b": CLICK}, "b"),
        ({"label": CLICK * 0, "is_mobile": TURN % 2}, "label"),
        ({"Click": np.where(CLICK, "True", "False"), "premium": np.where(TURN % 2, "yes", "no")}, "Click"),
        ({"click": pl.Series(CLICK == 1), "gender": TURN % 2}, "click"),
        ({"click": CLICK * 1.0, "gender": TURN % 2}, "click"),
    ],
)
@pytest.mark.parametrize("name", ["own.csv", "own.parquet"])
def test_a_name_decides_on_the_label(tmp_path, columns, label, name):
    text, found = propose_for(tmp_path, {"user": USER, **columns}, name)
    assert found.label == label
    assert label not in (*found.dense, *found.categorical)
    # The others of 0 and 1 are named beside it.
    (line,) = (line for line in text.splitlines() if line.startswith("label = "))
    values = {key: {str(value) for value in column} for key, column in columns.items() if key != label}
    twins = [key for key, found in values.items() if found in ({"0", "1"}, {"yes", "no"})]
    assert all(f'"{twin}"' in line for twin in twins)


@pytest.mark.parametrize(
    ("columns", "candidates"),
    [
        ({"b": TURN % 2, "c": CLICK}, ["b", "c"]),
        ({"gender": TURN % 2}, ["gender"]),  # the only one, but called like a code
        ({"bought": TURN % 2, "liked": CLICK}, ["bought", "liked"]),
        ({"rating": TURN % 5, "stars": TURN % 3}, ["rating", "stars"]),
        ({"click": pl.Series(CLICK).set(pl.Series(TURN == 5), None), "b": TURN % 2}, ["click", "b"]),
        ({"label": RNG.random(N), "gender": TURN % 2}, ["label", "gender"]),
        ({"click": TURN % 4, "gender": TURN % 2}, ["click", "gender"]),
        ({"ctr": RNG.random(N)}, ["ctr"]),
    ],
)
def test_a_label_that_no_name_decides_on_is_left_to_the_user(tmp_path, columns, candidates):
    text, _ = propose_for(tmp_path, {"user": USER, **columns})
    assert [line.split('"')[1] for line in text.splitlines() if line.startswith("# label = ")] == candidates
    # With the # taken from one of them it is a schema of the others, and prepare takes it.
    one = f'# label = "{candidates[-1]}"'
    lines = text.replace(one, one[2:]).splitlines()
    at = lines.index(next(line for line in lines if line.startswith(one[2:])))
    if lines[at + 1].startswith("# threshold"):
        lines[at + 1] = lines[at + 1][2:]
    found = load(tmp_path, "\n".join(lines))
    assert found.label == candidates[-1]
    assert not {*found.dense, *found.categorical} & set(candidates)
    assert sum(len(chunk.line) for chunk in read_log(tmp_path / "own.csv", found)) == N


def test_the_command_says_that_the_label_is_left_to_the_user(tmp_path, capsys):
    for columns, words in (({"b": TURN % 2, "c": CLICK}, ["b", "c"]), ({"click": CLICK}, None)):
        pl.DataFrame({"user": USER, **columns}).write_csv(tmp_path / "own.csv")
        command_line.main(["schema", str(tmp_path / "own.csv")])
        out, error = capsys.readouterr()
        assert out == propose(tmp_path / "own.csv", 10_000)
        assert error.startswith("the label is left to you") == (words is not None)
        assert len(error.splitlines()) == (words is not None)


@pytest.mark.parametrize(
    ("votes", "threshold"),
    [([-1, 0, 1], 0.0), ([0, 5], 5.0), ([-1, 1], 1.0), ([1, 2], 2.0), ([1, 2, 3, 4, 5], 3.0), ([0, 1], None)],
)
def test_a_threshold_is_written_whatever_it_is(tmp_path, votes, threshold):
    text, found = propose_for(tmp_path, {"user": WORDS, "rating": (votes * N)[:N]})
    assert found.threshold == threshold
    assert ("threshold" in text) == (threshold is not None)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("click_time", np.where(TURN % 2, "2017-11-07 10:00:00", "2017-11-08 11:00:00")),
        ("clickTime", RNG.random(N)),
        ("dwell_time", RNG.random(N)),
        ("dwell", TURN % 50),
        ("conversion", TURN % 2),
        ("is_converted", TURN % 2),
        ("Purchase", TURN % 2),
        ("purchase_amount", RNG.random(N)),
        ("is_attributed", TURN % 2),
        ("attributed_time", np.where(CLICK, "2017-11-07 10:00:00", "")),
        ("play_time_ms", TURN % 60),
        ("time_on_page", TURN % 60),
        ("is_like", TURN % 2),
        ("follow", TURN % 2),
        ("rating", TURN % 5),
        ("copy", CLICK),
        ("turned", 1 - CLICK),
        ("extra", np.where(CLICK, "5.5", "")),
        ("kept", np.where(CLICK, "", "5.5")),
        ("row", TURN),
        ("", TURN),
        ("Unnamed: 0", TURN + 5),
        ("serial", TURN * 3 + 10**12),
        ("back", 1000 - TURN),
        ("id", TURN * 77 % 131),
        ("uuid", [f"{i:032x}" for i in TURN * 77 % 131]),
        ("timestamp", TURN * 77 % 131),
        ("seen", 1_600_000_000 + TURN * 77 % 131),
        ("t", 1_600_000_000_000 + TURN * 77 % 131 * 1000),
        ("created_at", 1.6e9 + RNG.random(N)),
        ("date", np.where(TURN % 2, 20220401, 20220531)),
        ("hour", 14102100 + TURN % 24),
        ("x", np.where(TURN % 2, "21/Oct/2014:10:11:12 +0000", "22/Oct/2014:10:11:13 +0000")),
        ("y2", np.where(TURN % 2, "10/21/2014", "1/2/2015")),
        ("z", np.where(TURN % 2, "2014-10-21T10:11:12.5Z", "2014-10-22T10:11:12+02:00")),
    ],
)
def test_outcomes_row_numbers_and_time_stamps_are_left_out(tmp_path, name, values):
    """As comments that name the reason, and make features of the columns once the # is gone."""
    times = 3 if name in ("copy", "turned", "extra", "kept") else 1  # values alone tell only in so many rows
    columns = {"click": [*CLICK] * times, "user": [*USER] * times, name: [*values] * times}
    text, found = propose_for(tmp_path, columns)
    assert found.label == "click"
    assert (*found.dense, *found.categorical) == ("user",)
    key = name if re.fullmatch("[A-Za-z0-9_-]+", name) else json.dumps(name)
    (line,) = (
        line
        for line in text.splitlines()
        if re.match(rf'\s*# ("{name}",|{re.escape(key)} = ).*left out: ', line)
    )
    used = load(tmp_path, text.replace(line, line.replace("# ", "", 1)))
    assert name in used.sources
    assert sum(len(chunk.line) for chunk in read_log(tmp_path / "own.csv", used)) >= N


def test_what_was_known_before_stays_with_a_doubt(tmp_path):
    names = ["past_purchases", "user_click_count", "avg_dwell_time", "time_since_click"]
    columns = {"click": CLICK, "user": USER} | dict.fromkeys(names, TURN % 50)
    text, found = propose_for(tmp_path, columns)
    assert {*found.dense, *found.categorical} == {"user", *names}
    assert text.count("if it counts what came after this row, leave it out") == 4
    text, found = propose_for(tmp_path, {"click": CLICK, "user": USER, "late": TURN % 2})
    assert found.categorical == ("user", "late")
    assert "0 and 1 too: if it is known only after the click, leave it out" in text


CODE_NAMES = [
    "user",
    "userid",
    "UserID",
    "item",
    "movie",
    "city",
    "genres",
    "zip",
    "zip_code",
    "cat",
    "C_brand_id",
]
COUNT_NAMES = ["age", "price", "n_users", "num_items", "item_price", "user_age", "city_population", "views"]


@pytest.mark.parametrize("name", CODE_NAMES)
@pytest.mark.parametrize("values", [TURN * 7 % 90, 10**9 + TURN * 7 % 90 * 10**6, (TURN * 7 % 90) ** 3])
def test_names_make_ids_of_whole_numbers(tmp_path, name, values):
    _, found = propose_for(tmp_path, {"click": CLICK, name: values, "w": WORDS})
    assert dict(zip(found.categorical, found.kinds, strict=True)) == {name: "integer", "w": "string"}


@pytest.mark.parametrize("name", COUNT_NAMES)
def test_names_make_numbers_of_whole_numbers(tmp_path, name):
    _, found = propose_for(tmp_path, {"click": CLICK, name: TURN * 7 % 90, "w": WORDS})
    assert found.dense == (name,)


def test_values_tell_codes_from_counts_where_no_name_does(tmp_path):
    rng, n = np.random.default_rng(0), 2000
    columns = {
        "a": rng.integers(0, 400, n),
        "b": rng.choice(rng.integers(0, 10**9, 300), n),
        "c": rng.integers(2**62, 2**63 - 1, n),
        "d": rng.integers(0, 20, n),
        "e": rng.geometric(0.02, n),
        "f": np.rint(rng.normal(170, 10, n)).astype(int),
        "g": rng.lognormal(10, 1, n).astype(int),
    }
    text, found = propose_for(tmp_path, {"click": np.arange(n) % 3 // 2, **columns})
    assert (found.categorical, found.dense) == (("a", "b", "c", "d"), ("e", "f", "g"))
    assert [text.count(doubt) for doubt in ("or a number?", "or a code?")] == [3, 3]


@pytest.mark.parametrize("name", ["own.csv", "own.parquet"])
def test_whole_numbers_with_gaps_are_ids_though_pandas_writes_floats(tmp_path, name):
    gaps = pl.Series(TURN % 6 == 2)
    brand = pl.Series(TURN * 7 % 90, dtype=pl.Float64).set(gaps, None)
    text, found = propose_for(
        tmp_path,
        {"click": CLICK, "brand": brand, "c7": brand, "price": brand, "w": TURN * 7 % 90 / 1.0},
        name,
    )
    assert (found.categorical, found.kinds, found.dense) == (
        ("brand", "c7"),
        ("integer",) * 2,
        ("price", "w"),
    )
    assert 'brand = "integer"  # ' in text
    assert "0 and a missing value share an id" in text


def test_there_is_always_something_to_embed(tmp_path):
    text, found = propose_for(tmp_path, {"click": CLICK, "views": TURN % 100, "price": TURN * 7 % 50})
    assert (found.dense, found.categorical) == (("views",), ("price",))
    assert "a model needs something to embed" in text
    for columns in ({"x": RNG.random(N)}, {"x": RNG.random(N), "^a$": WORDS}, {"t": TURN}):
        with pytest.raises(
            DataError, match=r"no column to embed, and a model needs one.*; add such"
        ) as error:
            propose_for(tmp_path, {"click": CLICK} | columns)
        assert len(str(error.value).splitlines()) == 1
    assert '"t" is left out: another number in each row, in order' in str(error.value)


def test_negative_numbers_keep_their_sign(tmp_path):
    text, found = propose_for(
        tmp_path,
        {
            "click": CLICK,
            "user": WORDS,
            "z": RNG.normal(size=N),
            "x": RNG.random(N),
            "m": 500 * RNG.normal(size=N),
        },
    )
    assert found.dense == ("z", "x", "m")
    assert found.transforms == {"z": "none", "m": "none"}
    assert text.count("large for a model as they are") == 1
    assert "transform" not in propose_for(tmp_path, {"click": CLICK, "user": WORDS, "x": RNG.random(N)})[0]


def test_a_text_that_means_missing_in_one_column_is_a_value_in_another(tmp_path):
    columns = {"click": CLICK, "age": np.where(TURN % 2, "NA", "33"), "user": np.where(TURN % 2, "?", "7")}
    text, found = propose_for(tmp_path, columns | {"country": np.where(TURN % 2, "NA", "DE")})
    assert found.missing == ("",)
    assert found.missing_in == {"age": ("", "NA"), "user": ("", "?")}
    assert '["NA"] are values here; if they mean a missing one, write so under [missing_in]' in text


@pytest.mark.parametrize(
    ("values", "doubt"),
    [
        (["a;b", "b;a", "c"], 'cells like "a;b" are one value, not taken apart'),
        (["a, b", "b, a", "c"], 'cells like "a, b" are one value, not taken apart'),
        (["['a']", "['b']", "[]"], "cells like \"['a']\" are one value, not taken apart"),
        (["N1 N2 N3 N4", "N2 N1 N4 N3", "N1"], 'cells like "N1 N2 N3 N4" are one value, not taken apart'),
        (["1.5", "2.5", "inf"], '67% are numbers, but not "inf"'),
        (["$1.50", "$2", "$3"], 'numbers with units, as in "$1.50"'),
        (["5%", "6 %", "7%"], 'numbers with units, as in "5%"'),
        (["a", "a", "a"], "the same in all these rows"),
    ],
)
def test_doubts_stand_beside_the_column(tmp_path, values, doubt):
    text, found = propose_for(tmp_path, {"click": CLICK, "x": values * (N // 3)})
    assert found.categorical == ("x",)
    (line,) = (line for line in text.splitlines() if line.startswith("x = "))
    assert doubt in line


@pytest.mark.parametrize(
    ("values", "kind", "bag"),
    [
        (["Comedy|Drama", "Drama|Comedy", "Drama"], "string", Bag()),
        (["7;12", "12;7", "7", ""], "integer", Bag(separator=";")),
        ([[7, 12], [12], []], "integer", Bag()),
        ([["a"], ["b", "a"], None], "string", Bag()),
        ([[{"a": 3, "w": 0.5}], [{"a": 7, "w": 1.0}, {"a": 3, "w": -1.0}], []], "integer", Bag(weights=True)),
    ],
)
def test_cells_that_list_ids_are_bags(tmp_path, values, kind, bag):
    name = "own.csv" if isinstance(values[0], str) else "own.parquet"
    rows = (values * N)[:N]
    text, found = propose_for(tmp_path, {"click": CLICK, "user": WORDS, "x": rows}, name)
    assert found.bags == {"x": bag}
    assert dict(zip(found.categorical, found.kinds, strict=True))["x"] == kind
    assert "distinct, " in text


CELLS = ["", "NA", "-", "?", "0", "1", "-1", "0.5", "1e39", "37.0", "True", "no", "007", "2014-10-21", "16e8"]
CELLS += ["ab12cd34", "a|b", "1,5", " 3", "$5", "5%", "inf", "9" * 40, "é", "\0", "12:30", '"', "1."]
CELL_COLUMNS = st.one_of(
    st.lists(st.sampled_from(CELLS), min_size=1, max_size=4),
    st.lists(st.none() | st.integers(0, 99).map(float), min_size=1),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1),
    st.lists(st.sampled_from([float("inf"), float("nan"), 1.0, -1e300, None]), min_size=1),
    st.just([0, 1]), st.just([False, True]), st.just(list(range(N))),
)  # fmt: skip
COLUMN_NAMES = [
    "click",
    "label",
    "user_id",
    "age",
    "",
    "^x$",
    "*",
    "id",
    "time",
    "is_like",
    "price",
    "rating",
    "0",
    "\x1b",
]


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(st.sampled_from(COLUMN_NAMES), CELL_COLUMNS, min_size=1, max_size=6),
    st.sampled_from([1, 3, 60]),
    st.sampled_from(["own.csv", "own.parquet"]),
)
def test_nothing_is_proposed_that_is_refused(tmp_path_factory, columns, rows, name):
    """Whatever the table: a line that names it, or a schema by which each of its rows can be read."""
    folder, refused = tmp_path_factory.getbasetemp(), None
    try:
        propose_for(folder, {key: (cells * rows)[:rows] for key, cells in columns.items()}, name)
    except DataError as error:
        refused = str(error)
    if refused is not None:
        assert refused.startswith(str(folder / name))
        assert len(refused.splitlines()) == 1
        assert not re.search(r"row \d+.*(not a|not 0)", refused)


NAMES = [
    'a "b"',
    "x\ty",
    "naïve 中文",
    "#c",
    "a.b",
    "del\x7f",
    "",
    "back\\slash",
    "[categorical]",
    "'",
    "a = 1",
    "😀",
]


@pytest.mark.parametrize("name", ["own.csv", "own.parquet"])
def test_names_of_columns_are_data(tmp_path, name):
    names = [*NAMES, *(["new\nline", "\r"] if name.endswith("parquet") else [])]
    columns = {key: TURN % 9 if i % 2 else RNG.normal(size=N) for i, key in enumerate(names)}
    text, found = propose_for(tmp_path, {"click": CLICK, **columns, "^x$": WORDS, "*": WORDS}, name)
    assert {*found.dense, *found.categorical} == set(names)
    assert text.count("a name that is a pattern; rename it in the file") == 2


def test_names_of_files_are_data(tmp_path):
    for name in (" .csv", "a\nb.csv", '"#.csv', "é.x.csv", "bad\udcff.csv"):
        text, found = propose_for(tmp_path, {"click": CLICK, "user": WORDS}, name)
        assert found.categorical == ("user",)
        text.encode()


def test_values_that_no_column_can_hold(tmp_path):
    huge = pl.Series([str(10**40 + i % 7) for i in range(N)])
    inf = pl.Series([1.0, float("inf"), float("nan")] * (N // 3))
    columns = {
        "click": CLICK,
        "user": WORDS,
        "huge": huge,
        "inf": inf,
        "zip": [f"{i % 50:05d}" for i in range(N)],
    }
    for name, more in (
        ("own.csv", {}),
        ("own.parquet", {"l": [[1.5]] * N, "n": [None] * N, "d": [date(2020, 1, 2)] * N}),
    ):
        _, found = propose_for(tmp_path, columns | more, name)
        assert found.dense == ()
        assert set(found.categorical) - {"inf"} == {"user", "huge", "zip"}
        assert found.kinds[found.categorical.index("zip")] == "string"


CSV = "click,user,price\n" + "".join(f"{i % 2},u{i % 7},{i % 5}.5\n" for i in range(40))


@pytest.mark.parametrize("separator", ["|", ";", "\t", ", ", "; ", " | "])
def test_other_separators_are_read(tmp_path, separator):
    (tmp_path / "own.csv").write_text(CSV.replace(",", separator))
    found = load(tmp_path, propose(tmp_path / "own.csv", 100))
    assert (found.label, found.dense, found.categorical) == ("click", ("price",), ("user",))
    (chunk,) = read_log(tmp_path / "own.csv", found)
    (tmp_path / "plain.csv").write_text(CSV)
    (expected,) = read_log(tmp_path / "plain.csv", found)
    for name in ("label", "dense", "ids"):
        assert getattr(chunk, name).tolist() == getattr(expected, name).tolist()


@pytest.mark.parametrize("separator", ["::", ":", "^", "~", "\x01", " ", "  "])
def test_separators_that_are_not_read_are_named(tmp_path, separator):
    (tmp_path / "own.csv").write_text(CSV.replace(",", separator))
    with pytest.raises(
        DataError, match=re.escape(f"own.csv: its fields seem to be separated by {separator!r}, ")
    ):
        propose(tmp_path / "own.csv", 100)
    (tmp_path / "ratings.dat").write_text("1::2::3\n")
    with pytest.raises(
        DataError, match=r"ratings.dat: its fields seem to be separated by '::', which is not read"
    ):
        propose(tmp_path / "ratings.dat", 100)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (CSV.replace(",", ";").replace(".5", ",5"), 'numbers with commas, as in "0,5"'),
        (CSV.replace(".5\n", ",50\n").replace("price,50", "price"), None),
        (re.sub(r",(\d)\.5", r',"1,\g<1>00.5"', CSV), 'numbers with commas, as in "1,000.5"'),
        (re.sub(r",(\d)\.5", r", \1.5", CSV), 'numbers with blanks, as in " 0.5"'),
    ],
)
def test_numbers_that_are_not_read_are_named(tmp_path, data, reason):
    (tmp_path / "own.csv").write_text(data)
    if reason is None:
        with pytest.raises(DataError, match="4 fields instead of 3"):
            propose(tmp_path / "own.csv", 100)
        return
    text = propose(tmp_path / "own.csv", 100)
    assert f'# price = "string"  # left out: {reason}' in text
    assert load(tmp_path, text).categorical == ("user",)


@pytest.mark.parametrize(
    "data",
    [
        CSV.partition("\n")[2],
        "u1,comedy,yes\nu2,drama,no\nu1,comedy,no\nu2,drama,yes\n",
        "1\t2\t\tab12cd34\n0\t5\t7\tab12cd35\n",
        "17,a,0.5\n18,b,-3\n",
    ],
)
def test_a_missing_header_is_noticed(tmp_path, data):
    (tmp_path / "own.csv").write_text(data)
    with pytest.raises(
        DataError, match=r"own.csv, line 1: no header, but data, as .*; write a line with the names"
    ):
        propose(tmp_path / "own.csv", 100)


@pytest.mark.parametrize(
    "header", ["0,1,2,3", "click,user,2019,2020", "event,click,view,buy", ",click,user,3"]
)
def test_a_header_is_taken_for_one(tmp_path, header):
    rows = {"event,click,view,buy": "click,a,b,1\nview,c,d,0\n"}.get(header, "1,5,7,0\n0,6,8,1\n")
    (tmp_path / "own.csv").write_text(f"{header}\n{rows}")
    assert propose(tmp_path / "own.csv", 100)


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
