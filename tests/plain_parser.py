"""The raw format read the slow and obvious way, to compare with, and lines that are hard to read."""

import gzip
import math
from pathlib import Path

import numpy as np

HEX = set("0123456789abcdefABCDEF")
DIGITS = set("0123456789")


def parse(line: bytes, dense: int = 13, categorical: int = 26, labelled: bool = True):
    """A line without its end: (label or None, [log(max(x, 0) + 1), ...], ids), or None if it is malformed."""
    try:
        fields = line.decode("utf-8").split("\t")
    except UnicodeDecodeError:
        return None
    if len(fields) != labelled + dense + categorical:
        return None
    label = fields.pop(0) if labelled else None
    if label not in ("0", "1", None):
        return None
    for text in fields[:dense]:
        digits = text.removeprefix("-")
        if text and (not digits or set(digits) - DIGITS or int(digits) >= 10**18):
            return None
    for text in fields[dense:]:
        if len(text) > 8 or set(text) - HEX:
            return None
    logs = [np.float32(math.log(max(int(text or 0), 0) + 1)) for text in fields[:dense]]
    return label and int(label), logs, [int(text or "0", 16) for text in fields[dense:]]


def lines(rows: int, seed: int) -> list[bytes]:
    """Valid lines of the values that are easily got wrong, most of which come again and again."""
    rng = np.random.default_rng(seed)
    integers = ",,0,-1,-3,1,2,007,-0,1382,65535,4294967296,999999999999999999".split(",")
    ids = ",,0,00000000,ffffffff,FFFFFFFF,80000000,7fffffff,1,a,0a,DEADbeef".split(",")
    new = [f"{value:08x}" for value in rng.integers(2**32, size=5 * rows)]
    return [
        "\t".join([str(rng.integers(2)), *rng.choice(integers, 13), *rng.choice(ids + seen, 26)]).encode()
        for seen in (new[:row] for row in range(rows))
    ]


def write(path: Path, lines: list[bytes]) -> Path:
    """Write lines, as gzip if the name ends so."""
    text = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path
