"""A folder of shards and the `manifest.json` that describes it.

Day N of the log is three `.npy` files, in the layout of TorchRec's Criteo tools:

    day_N_labels.npy   int32   (rows, 1)
    day_N_dense.npy    float32 (rows, number of dense columns)
    day_N_sparse.npy   int32   (rows, number of categorical columns); 32 bits, to be read as uint32

Where columns are bags, which hold any number of ids, the sparse shard has the ids of all bags one behind the
other (`bags.py`), and there are

    day_N_lengths.npy  uint16  (rows, number of categorical columns), how many ids each bag has
    day_N_starts.npy   int64   (rows, 1), how many ids stand before each row
    day_N_weights.npy  float32 (ids, 1), where ids have weights

Where the schema names a column for it, how much each row counts is in

    day_N_row_weights.npy  float32 (rows, 1), finite and at least 0
"""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import msgspec
import numpy as np

from data_pipeline.names import shown
from data_pipeline.npy import NpyFile
from data_pipeline.schema import MEASURED, DataError, Schema
from data_pipeline.whole_files import read_text, write_json

FORMAT, VERSION = "robe-dlrm-shards", 1
MANIFEST = "manifest.json"
SPLITS = ("train", "test", "validation")
KINDS = {"labels": np.dtype(np.int32), "dense": np.dtype(np.float32), "sparse": np.dtype(np.int32)}
# What more there is where columns are bags, and where rows have weights.
MORE_KINDS: dict[str, np.dtype] = {
    "lengths": np.dtype(np.uint16),
    "starts": np.dtype(np.int64),
    "weights": np.dtype(np.float32),
    "row_weights": np.dtype(np.float32),
}
RAGGED = ("sparse", "weights")  # of bags, these have a row for each id

# A stretch of rows of one day: (day, first row, row after the last).
Stretch = tuple[int, int, int]
# What is measured of a dense column. zscore: the mean and the standard deviation of its logarithms. quantile:
# numbers, and the values that they become; numbers between get values between.
Pairs = tuple[tuple[float, float], ...]


def shard_name(day: int, kind: str) -> str:
    return f"day_{day}_{kind}.npy"


def shard_columns(schema: Schema) -> dict[str, int]:
    """The number of columns of each kind of shard that a folder has."""
    columns = {"labels": 1, "dense": len(schema.dense), "sparse": len(schema.categorical)}
    if schema.bags:
        columns |= {"sparse": 1, "lengths": len(schema.categorical), "starts": 1}
        columns |= {"weights": 1} if schema.weighted() else {}
    return columns if schema.weight is None else columns | {"row_weights": 1}


def shard_type(kind: str) -> np.dtype:
    """The type of a shard that is made here."""
    return KINDS[kind] if kind in KINDS else MORE_KINDS[kind]


def measured_columns(schema: Schema, default: str) -> dict[str, str]:
    """Dense column -> its transform, of those whose transform is measured; default: that of the folder."""
    transforms = {name: schema.transforms.get(name, default) for name in schema.dense}
    return {name: transform for name, transform in transforms.items() if transform in MEASURED}


def shard_types(kind: str) -> tuple[np.dtype, ...]:
    """The types that a shard may have; TorchRec's first stage writes ids as int64, with the same low bits."""
    return (KINDS[kind], np.dtype(np.int64)) if kind == "sparse" else (shard_type(kind),)


def possible(rows: np.ndarray, kind: str) -> np.ndarray:
    """Which values of some rows of a shard (n, columns) may stand there: bool, (n, columns)."""
    if kind == "labels":
        return (rows == 0) | (rows == 1)
    if kind in ("dense", "weights"):
        return np.isfinite(rows)
    if kind == "row_weights":
        return np.isfinite(rows) & (rows >= 0)
    if kind in ("lengths", "starts"):
        return rows >= 0
    return (rows >= -(2**31)) & (rows < 2**32)  # of int64 ids the low 32 bits are read


@dataclass(frozen=True)
class Ids:
    """What the numbers in the sparse shards mean.

    dialect: `hash`, the 32 bits of the log, or 0 if missing; `modulo`, these modulo `modulus`; `dictionary`,
        the numbers 1, 2, ... of the values that training saw at least `min_count` times, 0 for all others.
        With a modulus, values are taken modulo it before they are numbered.
    cardinalities: how many ids each feature has: the modulus, or the size of the dictionary, 0 included; for
        `hash` how many distinct ids there are.
    exact: whether the cardinalities are exact; those of `hash` are estimates if they are large.
    order: how the dictionary numbers values: `first`, in order of first appearance, or `count`, by falling
        count, ties by value.
    """

    dialect: Literal["hash", "modulo", "dictionary"]
    cardinalities: tuple[int, ...]
    exact: bool
    modulus: int | None = None
    min_count: int = 1
    order: Literal["first", "count"] = "first"

    def __str__(self) -> str:
        modulo = [] if self.modulus is None else [f"modulo {self.modulus:,}"]
        if self.dialect != "dictionary":
            return modulo[0] if modulo else self.dialect
        words = [
            self.dialect,
            *modulo,
            "by first appearance" if self.order == "first" else "by falling count",
        ]
        if self.min_count > 1:
            words.append(f"0 for values seen fewer than {self.min_count:,} times")
        return ", ".join(words)


@dataclass(frozen=True)
class Day:
    """A day of the log: its rows, the sha256 of each shard (without its header), where it comes from.

    rejected: how many of its lines broke the rules.
    dropped: how many rows without a click were left out by chance.
    """

    rows: int
    sha256: dict[str, str]
    source: str
    rejected: int = 0
    dropped: int = 0


class Score(TypedDict):
    rows: int
    auc: float
    log_loss: float
    base_rate: float


class Scores(TypedDict):
    """Those that no model can better, of the halves of the last day."""

    validation: Score
    test: Score


class Bayes(TypedDict):
    bayes: Scores | None


class Feature(TypedDict):
    distinct: int
    kept: NotRequired[int]
    rare_rows: NotRequired[int]
    coverage: NotRequired[dict[str, float]]
    ids: NotRequired[int]


class Told(TypedDict):
    """What else a reader of a manifest relies on."""

    schema_fingerprint: str
    synthetic: Bayes | None
    features: NotRequired[list[Feature]]


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds, and what the values in it mean."""

    schema: Schema
    dense_transform: str
    ids: Ids
    days: tuple[Day, ...]
    split: dict[str, tuple[Stretch, ...]]
    split_note: str
    # What the generator knows of its own data (best possible AUC, ...); None for data of the world.
    synthetic: dict[str, Any] | None = None
    dictionary_sha256: str | None = None
    # For each feature, for people to read: how many `distinct` values there are, in all days, and estimated
    # from 4096 on. With a dictionary: the `distinct` values of training, how many of them were `kept`, the
    # `rare_rows` of training whose value was not, and the `coverage`, the share of rows that have one of the
    # n most frequent values, by n. Where there are bags, these count ids, of which there are `ids`, not rows.
    features: tuple[dict[str, Any], ...] = ()
    # Of each dense column that had numbers below 0, which the transform made 0, their share of all rows.
    clipped: dict[str, float] = field(default_factory=dict)
    # Of each dense column whose transform is measured, what the rows that train tell of it.
    measured: dict[str, Pairs] = field(default_factory=dict)
    # The probability with which a row without a click was kept, on days that train.
    keep_negatives: float = 1.0
    folder: Path = field(default=Path("."), compare=False)

    def require_consistent(self) -> None:
        """Raise ValueError unless its numbers are possible, and agree where two of them tell the same."""
        ids, columns = self.ids, len(self.schema.categorical)
        if {*SPLITS} - self.split.keys():
            raise ValueError("a split is missing")
        rows = dict(enumerate(day.rows for day in self.days))
        counts = [number for day in self.days for number in (day.rows, day.rejected, day.dropped)]
        if any(not 0 <= number < 2**63 for number in counts):
            raise ValueError("a day of fewer rows than none")
        if not 0 < self.keep_negatives <= 1:
            raise ValueError(
                f"rows without a click that are kept with a probability of {self.keep_negatives}"
            )
        for day, start, stop in (stretch for part in self.split.values() for stretch in part):
            if not 0 <= start < stop <= rows.get(day, -1):
                raise ValueError(f"rows {start} to {stop} of day {day}")
        rows_of = {name for name in SPLITS if self.split[name]}
        needed = rows_of if rows_of == {"test"} else SPLITS  # where all rows test, none need do anything else
        for name, part in self.split.items():
            if (not part and name in needed) or any(
                a[0] == b[0] and b[1] < a[2] for a, b in pairwise(sorted(part))
            ):
                raise ValueError(f"{name} has no row, or one twice")
        if not all(1 <= count < 2**32 for count in ids.cardinalities):
            raise ValueError("a feature needs from 1 to 2^32 - 1 ids")
        if len(ids.cardinalities) != columns or len(self.schema.kinds) != columns:
            raise ValueError(f"{len(ids.cardinalities)} cardinalities of {columns} categorical columns")
        if not (ids.modulus is None or 1 <= ids.modulus < 2**32) or ids.min_count < 1:
            raise ValueError("a modulus or a least count that no number can be")
        if ids.dialect == "modulo" and {ids.modulus} != {*ids.cardinalities}:
            raise ValueError("cardinalities that are not the modulus")
        columns_measured = measured_columns(self.schema, self.dense_transform)
        if self.measured.keys() != columns_measured.keys():
            raise ValueError("measures of other columns than their transforms need")
        for name, transform in columns_measured.items():
            pairs = np.array(self.measured[name], float).reshape(-1, 2)
            least = len(pairs) == 1 and pairs[0, 1] > 0 if transform == "zscore" else len(pairs) > 0
            if not (least and np.isfinite(pairs).all() and (np.diff(pairs, axis=0) > 0).all()):
                raise ValueError(f"measures of {name} that no rows can have")
        told = {"hash": lambda f: f["distinct"], "dictionary": lambda f: f["kept"] + 1}.get(ids.dialect)
        if self.features and told and tuple(map(told, self.features)) != ids.cardinalities:
            raise ValueError("cardinalities that are not those of the features")

    def rows(self, split: str) -> int:
        """The number of rows of a split."""
        return sum(stop - start for _, start, stop in self.split[split])

    def fingerprint(self) -> str:
        """A short hash of what the columns are and what their values mean; a model accepts no other."""
        meaning: list[str | int | dict[str, Pairs] | None]
        meaning = [self.schema.fingerprint(), self.dense_transform, self.ids.dialect, self.dictionary_sha256]
        meaning += [self.ids.modulus] if self.ids.modulus is not None else []
        meaning += [self.measured] if self.measured else []
        return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()[:16]

    def same_rows(self, other: "Manifest") -> bool:
        """Whether both describe the same rows, meaning the same, in the same splits."""
        return self._rows() == other._rows()

    def _rows(self) -> tuple:
        return self.fingerprint(), [(day.rows, day.sha256) for day in self.days], self.split

    def describe(self) -> str:
        """What these data are, in one line."""
        kind = "SYNTHETIC data, no click in it is real" if self.synthetic else f"{self.schema.name} data"
        sizes = ", ".join(f"{self.rows(split):,} {split}" for split in self.split)
        meaning = f"dense: {self.transforms()}; ids: {self.ids}; {self.split_note}"
        if self.keep_negatives < 1:
            dropped = sum(day.dropped for day in self.days)
            meaning += f"; of the rows without a click that train, {self.keep_negatives:g} are kept"
            meaning += f" ({dropped:,} dropped)"
        return shown(f"{kind}; rows: {sizes}; {meaning}")

    def transforms(self) -> str:
        """The transform of the dense columns in words, and how many have one of their own."""
        own = Counter(self.schema.transforms.values())
        return ", ".join([self.dense_transform, *(f"{n} by schema {name}" for name, n in own.items())])

    def save(self, folder: Path) -> None:
        """Write `folder/manifest.json`."""
        data: dict[str, Any]
        data = {"format": FORMAT, "version": VERSION, "schema_fingerprint": self.schema.fingerprint()}
        data |= asdict(self)
        del data["folder"]
        if not self.measured:  # as manifests were before there were any
            del data["measured"]
        if not self.schema.bags:  # likewise
            del data["schema"]["bags"]
        if self.schema.weight is None:  # likewise
            del data["schema"]["weight"]
        if self.schema.split is None:  # likewise
            del data["schema"]["split"]
        if self.schema.split_at is None:  # likewise
            del data["schema"]["split_at"]
        if not self.schema.times:  # likewise
            del data["schema"]["times"]
        if self.keep_negatives == 1:  # likewise
            del data["keep_negatives"]
            for day in data["days"]:
                del day["dropped"]
        write_json(folder / MANIFEST, data)

    @classmethod
    def load(cls, folder: Path | str) -> "Manifest":
        """Read and validate `folder/manifest.json`; raises DataError with the remedy.

        `folders.open_folder` opens TorchRec's folders, which have none, as well.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            remedy = f"make the folder with `robe prepare FILE --out {folder}`"
            raise DataError(f"{path}: not found; {remedy}")
        try:
            data = msgspec.json.decode(read_text(path))
            if data["format"] != FORMAT or data["version"] != VERSION:
                raise DataError(
                    f"{path}: is {data['format']} version {data['version']}, this program reads {FORMAT} "
                    f"version {VERSION}; prepare the data again"
                )
            found = replace(msgspec.convert(data, cls), folder=Path(folder))
            msgspec.convert(data, Told)
            if found.schema.fingerprint() != data["schema_fingerprint"]:
                raise DataError(f"{path}: the columns do not match their fingerprint; prepare the data again")
            if unknown := data.keys() - {*vars(found), "format", "version", "schema_fingerprint"}:
                raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
            found.require_consistent()
            return found
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; check its rights and the disk") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}: not a valid manifest ({error}); prepare the data again") from None

    def open_shard(self, day: int, kind: str) -> NpyFile:
        """Open one shard; raises DataError if its type or shape is not what the manifest says."""
        path = self.folder / shard_name(day, kind)
        rows = self.days[day].rows
        again = "prepare the data again"
        array = NpyFile(path, missing=f"missing, though {MANIFEST} lists it; {again}", remedy=again)
        if self.schema.bags and kind in RAGGED:
            rows = len(array)  # `bags.BagShards` holds it against the lengths
        expected = (rows, shard_columns(self.schema)[kind])
        if array.shape != expected or array.dtype not in shard_types(kind):
            raise DataError(
                f"{path}: holds {array.dtype} {array.shape}, {MANIFEST} says {shard_type(kind)} {expected}; "
                "prepare the data again"
            )
        return array
