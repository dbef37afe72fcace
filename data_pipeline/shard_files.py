"""Writing shards, and the columns of values that wait for their dictionary, piece by piece."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from data_pipeline.appearing import partial_name
from data_pipeline.background import behind
from data_pipeline.bags import IdsOfRows
from data_pipeline.manifest import shard_type
from data_pipeline.npy import NpyFile
from data_pipeline.schema import DataError
from data_pipeline.whole_files import naming, new_file

HEADER_BYTES = 128
PIECE = 1 << 22  # so many values are in memory at a time

# Appends rows (n, columns) to one or more files.
Append = Callable[[np.ndarray], None]


@contextmanager
def new_shard(path: Path, kind: str, sha256: dict[str, str]) -> Iterator[Append]:
    """A function that appends rows to a new .npy file of this kind.

    At the end of the `with` block the file gets its name, and sha256[kind] becomes the hash of its rows. Only
    then is their number known, so the header is written last, into the space left for it.
    """
    digest, shape = hashlib.sha256(), [0, 0]
    with new_file(path, partial_name(path)) as file:
        file.write(bytes(HEADER_BYTES))

        def write(rows: np.ndarray) -> None:
            file.write(rows.data)
            digest.update(rows.data)
            shape[:] = shape[0] + len(rows), rows.shape[1]

        with behind(write) as append:
            yield append
        file.seek(0)
        header = {"descr": shard_type(kind).str, "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(file, header)
        assert file.tell() == HEADER_BYTES
    sha256[kind] = digest.hexdigest()


def load_array(path: Path) -> np.ndarray:
    """What `save_array` wrote; raises DataError if it is not whole."""
    remedy = f"remove {path.parent} to begin again"
    array = NpyFile(path, missing=f"missing; {remedy}", remedy=remedy)
    return array.part(0, len(array))


@contextmanager
def new_columns(paths: list[Path]) -> Iterator[Callable[[IdsOfRows], None]]:
    """A function that appends the ids of each column of its rows to a file of its own, as plain numbers.

    The files get their names at the end of the `with` block.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(new_file(path, partial_name(path))) for path in paths]

        def write(rows: IdsOfRows) -> None:
            columns = (
                np.ascontiguousarray(rows.T) if isinstance(rows, np.ndarray) else rows.columns(len(files))
            )
            for file, column in zip(files, columns, strict=True):
                file.write(column.data)

        with behind(write) as append:
            yield append


def save_array(path: Path, array: np.ndarray) -> None:
    """Write what `np.save` would to a file that appears whole.

    NumPy writes past Python, and does not tell why a write failed.
    """
    array = np.ascontiguousarray(array)
    with new_file(path, partial_name(path)) as file:
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.data)


def read_column(path: Path, start: int, stop: int) -> Iterator[np.ndarray]:
    """Yield values `start` to `stop` of a column, in pieces (n,) uint32 of up to PIECE values.

    Raises DataError if the file has fewer.
    """
    for first in range(start, stop, PIECE):
        piece = np.empty(min(PIECE, stop - first), np.uint32)
        with path.open("rb") as file, naming(path):
            file.seek(4 * first)
            if file.readinto(piece.data) < piece.nbytes:
                raise DataError(f"{path}: damaged; remove {path.parent} to begin again")
        yield piece
