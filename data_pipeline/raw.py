"""A raw Criteo log -> chunks of NumPy arrays.

The log is text, plain or gzip: one row per line, tab separated, no header. A line is a label (0 or 1), the
dense columns (integers, may be negative) and the categorical columns (up to 8 hex digits, so 32 bits). Every
value but the label may be missing, that is, empty.

The text is read in blocks of whole lines, so memory does not depend on the size of the file; one thread reads
(and unpacks, with ISA-L, 3.5 times as fast as zlib), and one per core parses (`_Layout.parse`): Polars the
integers, hexadecimal.py the rest. Polars is lenient and takes ` 1` and `+1` for 1, so checks on the whole
block refuse that, and blocks of which any line has not the right separators. Only a refused block is looked
at line by line, with one regular expression (`_Layout.good`). Both accept exactly the same lines.
"""

import gzip
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from isal import igzip, isal_zlib

from data_pipeline import hexadecimal
from data_pipeline.dialects import TRANSFORMS
from data_pipeline.schema import CRITEO, DataError, Schema

BLOCK_BYTES = 8 << 20
LONGEST_LINE = 1 << 20
# So many blocks are parsed at once: one per core, and one as they wait for each other. More would take
# memory.
PARSERS = 1 + min(
    len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8
)

GZIP_MAGIC = b"\x1f\x8b"

# What a field may hold, per kind: a pattern and the same in words. Integers are bounded so that they fit in
# 64 bits; the bound is a power of ten, as easily told from the text as from the value.
LABEL = r"[01]", "0 or 1"
DENSE = r"(?:-?0*[0-9]{1,18})?", "an integer below 10^18"
CATEGORY = r"(?:[0-9a-fA-F]{1,8})?", "a number of up to 8 hex digits"
LARGEST = 10**18 - 1

BadRows = Literal["error", "skip"]


@dataclass(frozen=True)
class RawChunk:
    """Some consecutive rows of a log.

    line: (n,) int64, the 1-based line that each row stands on, no header counted; without gaps unless lines
        were rejected.
    label: (n,) int32, or None if the log has no label column.
    dense: (n, number of dense columns) float32, as `dense` says, missing -> 0.
    ids: (n, number of categorical columns) uint32, missing -> 0.
    position: how many bytes of the file, as it lies on disk, have been read so far.
    """

    line: np.ndarray
    label: np.ndarray | None
    dense: np.ndarray
    ids: np.ndarray
    position: int


def read_log(path: Path | str, schema: Schema = CRITEO, **options) -> Iterator[RawChunk]:
    """The rows of a log in any format, by its name: a table (see `tables.py`), or else a raw log.

    Options and errors are those of `read_raw`.
    """
    from data_pipeline.tables import is_table, read_table

    return (read_table if is_table(path) else read_raw)(path, schema, **options)


def read_raw(
    path: Path | str,
    schema: Schema = CRITEO,
    *,
    labelled: bool | None = True,
    bad_rows: BadRows = "error",
    on_reject: Callable[[int, str, bytes], None] | None = None,
    dense: str = "log1p",
    first_line: int = 1,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[RawChunk]:
    """Yield the rows of a log in order; a chunk is what about `block_bytes` of text hold.

    labelled: whether the lines start with a label; None finds out from the first line.
    bad_rows: `error` raises DataError at the first line that breaks the rules; `skip` leaves such lines
        out and hands each to `on_reject(line number, reason, the line without its end)`.
    dense: what becomes of the dense values, a name in dialects.TRANSFORMS.
    first_line: leave out the chunks before the one that holds this line; they are not parsed.

    Raises DataError for a file that is missing, empty, unreadable or damaged, whatever `bad_rows` says.
    """
    path = Path(path)
    if rules := schema.rules():
        raise DataError(
            f"{path}: a raw log holds integers and hex digits alone, but schema {schema.name} sets "
            f"{', '.join(rules)}; give a table with a header or column names (.csv, .tsv, .parquet, .arrow)"
        )
    layout = None

    def parse(block: _Block) -> tuple[RawChunk, list[tuple[int, str, bytes]]]:
        """The rows of a block, and (line, reason, text) of each line that is none."""
        line, rejected = np.arange(block.line, block.line + block.rows), []
        table = layout.parse(block.text, block.rows)
        if table is None:
            texts = block.text.split(b"\n")[:-1]
            good = layout.good(block.text)
            rejected = [(int(line[i]), layout.explain(texts[i]), texts[i]) for i in np.flatnonzero(~good)]
            line = line[good]
            table = layout.parse(b"".join(text + b"\n" for text in compress(texts, good)), line.size)
            assert table is not None, "the two ways to check a line disagree"
        return RawChunk(line, *table, block.position), rejected

    def blocks() -> Iterator[_Block]:
        nonlocal layout
        with closing(ahead(_blocks(path, block_bytes), 1)) as read:
            for block in read:
                if layout is None:
                    label = _has_label(path, block, schema) if labelled is None else labelled
                    layout = _Layout(schema, label, dense)
                if first_line < block.line + block.rows:
                    yield block

    with closing(in_parallel(parse, blocks(), PARSERS)) as parsed:
        for chunk, rejected in parsed:
            for line, reason, text in rejected:
                if bad_rows == "error":
                    remedy = "correct the line, or leave such lines out with --bad-rows skip"
                    raise DataError(f"{path}, line {line}: {reason}; {remedy}")
                if on_reject is not None:
                    on_reject(line, reason, text)
            yield chunk


def matrix(table: pl.DataFrame, columns: tuple[str, ...], dtype) -> np.ndarray:
    """Columns of one type as (rows, columns), row by row; there may be none."""
    if not columns:
        return np.zeros((table.height, 0), dtype)
    return table.select(columns).to_numpy(order="c")


def count_rows(path: Path | str, on_block: Callable[[int], None] | None = None) -> int:
    """Count the rows of a log, good or bad; `on_block(position)` hears how many bytes have been read."""
    from data_pipeline import tables

    if tables.is_table(path):
        return tables.count_rows(path, on_block)
    rows = 0
    for block in ahead(_blocks(Path(path), BLOCK_BYTES), 1):
        rows += block.rows
        if on_block is not None:
            on_block(block.position)
    return rows


class _Block(NamedTuple):
    """Whole lines, each ended by a newline: `rows` of them, the first being line number `line`."""

    text: bytes
    line: int
    rows: int
    position: int


def _blocks(path: Path, block_bytes: int) -> Iterator[_Block]:
    line = 1
    try:
        with path.open("rb") as file:
            stream = igzip.IGzipFile(fileobj=file) if file.peek(2)[:2] == GZIP_MAGIC else file
            while text := stream.read(block_bytes):
                rest = stream.readline(LONGEST_LINE)
                if len(rest) == LONGEST_LINE:
                    raise DataError(f"{path}: a line after line {line} is over 1 MiB; give a click log")
                text += rest
                if not text.endswith(b"\n"):
                    text += b"\n"
                if b"\r" in text:
                    text = text.replace(b"\r\n", b"\n")
                rows = _count(text, b"\n")
                yield _Block(text, line, rows, file.tell())
                line += rows
    except FileNotFoundError:
        raise DataError(f"{path}: not found; check the path") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; name a file") from None
    except (EOFError, gzip.BadGzipFile, isal_zlib.error) as error:
        raise DataError(f"{path}: gzip damaged after line {line - 1} ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"{path}: unreadable after line {line - 1} ({error.strerror}); check it") from None
    if line == 1:
        raise DataError(f"{path}: empty, there is no line 1; check where the file comes from")


def ahead(items: Iterator, depth: int) -> Iterator:
    """The same items, `depth` of them made ahead in a thread, which ends with this iterator."""
    pool = ThreadPoolExecutor(1)
    try:
        pending = deque(pool.submit(next, items, None) for _ in range(depth))
        while (item := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
        items.close()


def in_parallel(function: Callable, items: Iterator, threads: int) -> Iterator:
    """function(item) of each item in order, made in `threads` threads, which end with this iterator."""
    pool = ThreadPoolExecutor(threads)
    pending = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        items.close()


def _count(text: bytes, byte: bytes) -> int:
    """text.count(byte), ten times as fast."""
    values = np.frombuffer(text, np.uint8)
    # In pieces, as NumPy writes the comparison down.
    pieces = (values[start : start + (1 << 16)] for start in range(0, values.size, 1 << 16))
    return int(sum(np.count_nonzero(piece == ord(byte)) for piece in pieces))


def _has_label(path: Path, block: _Block, schema: Schema) -> bool:
    columns = block.text[: block.text.index(b"\n")].count(b"\t") + 1
    full = len(schema.columns)
    if columns not in (full, full - 1):
        raise DataError(f"{path}, line 1: {columns} columns; give {full}, or {full - 1} if there is no label")
    return columns == full


class _Layout:
    """The columns of a log and the rules for a line, stated twice: `parse` for blocks, `good` for lines."""

    def __init__(self, schema: Schema, labelled: bool, dense: str):
        self.labelled, self.transform = labelled, TRANSFORMS[dense]
        label = [schema.label] if labelled else []
        self.rules = dict.fromkeys(label, LABEL)
        self.rules |= dict.fromkeys(schema.dense, DENSE) | dict.fromkeys(schema.categorical, CATEGORY)
        self.pattern = "^" + "\t".join(pattern for pattern, _ in self.rules.values()) + "$"

        self.dense, self.categorical = schema.dense, len(schema.categorical)
        self.read_as = dict.fromkeys(self.rules, pl.String) | dict.fromkeys(schema.dense, pl.Int64)

    def parse(self, text: bytes, rows: int) -> tuple[np.ndarray | None, np.ndarray, np.ndarray] | None:
        """Label, dense and ids of a block of `rows` lines, or None if any line breaks the rules."""
        # Those Polars would not mind in an integer; tests/test_raw.py tries all bytes.
        if not text.isascii() or any(byte in text for byte in (b" ", b"+", b"\r")):
            return None
        characters = np.frombuffer(text, np.uint8)
        separators = np.concatenate([[-1], np.flatnonzero(characters <= ord("\n"))])
        columns = len(self.rules)
        if separators.size != rows * columns + 1 or _count(text, b"\t") != rows * (columns - 1):
            return None
        before, ends = separators[:-1].reshape(rows, columns), separators[1:].reshape(rows, columns)
        if (characters[ends[:, -1]] != ord("\n")).any():
            return None

        label = None
        if self.labelled:
            label = characters[before[:, 0] + 1] - np.uint8(ord("0"))
            if (label > 1).any() or (ends[:, 0] - before[:, 0] != 2).any():
                return None
            label = label.astype(np.int32)
        first = columns - self.categorical
        ids = hexadecimal.numbers(text, before[:, first:], ends[:, first:])
        if ids is None:
            return None
        if not self.dense:
            return label, np.empty((rows, 0), np.float32), ids
        log = pl.scan_csv(text, separator="\t", has_header=False, quote_char=None, schema=self.read_as)
        try:
            dense = log.select(pl.col(self.dense).fill_null(0)).collect().to_numpy(order="c")
        except pl.exceptions.PolarsError:
            return None
        if len(dense) != rows:
            return None
        if rows and not -LARGEST <= dense.min() <= dense.max() <= LARGEST:
            return None
        return label, self.transform(dense), ids

    def good(self, text: bytes) -> np.ndarray:
        """Which lines of a block keep the rules: (rows,) bool."""
        # What is not UTF-8 becomes a character that no field may hold.
        lines = pl.Series(text.decode(errors="replace").split("\n")[:-1])
        return lines.str.contains(self.pattern).to_numpy()

    def explain(self, line: bytes) -> str:
        """Why a line breaks the rules."""
        if not line:
            return "blank line"
        try:
            fields = line.decode().split("\t")
        except UnicodeDecodeError:
            return "not UTF-8 text"
        if len(fields) != len(self.rules):
            return f"{len(fields)} columns instead of {len(self.rules)}"
        return next(
            f"{name} is {value[:24]!a}, not {words}"
            for value, (name, (pattern, words)) in zip(fields, self.rules.items(), strict=True)
            if not re.fullmatch(pattern, value)
        )
