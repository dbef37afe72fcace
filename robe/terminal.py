"""The streams that the program prints to, and what of its surroundings would end it in a traceback.

All of it is put right, or refused in a line, before a command begins.
"""

import codecs
import logging
import os
import shutil
import sys
from typing import TextIO

from robe.errors import RobeError

LEAST_COLUMNS = 20  # with fewer, tyro's lines of help never end
# Characters of help texts that not every terminal can show.
PLAIN = str.maketrans({"\u2022": "*", "\u2026": "..."})
LAYERS = ("default", "safe", "forksafe", "threadsafe", "tbb", "omp", "workqueue")


class SurroundingsError(RobeError):
    """A variable of the environment with which nothing can run."""


def prepare_streams() -> None:
    """Have both output streams take whatever is printed, even if they are closed or know ASCII alone.

    A character that a stream does not know is escaped, as TOML and JSON do; a closed stream takes text for
    nothing.
    """
    codecs.register_error("plain", _plain)
    # Else the next file that is opened would be standard output to a library that prints.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = (_open(stream) for stream in (sys.stdout, sys.stderr))
    if shutil.get_terminal_size().columns < LEAST_COLUMNS:
        os.environ["COLUMNS"] = str(LEAST_COLUMNS)
    # It tells where it keeps its fonts; a figure is the same wherever that is.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def _open(stream: TextIO | None) -> TextIO:
    if stream is None:
        return open(os.devnull, "w")
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="plain")
    return stream


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    if (plain := text.translate(PLAIN)).isascii():
        return plain, error.end
    return codecs.backslashreplace_errors(error)


def require_usable() -> None:
    """Raise SurroundingsError for variables with which Numba or LLVM would end the process."""
    features = os.environ.get("NUMBA_CPU_FEATURES", "")
    if any(feature[0] not in "+-" for feature in features.split(",") if feature):
        raise SurroundingsError(f"NUMBA_CPU_FEATURES={features}: must be like +avx2,-fma; unset it")
    layer = os.environ.get("NUMBA_THREADING_LAYER", "")
    if layer and layer.lower() not in LAYERS:
        raise SurroundingsError(f"NUMBA_THREADING_LAYER={layer}: not one of {', '.join(LAYERS)}; unset it")
