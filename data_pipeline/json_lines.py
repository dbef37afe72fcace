"""Lines that are JSON objects -> columns. A value is its text, as in a CSV file; a list stays one.

Keys may stand in any order, and one that a line lacks is a missing value there, as null is. Polars parses
blocks of lines; only where it refuses one, lines are looked at one by one.
"""

import io
from typing import Any

import msgspec
import polars as pl

TEXT = pl.String()
TEXTS = pl.List(TEXT)
MIXED = "a list where others have a text or a number, or the other way round"


class JsonLines:
    """What the keys of some lines first hold, and so what those of all lines have to.

    types: a text, a list of texts, or a list of objects, by key.
    """

    def __init__(self, text: bytes):
        self.types: dict[str, pl.DataType] = {}
        unset = pl.Null()
        for line in text.split(b"\n"):
            found, _ = _object(line)
            for name, value in (found or {}).items():
                known, kind = self.types.setdefault(name, unset), _type(value)
                if (known == unset and value is not None) or (known == TEXTS and kind != TEXT):
                    self.types[name] = kind
        self.types = {name: TEXT if kind == unset else kind for name, kind in self.types.items()}

    def parse(self, lines: list[bytes], names: list[str]) -> tuple[pl.DataFrame, dict[int, str]]:
        """The values of these keys, and index -> reason of each line that is none and has no row."""
        schema = {name: self.types[name] for name in names}
        if (frame := _frame(lines, schema)) is not None:
            return frame, {}
        reasons = {i: reason for i, line in enumerate(lines) if (reason := _object(line)[1])}
        frames = [pl.DataFrame(schema=schema)]

        def halve(rest: list[int]) -> None:
            if (frame := _frame([lines[i] for i in rest], schema)) is not None:
                frames.append(frame)
            elif len(rest) == 1:
                reasons[rest[0]] = MIXED
            else:
                halve(rest[: len(rest) // 2])
                halve(rest[len(rest) // 2 :])

        if good := [i for i in range(len(lines)) if i not in reasons]:
            halve(good)
        return pl.concat(frames), reasons


def _frame(lines: list[bytes], schema: dict[str, pl.DataType]) -> pl.DataFrame | None:
    """A row of each line, or None if one of them is none."""
    try:
        frame = pl.read_ndjson(io.BytesIO(b"\n".join(lines)), schema=schema)
    except pl.exceptions.PolarsError:
        return None
    if frame.height != len(lines):  # Polars passes over blank lines
        return None
    for name in (name for name, kind in schema.items() if kind == TEXT):
        # Polars makes a text of a list or an object.
        texts = frame[name].alias("")  # Polars takes some names for patterns
        nested = texts.str.starts_with("[") | texts.str.starts_with("{")
        for line in nested.arg_true():
            if isinstance((_object(lines[line])[0] or {}).get(name), list | dict):
                return None
    return frame


def _object(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """The object that a line is; or None, and why it is none."""
    if not line.strip():
        return None, "blank line"
    try:
        found = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return None, f"not a JSON object ({error})"
    return (found, "") if isinstance(found, dict) else (None, "JSON, but not an object")


def _type(value: Any) -> pl.DataType:
    if isinstance(value, list):
        return pl.List(next((_type(part) for part in value if isinstance(part, dict)), TEXT))
    if isinstance(value, dict):  # in a list of ids with weights: the id, then the weight
        return pl.Struct({name: pl.Float64() if i else TEXT for i, name in enumerate(value)})
    return TEXT
