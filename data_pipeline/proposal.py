"""A guess at the schema of a table from its first rows, as a TOML text for its owner to correct."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import polars as pl

from data_pipeline.columns import INTEGER, NUMBER, head, quote_of
from data_pipeline.schema import DataError

LABELS = {"label", "click", "clicked", "is_click", "target", "y", "liked", "like", "converted", "purchased"}
RATINGS = {"rating", "ratings", "stars", "score"}
# What programs write for a missing value; only if all other values of the column are numbers does it mean so.
NOTHING = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "-", "?", "\\N")
FEW = 32  # up to so many distinct integers are taken for codes rather than counts


class _Look(NamedTuple):
    """What a column looks like.

    kind: dense, or a kind of categorical column (see `Schema`), or None if it cannot be used.
    words: what is told of it in a comment.
    nothing: the texts in it that seem to mean a missing value.
    numbers: its values, if they are numbers, without those that are missing.
    whole: whether no number is missing.
    """

    kind: str | None
    words: str
    nothing: frozenset[str] = frozenset()
    numbers: pl.Series | None = None
    whole: bool = False


def propose(path: Path | str, rows: int) -> str:
    """The text of a schema for a table, guessed from its first `rows` rows.

    Raises DataError if the table cannot be read, is empty, or has no column that can be the label.
    """
    path = Path(path)
    sample = head(path, rows)
    if sample.is_empty():
        raise DataError(f"{path}: empty, there is no row 1; check where the file comes from")
    looks = {column.name: _look(column) for column in sample}
    label, threshold = _label(path, looks)
    nothing = frozenset({""}).union(*(look.nothing for look in looks.values()))
    columns = {name: look for name, look in looks.items() if name != label}
    dense = {name: look for name, look in columns.items() if look.kind == "dense"}
    embedded = {name: look for name, look in columns.items() if look.kind and look.kind != "dense"}
    useless = {name: look for name, look in columns.items() if look.kind is None}
    lines = [
        f"# Guessed from the first {sample.height:,} rows of {path.name}: look it over before you prepare.",
        f"name = {_quoted(path.name.split('.')[0])}",
        "",
        f"label = {_quoted(label)}  # {looks[label].words}",
        *([f"threshold = {threshold!r}  # the label is 1 from this value on, else 0"] if threshold else []),
        *([] if quote_of(path) else ['quote = ""  # quotes are part of the text, not around it']),
        "",
        "# Numbers. The model gets log(max(x, 0) + 1) of each.",
        "dense = [",
        *(f"  {_quoted(name)},  # {look.words}" for name, look in dense.items()),
        "]",
        "dense_missing = 0  # what a missing number becomes",
        f"missing = {json.dumps(sorted(nothing))}  # the texts that mean so, in any column",
        "",
        "# Values to embed: hex (up to 8 digits), integer, or string (hashed).",
        "[categorical]",
        *(f'{_key(name)} = "{look.kind}"  # {look.words}' for name, look in embedded.items()),
        *(f"# left out: {_quoted(name)}, {look.words}" for name, look in useless.items()),
    ]
    return "\n".join(lines) + "\n"


def _look(column: pl.Series) -> _Look:
    if isinstance(column.dtype, pl.Categorical | pl.Enum):
        column = column.cast(pl.String)
    nothing: frozenset[str] = frozenset()
    if column.dtype == pl.String:
        values = column.filter(~column.is_in(NOTHING))
        if not values.str.contains(NUMBER).all():
            values = column.filter(column != "")
            kind = "hex" if values.str.contains("^[0-9a-f]{8}$").all() else "string"
            return _Look(kind, _words(column, values))
        nothing = frozenset(NOTHING) & set(column)
        integer = values.str.contains(INTEGER).all()
    elif column.dtype.is_numeric() or column.dtype == pl.Boolean:
        values = column.drop_nulls()
        integer = not (column.dtype.is_float() or column.dtype.is_decimal())
    else:
        return _Look(None, f"neither number nor text but {column.dtype}")
    numbers = values.cast(pl.Float64).drop_nans()
    if numbers.is_empty():
        return _Look(None, "no value")
    words, whole = _words(column, values), numbers.len() == column.len()
    named = re.search(r"^id$|_id$|[a-z]I[dD]$", column.name)
    if integer and (named or numbers.n_unique() <= FEW):
        return _Look("integer", words, nothing, numbers, whole)
    least, most = numbers.to_numpy().min(), numbers.to_numpy().max()
    words = f"{least:g} to {most:g}, {words}"
    return _Look("dense", words, nothing, numbers, whole)


def _words(column: pl.Series, values: pl.Series) -> str:
    missing = 1 - values.len() / column.len()
    return f"{values.n_unique():,} distinct" + (f", {missing:.1%} missing" if missing else "")


def _label(path: Path, looks: dict[str, _Look]) -> tuple[str, float | None]:
    """The column most likely to be the label, and a threshold if it holds more than 0 and 1.

    That is the first of 0 and 1 that is called like a label; else the first called like a rating; else the
    first of 0 and 1. Raises DataError if there is none.
    """
    whole = {name: look.numbers for name, look in looks.items() if look.numbers is not None and look.whole}
    binary = [name for name, numbers in whole.items() if set(numbers) == {0.0, 1.0}]
    for name in binary:
        if name.lower() in LABELS:
            return name, None
    for name, numbers in whole.items():
        if name.lower() in RATINGS:
            # The threshold at which the share of positive rows comes nearest to one half.
            shares = {value: (numbers >= value).mean() for value in sorted(set(numbers))}
            return name, min(shares, key=lambda value: abs(shares[value] - 0.5))
    if not binary:
        raise DataError(f"{path}: no column is just 0 and 1, or called rating; write a schema by hand")
    return binary[0], None


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _quoted(name)
