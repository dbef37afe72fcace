"""Raw logs in Criteo's format -> chunks of NumPy arrays.

Such a log is text, plain or packed: one row per line, separated by tabs, without a header. A line is a label
(0 or 1), the dense columns (integers, may be negative) and the categorical columns (up to 8 hex digits, so 32
bits). Every value but the label may be missing, that is, empty.

One thread reads blocks of lines and one per core parses them: Polars the integers, hexadecimal.py the rest.
Each block is first parsed as if all its lines were good (`_Layout.parse`). Polars accepts more than the rules
do, such as ` 1` and `+1` for 1, so checks on the whole block refuse these, as well as blocks in which a line
has not the right number of separators. Only the lines of a refused block are looked at one by one, with a
regular expression (`_Layout.good`). Both ways accept exactly the same lines.
"""

import os
import re
from collections.abc import Generator
from contextlib import closing
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from data_pipeline import hexadecimal
from data_pipeline.background import ahead, in_parallel
from data_pipeline.chunk import Chunk, Parsed, Rejected
from data_pipeline.dialects import dense_values
from data_pipeline.formats import NOT_UTF8
from data_pipeline.schema import DataError, Schema
from data_pipeline.text_blocks import TextBlock, count_byte, text_blocks

# So many blocks are parsed at once: one per core, and one more, as they wait for each other. More would take
# memory.
PARSERS = 1 + min(
    len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8
)

# What a field may hold, per kind: a pattern and the same in words. Integers are bounded so that they fit in
# 64 bits; the bound is a power of ten, which can be told from the text as easily as from the value.
LABEL = r"[01]", "0 or 1"
UNREAD = r"[\x0b\f\x0e-\x1f!-*,-\x7f]*", "ASCII without blanks and +"  # a label that is not used
DENSE = r"(?:-?0*[0-9]{1,18})?", "an integer below 10^18"
CATEGORY = r"(?:[0-9a-fA-F]{1,8})?", "a number of up to 8 hex digits"
LARGEST = 10**18 - 1
# A last line without its newline, whose last value lacks some of the digits that Criteo's logs have in each.
CUT = re.compile(rb"(?:\A|[\t\n])[0-9a-fA-F]{1,7}\n\Z")


def read_raw(
    path: Path, schema: Schema, *, labelled: bool | None, dense: str, first_line: int, block_bytes: int
) -> Generator[Parsed, None, None]:
    """Yield, for each block of about `block_bytes` of text, its rows and the lines that break the rules.

    Arguments and errors are those of `logs.read_log`.
    """
    if rules := schema.rules():
        raise DataError(
            f"{path}: a raw log holds integers and hex digits alone, but schema {schema.name} sets "
            f"{', '.join(rules)}; give a table with a header or column names (.csv, .tsv, .parquet, .arrow)"
        )

    def tasks() -> Generator[tuple[_Layout, TextBlock], None, None]:
        layout = None
        with closing(ahead(text_blocks(path, block_bytes), 1)) as blocks:
            for block in blocks:
                if layout is None:
                    label = _has_label(path, block, schema) if labelled is None else labelled
                    layout = _Layout(schema, label, dense, unread=labelled is None)
                if first_line < block.line + block.rows:
                    yield layout, block

    with closing(in_parallel(_parse_block, tasks(), PARSERS)) as parsed:
        yield from parsed


def _parse_block(task: "tuple[_Layout, TextBlock]") -> Parsed:
    """The rows of a block, and the lines that are none."""
    layout, block = task
    line = np.arange(block.line, block.line + block.rows)
    rejected = []
    cut = not block.ended and layout.categorical > 0 and CUT.search(block.text) is not None
    arrays = None if cut else layout.parse(block.text, block.rows)
    if arrays is None:
        texts = block.text.split(b"\n")[:-1]
        good = layout.good(block.text)
        good[-1] &= not cut
        for i in np.flatnonzero(~good):
            number = int(line[i])
            rejected.append(Rejected(number, f"line {number}", layout.explain(texts[i]), texts[i]))
        line = line[good]
        arrays = layout.parse(b"".join(text + b"\n" for text in compress(texts, good)), line.size)
        assert arrays is not None, "the two ways to check a line disagree"
    return Chunk(line, *arrays, block.position), rejected


def _has_label(path: Path, block: TextBlock, schema: Schema) -> bool:
    columns = block.text[: block.text.index(b"\n")].count(b"\t") + 1
    full = len(schema.columns)
    if columns not in (full, full - 1):
        raise DataError(f"{path}, line 1: {columns} columns; give {full}, or {full - 1} if there is no label")
    return columns == full


class _Arrays(NamedTuple):
    """The columns of some rows, as `Chunk` has them."""

    label: np.ndarray | None
    dense: np.ndarray
    clipped: np.ndarray
    ids: np.ndarray


class _Layout:
    """The columns of a log, and the rules for a line: `parse` applies them to blocks, `good` to each line.

    unread: the label may be anything, even missing, and is left out.
    """

    def __init__(self, schema: Schema, labelled: bool, dense: str, unread: bool = False):
        self.reads_label, self.schema, self.transform = labelled and not unread, schema, dense
        label = [schema.label] if labelled else []
        self.rules = dict.fromkeys(label, UNREAD if unread else LABEL)
        self.rules |= dict.fromkeys(schema.dense, DENSE) | dict.fromkeys(schema.categorical, CATEGORY)
        self.pattern = "^" + "\t".join(pattern for pattern, _ in self.rules.values()) + "$"

        self.categorical = len(schema.categorical)
        self.read_as: dict[str, type[pl.DataType]]
        self.read_as = dict.fromkeys(self.rules, pl.String) | dict.fromkeys(schema.dense, pl.Int64)

    def parse(self, text: bytes, rows: int) -> _Arrays | None:
        """The columns of a block of `rows` lines, or None if any line breaks the rules."""
        # These bytes Polars would accept in an integer; tests/test_raw.py tries all bytes.
        if not text.isascii() or any(byte in text for byte in (b" ", b"+", b"\r")):
            return None
        characters = np.frombuffer(text, np.uint8)
        separators = np.concatenate([[-1], np.flatnonzero(characters <= ord("\n"))])
        columns = len(self.rules)
        if separators.size != rows * columns + 1 or count_byte(text, b"\t") != rows * (columns - 1):
            return None
        before, ends = separators[:-1].reshape(rows, columns), separators[1:].reshape(rows, columns)
        if (characters[ends[:, -1]] != ord("\n")).any():
            return None

        label = None
        if self.reads_label:
            label = characters[before[:, 0] + 1] - np.uint8(ord("0"))
            if (label > 1).any() or (ends[:, 0] - before[:, 0] != 2).any():
                return None
            label = label.astype(np.int32)
        first = columns - self.categorical
        ids = hexadecimal.numbers(text, before[:, first:], ends[:, first:])
        if ids is None:
            return None
        if not self.schema.dense:
            nothing = np.empty((rows, 0), np.float32)
            return _Arrays(label, nothing, nothing < 0, ids)
        log = pl.scan_csv(text, separator="\t", has_header=False, quote_char=None, schema=self.read_as)
        try:
            dense = log.select(pl.col(self.schema.dense).fill_null(0)).collect().to_numpy(order="c")
        except pl.exceptions.PolarsError:
            return None
        if len(dense) != rows:
            return None
        if rows and not -LARGEST <= dense.min() <= dense.max() <= LARGEST:
            return None
        return _Arrays(label, *dense_values(self.schema, self.transform, dense), ids)

    def good(self, text: bytes) -> np.ndarray:
        """Which lines of a block keep the rules: (rows,) bool."""
        # What is not UTF-8 becomes a character that no field may hold.
        lines = pl.Series(text.decode(errors="replace").split("\n")[:-1])
        return lines.str.contains(self.pattern).to_numpy()

    def explain(self, line: bytes) -> str:
        """Why a line breaks the rules, or else how it is cut short."""
        if not line:
            return "blank line"
        try:
            fields = line.decode().split("\t")
        except UnicodeDecodeError:
            return NOT_UTF8
        if len(fields) != len(self.rules):
            return f"{len(fields)} columns instead of {len(self.rules)}"
        wrong = (
            f"{name} is {value[:24]!a}, not {words}"
            for value, (name, (pattern, words)) in zip(fields, self.rules.items(), strict=True)
            if not re.fullmatch(pattern, value)
        )
        cut = f"the file ends within a line, perhaps within its last value, {fields[-1]!a}"
        return next(wrong, f"{cut}; if the line is whole, end it with a newline")
