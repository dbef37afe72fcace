"""A log in any format -> chunks of NumPy arrays. The name of the file tells the format.

Tables (.parquet, .arrow, .csv, ...) are read by `columns.py`; all other files are taken for raw logs in
Criteo's format and read by `raw.py`.
"""

from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Literal

from data_pipeline import columns, raw
from data_pipeline.background import ahead
from data_pipeline.chunk import Chunk
from data_pipeline.columns import SLICE_ROWS
from data_pipeline.schema import CRITEO, DataError, Schema
from data_pipeline.text_blocks import BLOCK_BYTES, text_blocks

BadRows = Literal["error", "skip"]


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

    labelled: whether the log has the label column; None finds out.
    bad_rows: `error` raises DataError at the first line that breaks the rules; `skip` leaves such lines
        out and hands each to `on_reject(line number, reason, the line without its end)`.
    dense: what becomes of the dense values, a name in dialects.TRANSFORMS.
    first_line: leave out the chunks before the one that holds this line; they are not parsed.
    block_bytes, slice_rows: how much is read at a time, of text, and of Parquet and Arrow files.

    Raises DataError for a file that is missing, empty, unreadable or damaged, whatever `bad_rows` says, and
    for one that lacks a column of the schema.
    """
    path = Path(path)
    if columns.is_table(path):
        remedy = "correct it or the schema, or leave such rows out with --bad-rows skip"
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
        remedy = "correct the line, or leave such lines out with --bad-rows skip"
        parsed = raw.read_raw(
            path, schema, labelled=labelled, dense=dense, first_line=first_line, block_bytes=block_bytes
        )
    with closing(parsed):
        for chunk, rejected in parsed:
            for bad in rejected:
                if bad_rows == "error":
                    raise DataError(f"{path}, {bad.where}: {bad.reason}; {remedy}")
                if on_reject is not None:
                    on_reject(bad.line, bad.reason, bad.text)
            yield chunk


def count_rows(path: Path | str, on_read: Callable[[int], None] | None = None) -> int:
    """Count the rows of a log, good or bad, without a header.

    on_read: called now and then with the number of bytes read so far.

    Raises DataError for a file that is missing, empty, unreadable or damaged.
    """
    path = Path(path)
    if columns.is_binary(path):
        rows = columns.count_binary(path)
        if on_read is not None:
            on_read(path.stat().st_size)
        return rows
    rows = -1 if columns.is_table(path) else 0  # the header is no row
    with closing(ahead(text_blocks(path, BLOCK_BYTES), 1)) as blocks:
        for block in blocks:
            rows += block.rows
            if on_read is not None:
                on_read(block.position)
    return rows
