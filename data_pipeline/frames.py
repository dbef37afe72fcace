"""Tables in memory -> what a model takes, with the schema, the transforms and the ids of a prepared folder.

A row becomes bit for bit what it would become if it were read from a file (`batches.raw_batches`).
"""

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import polars as pl

from data_pipeline.bags import Column, IdsOfRows, of_columns
from data_pipeline.batches import require_recipe
from data_pipeline.columns import Values, frame_reader, matrix
from data_pipeline.dialects import dense_values, encoder, scaler
from data_pipeline.formats import SUFFIXES
from data_pipeline.manifest import Manifest
from data_pipeline.schema import DataError

TABLE = Path("the table")  # what errors call it


class RowReader:
    """Reads rows as the folder of `manifest` has them; its dictionary, if there is one, is loaded once.

    Raises DataError for a folder of TorchRec's, which does not say how it was made.
    """

    def __init__(self, manifest: Manifest):
        require_recipe(manifest, TABLE)
        self.schema, self.transform = manifest.schema, manifest.dense_transform
        self.encode, self.read = encoder(manifest), frame_reader(manifest.schema, TABLE)
        self.scale = scaler(self.schema, self.transform, manifest.measured)

    def rows(self, table: Any) -> tuple[np.ndarray, IdsOfRows]:
        """A table of n rows -> dense (n, number of dense columns) float32, ids (n, F) uint32 or bags.

        table: of Polars, pandas or Arrow, or a dict of arrays (n,) by name; other columns are passed over.
        Raises DataError that names a missing column, or the first row and column with a bad value.
        """
        values = self._values(to_frame(table), (*self.schema.dense, *self.schema.categorical))
        numbers = matrix(values.flat, self.schema.dense, np.float64)
        dense, _ = dense_values(self.schema, self.transform, numbers)
        return self.scale(dense), self.encode(values.ids(self.schema))

    def ids(self, feature: str, values: Any) -> IdsOfRows:
        """Values (n,) of one categorical column, as a log has them -> ids (n, F), 0 in all other columns.

        Where the schema has bags, bags of n rows, those of all other columns empty.
        """
        if feature not in self.schema.categorical:
            raise DataError(
                f"{feature!r}: not a categorical column; there are {', '.join(self.schema.categorical)}"
            )
        column = self.schema.times.get(feature, feature)
        found = self._values(to_frame({column: values}), (feature,))
        if self.schema.bags:
            bags = found.column(feature)
            empty = Column(np.empty(0, np.uint32), np.zeros_like(bags.lengths))
            columns = [bags if name == feature else empty for name in self.schema.categorical]
            return self.encode(of_columns(columns, self.schema.weighted()))
        raw = np.zeros((found.flat.height, len(self.schema.categorical)), np.uint32)
        index = self.schema.categorical.index(feature)
        raw[:, index] = found.flat[feature].to_numpy()
        ids = np.zeros_like(raw)
        ids[:, index] = self.encode(raw)[:, index]
        return ids

    def _values(self, frame: pl.DataFrame, names: tuple[str, ...]) -> Values:
        """The named columns: numbers float64, missing ones filled in, and the raw 32 bits of categories."""
        columns = {name: self.schema.times.get(name, name) for name in names}
        if missing := [column for column in columns.values() if column not in frame.columns]:
            raise DataError(
                f"{TABLE}: has no column {missing[0]!r}, but {', '.join(frame.columns)[:200]!r}; give all "
                "columns that the model was trained on"
            )
        return self.read(frame.select(pl.col(column).alias(name) for name, column in columns.items()))


def number_writer(path: Path, name: str) -> Callable[[BinaryIO, Iterator[np.ndarray]], None] | None:
    """What writes parts of a column of numbers as Parquet or Arrow, as the path asks for; None for text.

    NaN becomes a missing value. All numbers are in memory until the end.
    """
    form = SUFFIXES.get(path.suffix.lower(), "raw")
    if form not in ("parquet", "arrow"):
        return None

    def written(file: BinaryIO, parts: Iterator[np.ndarray]) -> None:
        numbers = pl.Series(name, np.concatenate([np.empty(0), *parts])).fill_nan(None)
        packed = io.BytesIO()  # Polars would hide why a write failed
        table = pl.DataFrame([numbers])
        table.write_parquet(packed) if form == "parquet" else table.write_ipc(packed)
        file.write(packed.getbuffer())

    return written


def to_frame(table: Any) -> pl.DataFrame:
    """A Polars, pandas or Arrow table, or a dict of arrays, as a Polars frame; DataError for others."""
    if isinstance(table, Mapping):
        columns = [_polars(f"{TABLE}, column {name}", pl.Series, name, part) for name, part in table.items()]
        # What is all missing has no type.
        return _polars(TABLE, pl.DataFrame, columns).cast({pl.Null: pl.String})
    if isinstance(table, pl.LazyFrame):
        table = _polars(TABLE, table.collect)
    if isinstance(table, pl.DataFrame):
        return table
    if hasattr(table, "__arrow_c_stream__"):
        return _polars(TABLE, pl.DataFrame, table)
    raise DataError(
        f"{TABLE}: must be of Polars, pandas or Arrow, or a dict of arrays, not a {type(table).__name__}"
    )


def _polars(what: Path | str, make: Callable[..., Any], *arguments: Any) -> Any:
    """What Polars makes of the arguments; a DataError of one line that names them where it refuses."""
    try:
        return make(*arguments)
    except ImportError:
        raise DataError(f"{what}: pandas hands it over by PyArrow; pip install pyarrow") from None
    except (pl.exceptions.PolarsError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{what}: cannot be read ({str(error).partition(chr(10))[0]}); correct it") from None
