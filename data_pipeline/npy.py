"""Arrays in .npy files, read without trust: first the header, which is held against the size of the file.

Files are not mapped. The pages of a map would count as memory of this process, and a file that is cut short
meanwhile would kill it.
"""

import math
import os
import weakref
from pathlib import Path

import numpy as np

from data_pipeline.schema import DataError
from data_pipeline.whole_files import remedy

HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
WORDS = (np.dtype(np.uint32), np.dtype(np.int32))  # of the same 32 bits


class NpyFile:
    """A numeric array (rows, ...) in a file, of this `shape` and `dtype`.

    missing, remedy: how the DataError ends for a file that is not there, and for one that is damaged.
    start: where in the file the array begins, with its header.
    """

    def __init__(self, path: Path, *, missing: str, remedy: str, start: int = 0):
        self.path, self.remedy = path, remedy
        if not path.is_file():
            raise DataError(f"{path}: {missing}")
        try:
            with path.open("rb") as file:
                file.seek(start)
                header = HEADERS[np.lib.format.read_magic(file)](file)
                self.offset, size = file.tell(), os.fstat(file.fileno()).st_size
                self.file = os.dup(file.fileno())
        except OSError as error:
            raise self._unreadable(error) from None
        except Exception as error:  # Python's parser reads the header, and raises what it likes
            what = str(error).partition("\n")[0]
            raise DataError(f"{path}: damaged ({what}); {remedy}") from None
        weakref.finalize(self, os.close, self.file)
        self.shape, self.fortran, self.dtype = header
        if not self.shape or min(self.shape) < 0 or self.dtype.hasobject:
            raise DataError(f"{path}: damaged (no numbers in rows: {self.dtype} {self.shape}); {remedy}")
        whole = self.offset + math.prod(self.shape) * self.dtype.itemsize
        if size < whole:
            raise DataError(f"{path}: damaged ({size:,} bytes, not {whole:,}); {remedy}")

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.part(0, len(self)).astype(dtype or self.dtype, copy=False)

    def part(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`, or to the end if there are fewer."""
        rows = np.empty((min(stop, len(self)) - start, *self.shape[1:]), self.dtype)
        self.read(start, rows)
        return rows

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (n, ...), contiguous, with rows from `start` on; safe to call from several threads.

        Labels become float32; ids that are int64 keep their low 32 bits. Raises DataError if the file has
        become shorter.
        """
        if out.size == 0:  # a schema without dense columns
            return
        if self.fortran:  # TorchRec's ids without gaps lie column by column
            column = np.empty(len(out), self.dtype)
            for number, target in enumerate(out.reshape(len(out), -1).T):
                self._fill(column, number * len(self) + start)
                np.copyto(target, column, casting="unsafe")
            return
        as_they_are = out.dtype == self.dtype or {out.dtype, self.dtype} == {*WORDS}
        rows = out if as_they_are else np.empty(out.shape, self.dtype)
        self._fill(rows, start * math.prod(self.shape[1:]))
        if not as_they_are:
            np.copyto(out, rows, casting="unsafe")

    def _fill(self, out: np.ndarray, first: int) -> None:
        """Fill `out`, of this dtype, with the values from number `first` of the file on."""
        room, position = out.reshape(-1).view(np.uint8), self.offset + first * self.dtype.itemsize
        while room.size:
            try:
                read = os.preadv(self.file, [room.data], position)
            except OSError as error:
                raise self._unreadable(error) from None
            if read == 0:
                raise DataError(f"{self.path}: has become shorter; {self.remedy}")
            room, position = room[read:], position + read

    def _unreadable(self, error: OSError) -> DataError:
        return DataError(f"{self.path}: cannot be read ({error.strerror}); {remedy(error)}")
