"""A log in any format -> chunks of NumPy arrays.

Tables (Parquet, Arrow, CSV, JSON lines) are read by `columns.py`; all other text is taken for a raw log in
Criteo's format and read by `raw.py`. `formats.py` tells them apart.
"""

import re
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path

from data_pipeline import columns, raw
from data_pipeline.background import ahead
from data_pipeline.chunk import BadRows, Chunk, Rejected
from data_pipeline.columns import SLICE_ROWS
from data_pipeline.formats import DAMAGES, FROM_GBK, NOT_UTF8, format_of, opened
from data_pipeline.partitions import size_of
from data_pipeline.schema import CRITEO, DataError, Schema
from data_pipeline.stores import located
from data_pipeline.text_blocks import BLOCK_BYTES, text_blocks


def read_log(
    path: Path | str,
    schema: Schema = CRITEO,
    *,
    labelled: bool | None = True,
    bad_rows: BadRows = "error",
    on_reject: Callable[[int, str, bytes], None] | None = None,
    dense: str = "log1p",
    first_line: int = 1,
    block_bytes: int = BLOCK_BYTES,
    slice_rows: int = SLICE_ROWS,
) -> Generator[Chunk, None, None]:
    """Yield the rows of a log in order, some at a time.

    labelled: whether the log has the label column. With None it may have one, which is not read; and an error
        names what `predict` has, not `prepare`.
    bad_rows: `error` raises DataError at the first line that breaks the rules; `skip` leaves such lines
        out and hands each to `on_reject(line number, reason, the line without its end)`.
    dense: what becomes of the dense values, a name in dialects.TRANSFORMS.
    first_line: leave out the chunks before the one that holds this line; they are not parsed.
    block_bytes, slice_rows: how much is read at a time, of text, and of Parquet and Arrow files.

    Raises DataError for a file that is missing, empty, unreadable or damaged, whatever `bad_rows` says, and
    for one that lacks a column of the schema.
    """
    path = located(path)
    table = columns.is_table(path, schema)
    if table:
        parsed = columns.read_table(
            path,
            schema,
            labelled=labelled,
            dense=dense,
            first_line=first_line,
            block_bytes=block_bytes,
            slice_rows=slice_rows,
        )
    else:
        parsed = raw.read_raw(
            path, schema, labelled=labelled, dense=dense, first_line=first_line, block_bytes=block_bytes
        )
    with closing(parsed):
        for chunk, rejected in parsed:
            for bad in rejected:
                if bad_rows == "error":
                    remedy = _remedy(bad, table, labelled is not None)
                    raise DataError(f"{path}, {bad.where}: {bad.reason}; {remedy}")
                if on_reject is not None:
                    on_reject(bad.line, bad.reason, bad.text)
            yield chunk


def has_rows(path: Path, schema: Schema) -> bool:
    """Whether a log has any row, good or bad; True as well if it is damaged, of which its reader tells.

    Raises DataError for a file of a format that cannot be read.
    """
    if size_of(path) == 0:
        return False
    if columns.is_binary(path):
        return columns.count_binary(path) > 0
    try:
        with opened(path) as contents:
            if _has_header(path, schema):
                contents.stream.readline()
            return contents.stream.read(1) != b""
    except (OSError, *DAMAGES):
        return True


def _has_header(path: Path, schema: Schema) -> bool:
    """Whether the first line of a text is no row, but names columns."""
    return columns.is_table(path, schema) and format_of(path) != "json"


def _remedy(bad: Rejected, table: bool, preparing: bool) -> str:
    """What to do about a row, as `prepare` can or as `predict` can."""
    words, rows = ("correct it", "rows") if table else ("correct the line", "lines")
    words += " or the schema" * (table and preparing)
    skipped = f"leave such {rows} out" if preparing else f"have no probabilities of such {rows}"
    words += f", or {skipped} with --bad-rows skip"
    if bad.reason == NOT_UTF8:
        return f"{FROM_GBK}; {words}"
    if bad.reason == columns.QUOTES and preparing:
        return f'if quotes are part of the text, write quote = "" in the schema; else {words}'
    if bad.line == 1 and not table and re.search(b"[g-zG-Z]", bad.text):
        remedy = "give its columns with --schema, of which `robe schema FILE` proposes one"
        remedy = remedy if preparing else "it needs all columns that the model was trained on"
        return f"if it is the header of a table, {remedy}; else {words}"
    return words


def count_rows(
    path: Path | str, schema: Schema = CRITEO, on_read: Callable[[int], None] | None = None
) -> int:
    """Count the rows of a log, good or bad, without a header.

    on_read: called now and then with the number of bytes read so far.

    Raises DataError for a file that is missing, empty, unreadable or damaged.
    """
    path = located(path)
    if columns.is_binary(path):
        rows = columns.count_binary(path)
        if on_read is not None:
            on_read(size_of(path) or 0)
        return rows
    rows = -1 if _has_header(path, schema) else 0  # the header is no row
    with closing(ahead(text_blocks(path, BLOCK_BYTES), 1)) as blocks:
        for block in blocks:
            rows += block.rows
            if on_read is not None:
                on_read(block.position)
    return rows
