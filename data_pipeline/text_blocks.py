"""A text file, plain or packed -> blocks of whole lines, so that memory does not depend on its size."""

from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.formats import BOM, DAMAGES, damaged, opened
from data_pipeline.schema import DataError

BLOCK_BYTES = 8 << 20
LONGEST_LINE = 1 << 20


class TextBlock(NamedTuple):
    """Some consecutive lines, each ended by a newline.

    line: the number of the first, from 1 on.
    rows: how many lines there are.
    position: how many bytes of the file, as it lies on disk, have been read so far.
    ended: whether the last of them has a newline in the file too.
    """

    text: bytes
    line: int
    rows: int
    position: int
    ended: bool = True


def text_blocks(path: Path, block_bytes: int) -> Generator[TextBlock, None, None]:
    """Yield the lines of a file in blocks of about `block_bytes`; the ends of lines all become newlines.

    The mark with which some programs begin UTF-8 is left out. Raises DataError if the file is missing, empty,
    unreadable, damaged or of another format, or has a line of over 1 MiB.
    """
    line, packing = 1, None
    try:
        with opened(path) as contents:
            stream, packing = contents.stream, contents.packing
            if contents.head.startswith(BOM):
                stream.read(len(BOM))
            while text := stream.read(block_bytes):
                rest = stream.readline(LONGEST_LINE)
                if len(rest) == LONGEST_LINE:
                    raise DataError(f"{path}: a line after line {line} is over 1 MiB; give a click log")
                text += rest
                if not (ended := text.endswith(b"\n")):
                    text += b"\n"
                if b"\r" in text:
                    text = text.replace(b"\r\n", b"\n")
                rows = count_byte(text, b"\n")
                yield TextBlock(text, line, rows, contents.file.tell(), ended)
                line += rows
    except FileNotFoundError:
        raise DataError(f"{path}: not found; check the path") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; name a file") from None
    except DAMAGES as error:
        raise damaged(path, packing, line - 1, error) from None
    except OSError as error:
        reason = error.strerror or error  # bz2 gives no number, and so no text of the system's
        raise DataError(f"{path}: unreadable after line {line - 1} ({reason}); check it") from None
    if line == 1:
        raise DataError(f"{path}: empty, there is no line 1; check where the file comes from")


def count_byte(text: bytes, byte: bytes) -> int:
    """text.count(byte), ten times as fast."""
    values = np.frombuffer(text, np.uint8)
    # In pieces that stay in the cache, as NumPy stores the comparison.
    pieces = (values[start : start + (1 << 16)] for start in range(0, values.size, 1 << 16))
    return int(sum(np.count_nonzero(piece == ord(byte)) for piece in pieces))
