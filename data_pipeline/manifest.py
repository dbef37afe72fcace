"""A folder of shards and the `manifest.json` that describes it.

Day N of the log is three `.npy` files, in the layout of TorchRec's Criteo tools:

    day_N_labels.npy   int32   (rows, 1)
    day_N_dense.npy    float32 (rows, number of dense columns)
    day_N_sparse.npy   int32   (rows, number of categorical columns); 32 bits, to be read as uint32
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.schema import DataError, Schema
from whole_files import naming, read_text, write_json

FORMAT, VERSION = "robe-dlrm-shards", 1
MANIFEST = "manifest.json"
SPLITS = ("train", "test", "validation")
KINDS = {"labels": np.dtype(np.int32), "dense": np.dtype(np.float32), "sparse": np.dtype(np.int32)}

# A stretch of rows of one day: (day, first row, row after the last).
Stretch = tuple[int, int, int]


def shard_name(day: int, kind: str) -> str:
    return f"day_{day}_{kind}.npy"


def shard_columns(schema: Schema) -> dict[str, int]:
    """The number of columns of each kind of shard."""
    return {"labels": 1, "dense": len(schema.dense), "sparse": len(schema.categorical)}


def shard_types(kind: str) -> tuple[np.dtype, ...]:
    """The types that a shard may have; TorchRec's first stage writes ids as int64, with the same low bits."""
    return (KINDS[kind], np.dtype(np.int64)) if kind == "sparse" else (KINDS[kind],)


def possible(rows: np.ndarray, kind: str) -> np.ndarray:
    """Which values of some rows of a shard (n, columns) may stand there: bool, (n, columns)."""
    if kind == "labels":
        return (rows == 0) | (rows == 1)
    if kind == "dense":
        return np.isfinite(rows)
    return (rows >= -(2**31)) & (rows < 2**32)  # of int64 ids the low 32 bits are read


def map_shard(path: Path, *, missing: str, remedy: str) -> np.memmap:
    """Map a shard read-only, or raise DataError, which ends with `missing` or, if damaged, with `remedy`.

    A shard that cannot be opened for now is not damaged: the OSError says why.
    """
    try:
        with naming(path):
            return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: {missing}") from None
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: damaged ({error}); {remedy}") from None


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

    dialect: str
    cardinalities: tuple[int, ...]
    exact: bool
    modulus: int | None = None
    min_count: int = 1
    order: str = "first"

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
    """A day of the log: its rows, the sha256 of each shard (without its header), where it comes from."""

    rows: int
    sha256: dict[str, str]
    source: str
    rejected: int = 0


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
    synthetic: dict | None = None
    dictionary_sha256: str | None = None
    # For each feature, for people to read: how many `distinct` values there are, in all days, and estimated
    # from 4096 on. With a dictionary: the `distinct` values of training, how many of them were `kept`, the
    # `rare_rows` of training whose value was not, and the `coverage`, the share of rows that have one of the
    # n most frequent values, by n.
    features: tuple[dict, ...] = ()
    folder: Path = field(default=Path("."), compare=False)

    def rows(self, split: str) -> int:
        """The number of rows of a split."""
        return sum(stop - start for _, start, stop in self.split[split])

    def fingerprint(self) -> str:
        """A short hash of what the columns are and what their values mean; a model accepts no other."""
        meaning: list[str | int | None]
        meaning = [self.schema.fingerprint(), self.dense_transform, self.ids.dialect, self.dictionary_sha256]
        meaning += [self.ids.modulus] if self.ids.modulus is not None else []
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
        return f"{kind}; rows: {sizes}; dense: {self.dense_transform}; ids: {self.ids}; {self.split_note}"

    def save(self, folder: Path) -> None:
        """Write `folder/manifest.json`."""
        data = {"format": FORMAT, "version": VERSION, "schema_fingerprint": self.schema.fingerprint()}
        data |= asdict(self)
        del data["folder"]
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
            data = json.loads(read_text(path))
            if data["format"] != FORMAT or data["version"] != VERSION:
                raise DataError(
                    f"{path}: is {data['format']} version {data['version']}, this program reads {FORMAT} "
                    f"version {VERSION}; prepare the data again"
                )
            schema = Schema.from_json(data["schema"])
            if schema.fingerprint() != data["schema_fingerprint"]:
                raise DataError(f"{path}: the columns do not match their fingerprint; prepare the data again")
            for day, start, stop in (stretch for split in SPLITS for stretch in data["split"][split]):
                if not 0 <= start < stop <= data["days"][day]["rows"]:
                    raise ValueError(f"rows {start} to {stop} of day {day}")
            return cls(
                schema=schema,
                dense_transform=data["dense_transform"],
                ids=Ids(**{**data["ids"], "cardinalities": tuple(data["ids"]["cardinalities"])}),
                days=tuple(Day(**day) for day in data["days"]),
                split={name: tuple(tuple(s) for s in part) for name, part in data["split"].items()},
                split_note=data["split_note"],
                synthetic=data["synthetic"],
                dictionary_sha256=data["dictionary_sha256"],
                features=tuple(data.get("features", ())),
                folder=Path(folder),
            )
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(f"{path}: not a valid manifest ({error!r}); prepare the data again") from None

    def open_shard(self, day: int, kind: str) -> np.memmap:
        """Map one shard read-only; raises DataError if its type or shape is not what the manifest says."""
        path = self.folder / shard_name(day, kind)
        expected = (self.days[day].rows, shard_columns(self.schema)[kind])
        again = "prepare the data again"
        array = map_shard(path, missing=f"missing, though {MANIFEST} lists it; {again}", remedy=again)
        if array.shape != expected or array.dtype not in shard_types(kind):
            raise DataError(
                f"{path}: holds {array.dtype} {array.shape}, {MANIFEST} says {KINDS[kind]} {expected}; "
                "prepare the data again"
            )
        return array
