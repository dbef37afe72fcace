"""A prepared folder -> batches.

The shards are mapped, not loaded, and a pass over them (an epoch) is read window by window:

    block    up to 4096 consecutive rows of one day
    window   64 blocks, with a seed from anywhere in the split; only a few windows are in memory at a time
    batch    the next B rows of the windows laid end to end

With a seed, the blocks are permuted over the whole split, and then the rows within each window. So a batch
draws on 64 places of the log, and each epoch has its own order. It is not a uniform shuffle: rows that stood
together in the log come in the same window. In return the disk is read in long runs, memory does not grow
with the data, and any step can be reached at once.
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.dialects import Dictionary
from data_pipeline.manifest import KINDS, Manifest
from data_pipeline.raw import ahead, read_log
from data_pipeline.schema import DataError
from data_pipeline.torchrec import TRANSFORM

BLOCK_ROWS = 4096
WINDOW_BLOCKS = 64


class Batch(NamedTuple):
    """Rows as the model takes them; the name for a window too, before it is cut."""

    label: np.ndarray  # (B,) float32, 0 or 1
    dense: np.ndarray  # (B, number of dense columns) float32
    ids: np.ndarray  # (B, number of categorical columns) uint32


class Rows:
    """The rows of one split (`train`, `test`, ...) of a prepared folder, or all its rows if `split` is None.

    block_rows, window_blocks: see above; other sizes shuffle to another order.

    Raises DataError if there is no such split, or if a shard of it is missing or not what the manifest says.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str | None,
        *,
        block_rows: int = BLOCK_ROWS,
        window_blocks: int = WINDOW_BLOCKS,
    ):
        if split is None:
            stretches = [(number, 0, day.rows) for number, day in enumerate(manifest.days)]
        elif split in manifest.split:
            stretches = manifest.split[split]
        else:
            raise DataError(f"{manifest.folder}: has no split {split!r}; it has {', '.join(manifest.split)}")
        self.count = sum(stop - start for _, start, stop in stretches)
        self.window_blocks = window_blocks
        # (number of blocks, 3) int64: day, first row, row after the last.
        self._blocks = np.array(
            [
                (day, block, min(block + block_rows, stop))
                for day, start, stop in stretches
                for block in range(start, stop, block_rows)
            ],
            np.int64,
        ).reshape(-1, 3)
        self._shards = {
            day: [np.asarray(manifest.open_shard(day, kind)) for kind in KINDS] for day, _, _ in stretches
        }

    def steps(self, batch_size: int) -> int:
        """The number of batches in an epoch; the last may be short."""
        return -(-self.count // batch_size)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        epoch: int = 0,
        start_step: int = 0,
        prefetch: int = 2,
    ) -> Iterator[Batch]:
        """Yield every row once, in batches of `batch_size` rows; only the last may be shorter.

        seed: None gives the order of the log; else the order is drawn from (seed, epoch), and is the same
            on every machine and with every version of NumPy.
        start_step: leave out that many batches, without reading the windows that they came from. What is
            left is, bit for bit, the rest of the full epoch.
        prefetch: how many batches, and one window besides, are made ahead in threads; 0 makes none and uses
            no thread. Errors appear here, and closing the iterator ends the threads.
        """
        if batch_size < 1 or start_step < 0 or prefetch < 0:
            raise ValueError(f"{batch_size=}, {start_step=}, {prefetch=}: must be at least 1, 0 and 0")
        windows = self._windows(seed, epoch, start_step * batch_size)
        if prefetch == 0:
            return _cut(windows, batch_size)
        # Two stages: were a window read only once the batches run short, all would have to wait for it.
        return ahead(_cut(ahead(windows, 1), batch_size), prefetch)

    def _windows(self, seed: int | None, epoch: int, skip: int) -> Iterator[Batch]:
        """The windows of an epoch, less its first `skip` rows."""
        blocks = self._blocks
        if seed is not None:
            blocks = blocks[_permutation(len(blocks), seed, epoch)]
        for number, first in enumerate(range(0, len(blocks), self.window_blocks)):
            window = blocks[first : first + self.window_blocks]
            rows = int((window[:, 2] - window[:, 1]).sum())
            if skip < rows:
                order = np.arange(rows) if seed is None else _permutation(rows, seed, epoch, number)
                yield self._read(window, order[skip:])
            skip = max(skip - rows, 0)

    def _read(self, window: np.ndarray, order: np.ndarray) -> Batch:
        """The rows of the blocks (n, 3) in `window`, put in order."""
        # Whole blocks are copied first: row by row, the gather would jump about on the disk.
        label, dense, ids = (
            np.concatenate([self._shards[day][kind][start:stop] for day, start, stop in window.tolist()])
            for kind in range(3)
        )
        # Ids that are int64 keep their low 32 bits.
        return Batch(label[order, 0].astype(np.float32), dense[order], ids.astype(np.uint32)[order])


def raw_batches(path: Path | str, manifest: Manifest, batch_size: int) -> Iterator[Batch]:
    """The rows of a log as batches, in order, with the ids that the folder of `manifest` gives them.

    The log, raw or a table, may lack the label column; the labels are then NaN. Raises DataError for a log
    that is not whole.
    """
    if manifest.dense_transform == TRANSFORM:
        raise DataError(
            f"{path}: TorchRec's folders, of which the model learned, do not say how they are made of a log; "
            "give such a folder"
        )
    dictionary = Dictionary.load(manifest) if manifest.ids.dialect == "dictionary" else None

    def windows():
        for chunk in read_log(path, manifest.schema, labelled=None):
            label = np.full(len(chunk.ids), np.nan) if chunk.label is None else chunk.label
            ids = chunk.ids if dictionary is None else dictionary.encode(chunk.ids)
            yield Batch(label.astype(np.float32), chunk.dense, ids)

    return _cut(windows(), batch_size)


def _permutation(n: int, seed: int, *place: int) -> np.ndarray:
    """A permutation of 0 ... n-1 that depends on the arguments only, not on the version of NumPy.

    NumPy promises the same raw words for ever, but not the same shuffles.
    """
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=place)).random_raw(n)
    return np.argsort(words, kind="stable")


def _cut(windows: Iterator[Batch], size: int) -> Iterator[Batch]:
    """Windows, laid end to end and cut to batches of `size` rows; the last may be shorter."""
    with closing(windows):
        rest = None
        for window in windows:
            if rest is not None:
                window = Batch(*map(np.concatenate, zip(rest, window, strict=True)))
            whole = len(window.label) // size * size
            for start in range(0, whole, size):
                yield Batch(*(array[start : start + size] for array in window))
            rest = Batch(*(array[whole:] for array in window))
        if rest is not None and len(rest.label) > 0:
            yield rest
