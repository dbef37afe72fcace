"""The columns of a click log, and the one error that bad data raises."""

import hashlib
import json
import math
import tomllib
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from data_pipeline.names import shown

Kind = Literal["hex", "integer", "string", "hour", "weekday"]
PARTS = ("hour", "weekday")  # of these, those that are parts of a time
# What becomes of the numbers of a dense column; `dialects.TRANSFORMS` has the functions.
Dense = Literal["log1p", "none", "zscore", "quantile"]
MEASURED = ("zscore", "quantile")  # of these, those that the rows that train decide on
Pooling = Literal["sum", "mean", "max"]  # how the vectors of a bag's ids become one
WEIGHT = ":"  # stands between an id and its weight in a text
# What a column may call the splits, and the day of a prepared folder that each of them is.
SPLIT_DAYS = {"train": 0, "validation": 1, "valid": 1, "val": 1, "test": 2}


class DataError(Exception):
    """Input data, or settings for them, that cannot be used.

    The message is one line that names the file, the line if there is one, and a remedy.
    """


@dataclass(frozen=True)
class Bag:
    """A categorical column whose cells hold any number of ids, also none.

    pooling: what a model makes of their vectors; mean is the sum over the number of ids.
    separator: the character between the ids of a cell in a text.
    weights: whether each id has a weight, 3:0.5 in a text, by which its vector is multiplied.
    """

    pooling: Pooling = "sum"
    separator: str = "|"
    weights: bool = False

    def __post_init__(self):
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be one of {', '.join(get_args(Pooling))}")
        if not isinstance(self.weights, bool) or (self.weights and self.pooling == "max"):
            raise ValueError("weights must be true or false, and false where pooling is max")
        separator, others = self.separator, ("\n", "\r", *(WEIGHT * self.weights))
        if not isinstance(separator, str) or len(separator) != 1 or separator in others:
            raise ValueError("separator must be one character, and not that before weights")


@dataclass(frozen=True)
class Schema:
    """The columns of a click log, in the order of a raw log: label, then dense, then categorical.

    kinds: how the values of each categorical column become 32 bits, with 0 for missing:
        hex      up to 8 hexadecimal digits, the number itself;
        integer  the number itself below 2^32, the hash of its decimal digits beyond and below 0; 37.0 is 37;
        string   the hash of its UTF-8 bytes;
        hour     of a time in UTC, from 1 on: 1 + 0 to 23;
        weekday  likewise, 1 for Monday to 7.
        The hash is that of `columns.hash_texts`. An empty tuple means hex for all.
    missing: the texts that count as missing, besides null.
    missing_in: those texts of the columns that differ from the others, by column.
    transforms: the transform of each dense column that does not take the one of the whole folder.
    quote: what fields of CSV may stand in, `"` as in RFC 4180; empty if quotes are part of the text.
    bags: those categorical columns whose cells hold any number of ids.
    dense_missing: what a missing number becomes, before the transform.
    threshold: the label is 1 from this value on, else 0; with None, labels must be 0 or 1.
    weight: the column of a table that says how much a row counts; with None, all count alike.
    split: the column of a table that says of each row whether it trains, validates or tests.
    split_at: two times, as ISO texts or numbers, if `split` is a time: rows before the first train, those
        from there to before the second validate, and all others test.
    times: the column of times that each categorical column of kind hour or weekday is taken from.
    """

    name: str
    label: str
    dense: tuple[str, ...]
    categorical: tuple[str, ...]
    kinds: tuple[Kind, ...] = ()
    missing: tuple[str, ...] = ("",)
    dense_missing: float = 0.0
    threshold: float | None = None
    missing_in: dict[str, tuple[str, ...]] = field(default_factory=dict)
    transforms: dict[str, Dense] = field(default_factory=dict)
    quote: str = '"'
    bags: dict[str, Bag] = field(default_factory=dict)
    weight: str | None = None
    split: str | None = None
    split_at: tuple[str | float, str | float] | None = None
    times: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "kinds", self.kinds or ("hex",) * len(self.categorical))
        for name in ("missing_in", "transforms", "bags"):  # in one order, as the fingerprint has it
            given = getattr(self, name)
            object.__setattr__(self, name, {key: given[key] for key in self.columns if key in given})
        parts = [n for n, kind in zip(self.categorical, self.kinds, strict=False) if kind in PARTS]
        if [*self.times] != parts:
            raise ValueError("hours or weekdays of no column, or a column of times of something else")
        if self.bags.keys() - {*self.categorical}:
            raise ValueError("a bag that is no categorical column")
        if unknown := set(self.transforms.values()) - set(get_args(Dense)):
            raise ValueError(f"transform {unknown.pop()}")

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.label, *self.dense, *self.categorical)

    @property
    def sources(self) -> tuple[str, ...]:
        """The columns of a table that the dense and the categorical ones are made of, each once."""
        return tuple(dict.fromkeys(self.times.get(name, name) for name in (*self.dense, *self.categorical)))

    def rules(self) -> dict[str, Any]:
        """Those rules for values that are not as in a raw Criteo log."""
        plain = Schema(self.name, self.label, self.dense, self.categorical)
        names = [each.name for each in fields(self)]
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(plain, name)}

    def inputs(self) -> tuple:
        """What a model is given: columns, kinds and transforms, but not how a file tells their values."""
        bags = {name: (bag.pooling, bag.weights) for name, bag in self.bags.items()}
        return self.dense, self.categorical, self.kinds, self.transforms, bags

    def poolings(self) -> tuple[Pooling, ...] | None:
        """The pooling of each categorical column, of which one may be a bag of one; None if none is a bag."""
        return tuple(self.bags.get(name, Bag()).pooling for name in self.categorical) if self.bags else None

    def weighted(self) -> bool:
        """Whether the ids of any column have weights."""
        return any(bag.weights for bag in self.bags.values())

    def fingerprint(self) -> str:
        """A short hash of the columns, their order and rules, stored wherever the schema must match.

        Which rows test is none of these: it changes no value.
        """
        rules = {name: rule for name, rule in self.rules().items() if name not in ("split", "split_at")}
        told = [self.label, self.dense, self.categorical, *([rules] if rules else [])]
        text = json.dumps(told, default=asdict)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_schema(path: Path | str) -> Schema:
    """Read a schema from a TOML file, such as `robe schema` proposes.

    Raises DataError if it cannot be read, or a key is unknown, missing or wrong.
    """
    path = Path(path)

    def check(good: bool, key: str, words: str) -> None:
        if not good:
            raise DataError(f"{path}: {key} must be {words}; `robe schema FILE` shows an example")

    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; check the path") from None
    except ValueError as error:
        raise DataError(f"{path}: not a TOML file ({error}); correct it") from None
    known = {"name", "label", "threshold", "dense", "dense_missing", "missing", "categorical"}
    known |= {"missing_in", "transform", "quote", "bags", "weight", "split", "split_at"}
    for key in data.keys() - known:
        raise DataError(f"{path}: {key} is no key of a schema; there are {', '.join(sorted(known))}")
    defaults: dict[str, Any]
    defaults = {"name": shown(path.stem), "dense": [], "dense_missing": 0, "missing": [""]}
    data = defaults | {"missing_in": {}, "transform": {}, "quote": '"', "bags": {}} | data

    if "label" not in data:
        raise DataError(
            f'{path}: no label; write `label = "COLUMN"` above the first table, with the column to predict'
        )
    others = [key for key in ("weight", "split") if key in data]
    for key in ("name", "label", *others):
        check(isinstance(data.get(key), str) and data[key] != "", key, "a text")
    for key in ("dense", "missing"):
        check(_are_texts(data[key]), key, "a list of texts")
    check(data["quote"] in ("", '"'), "quote", "empty or one double quote")
    for key in ("threshold", "dense_missing"):
        if key in data:
            number = isinstance(data[key], int | float) and not isinstance(data[key], bool)
            check(number and math.isfinite(data[key]), key, "a number")
    kinds: Any = data.get("categorical")
    check(isinstance(kinds, dict) and len(kinds) > 0, "categorical", "a table of at least one COLUMN = KIND")
    plain = [kind for kind in get_args(Kind) if kind not in PARTS]
    features: dict[str, list[str]] = {}
    for column, kind in kinds.items():
        good = kind in plain or (_are_texts(kind) and kind != [] and {*kind} <= {*PARTS})
        words = f"one of {', '.join(plain)}, or a list of parts of times, {' and '.join(PARTS)}"
        check(good, f"categorical.{column}", words)
        features[column] = [column] if kind in plain else [f"{column}_{part}" for part in kind]
    check(isinstance(data["missing_in"], dict), "missing_in", "a table of COLUMN = [TEXT, ...]")
    for column, texts in data["missing_in"].items():
        check(_are_texts(texts), f"missing_in.{column}", "a list of texts")
        check(column in (*data["dense"], *kinds), f"missing_in.{column}", "of a dense or categorical column")
    check(isinstance(data["transform"], dict), "transform", "a table of COLUMN = TRANSFORM")
    for column, transform in data["transform"].items():
        check(transform in get_args(Dense), f"transform.{column}", f"one of {', '.join(get_args(Dense))}")
        check(column in data["dense"], f"transform.{column}", "of a column in dense")
    check(isinstance(data["bags"], dict), "bags", "a table of COLUMN = { pooling = POOLING, ... }")
    known = {each.name for each in fields(Bag)}
    for column, rules in data["bags"].items():
        good = isinstance(rules, dict) and rules.keys() <= known
        check(good, f"bags.{column}", f"a table with no other keys than {', '.join(sorted(known))}")
        check(features.get(column) == [column], f"bags.{column}", "of a column in categorical, no times")
    try:
        bags = {column: Bag(**rules) for column, rules in data["bags"].items()}
    except ValueError as error:
        raise DataError(f"{path}: bags: {error}; `robe schema FILE` shows an example") from None
    if "split_at" in data:
        check("split" in data, "split_at", "beside a split, the column of times")
        data["split_at"] = _times(data["split_at"])
        words = "two times, as texts like 2024-05-01 or as numbers, the earlier first"
        check(data["split_at"] is not None, "split_at", words)
    categorical = [feature for column in kinds for feature in features[column]]
    named = [data["label"], *data["dense"], *categorical, *(data[key] for key in others)]
    for column in (*named, *kinds):
        pattern = column == "*" or (column.startswith("^") and column.endswith("$"))  # to Polars
        check(not pattern, f"column {column}", "the name of one column; rename it in the file")
    (column, times), *_ = Counter(named).most_common(1)
    check(times == 1, f"column {column}", "named once, as label, weight, split, dense or categorical")
    return Schema(
        name=data["name"],
        label=data["label"],
        dense=tuple(data["dense"]),
        categorical=tuple(categorical),
        kinds=tuple(part for kind in kinds.values() for part in (kind if isinstance(kind, list) else [kind])),
        missing=tuple(data["missing"]),
        quote=data["quote"],
        dense_missing=float(data["dense_missing"]),
        threshold=None if "threshold" not in data else float(data["threshold"]),
        missing_in={
            feature: tuple(texts)
            for column, texts in data["missing_in"].items()
            for feature in features.get(column, [column])
        },
        transforms=data["transform"],
        bags=bags,
        weight=data.get("weight"),
        split=data.get("split"),
        split_at=data.get("split_at"),
        times={name: column for column in kinds for name in features[column] if kinds[column] not in plain},
    )


def moment(text: str) -> datetime:
    """A time as ISO 8601 writes it, in UTC and without its zone; one without a zone is in UTC already."""
    time = datetime.fromisoformat(text)
    return time if time.tzinfo is None else time.astimezone(UTC).replace(tzinfo=None)


def _times(values: Any) -> tuple[str, str] | tuple[float, float] | None:
    """`Schema.split_at` of what TOML has, which may be its own dates; None if it is no such thing."""
    if not isinstance(values, list) or len(values) != 2:
        return None
    first, second = (value.isoformat() if isinstance(value, date) else value for value in values)
    if isinstance(first, str) and isinstance(second, str):
        try:
            return (first, second) if moment(first) < moment(second) else None
        except (ValueError, OverflowError):
            return None
    numbers = [float(one) for one in values if isinstance(one, int | float) and not isinstance(one, bool)]
    if len(numbers) == 2 and -math.inf < numbers[0] < numbers[1] < math.inf:
        return numbers[0], numbers[1]
    return None


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(text, str) for text in values)


# Criteo Kaggle and Criteo Terabyte: a label, 13 counts, 26 values hashed to 32 bits; tabs, no header.
CRITEO = Schema(
    name="criteo",
    label="label",
    dense=tuple(f"int_{i}" for i in range(13)),
    categorical=tuple(f"cat_{i}" for i in range(26)),
)

# How many values each categorical column has. Kaggle: 33,762,577 in all, counted over all of train.txt.
CRITEO_KAGGLE_CARDINALITIES = (
    1_460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3,
    93_145, 5_683, 8_351_593, 3_194, 27, 14_992, 5_461_306, 10, 5_652,
    2_173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572,
)  # fmt: skip
# Terabyte: 187,767,399 in all, over 24 days, of values taken modulo 40,000,000 as MLPerf v1 does.
CRITEO_TB_CARDINALITIES = (
    39_884_406, 39_043, 17_289, 7_420, 20_263, 3, 7_120, 1_543, 63,
    38_532_951, 2_953_546, 403_346, 10, 2_208, 11_938, 155, 4, 976,
    14, 39_979_771, 25_641_295, 39_664_984, 585_935, 12_972, 108, 36,
)  # fmt: skip

# Terabyte: rows of days 0 to 22, and bytes of the 24 files, unpacked and as they are handed out.
CRITEO_TB_TRAINING_ROWS = 4_195_197_692
CRITEO_TB_TEXT_BYTES, CRITEO_TB_GZIP_BYTES = 1.11e12, 342 * 2**30

# Name -> rows and cardinalities, as published.
PUBLIC_DATA_SETS = {
    "criteo-kaggle": (45_840_617, CRITEO_KAGGLE_CARDINALITIES),
    "criteo-tb": (4_373_472_329, CRITEO_TB_CARDINALITIES),
}

# Lines of day_0 ... day_23 of Criteo Terabyte; the same in several public loaders, e.g. that of MLPerf for
# TorchRec.
CRITEO_TB_ROWS = (
    195_841_983, 199_563_535, 196_792_019, 181_115_208, 152_115_810, 172_548_507, 204_846_845, 200_801_003,
    193_772_492, 198_424_372, 185_778_055, 153_588_700, 169_003_364, 194_216_520, 194_081_279, 187_154_596,
    177_984_934, 163_382_602, 142_061_091, 156_534_237, 193_627_464, 192_215_183, 189_747_893, 178_274_637,
)  # fmt: skip
