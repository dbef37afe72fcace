"""A first guess at the schema of a table, from a sample of it, as TOML to be corrected by who knows the data."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import polars as pl

from data_pipeline.schema import DataError
from data_pipeline.tables import INTEGER, NUMBER, head

LABELS = {"label", "click", "clicked", "is_click", "target", "y", "liked", "like", "converted", "purchased"}
RATINGS = {"rating", "ratings", "stars", "score"}
# What programs write for no value. Words only count as such in a column whose other values are numbers.
NOTHING = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "-", "?", "\\N")
FEW = 32  # so few distinct integers are codes rather than counts


class _Look(NamedTuple):
    """What a column looks like: `kind` is dense, one of the schema's kinds, or None for of no use."""

    kind: str | None
    words: str
    nothing: set[str]
    numbers: pl.Series | None


def propose(path: Path | str, rows: int) -> str:
    """The text of a schema for a table, guessed from its first rows; raises DataError if there is no label."""
    path = Path(path)
    sample = head(path, rows)
    looks = {column.name: _look(column) for column in sample}
    label, threshold = _label(path, looks)
    kinds = {name: look.kind for name, look in looks.items() if name != label}
    nothing = {text for look in looks.values() for text in look.nothing}

    def listed(name: str) -> str:
        return f"  {json.dumps(name, ensure_ascii=False)},  # {looks[name].words}"

    lines = [
        f"# Guessed from the first {sample.height:,} rows of {path.name}: look it over before you prepare.",
        f"name = {json.dumps(path.name.split('.')[0], ensure_ascii=False)}",
        "",
        f"label = {json.dumps(label, ensure_ascii=False)}  # {looks[label].words}",
        *([f"threshold = {threshold:g}  # the label is 1 from this value on, else 0"] if threshold else []),
        "",
        "# Numbers. The model gets log(max(x, 0) + 1) of each.",
        "dense = [",
        *(listed(name) for name, kind in kinds.items() if kind == "dense"),
        "]",
        "dense_missing = 0  # what a missing number becomes",
        f"missing = {json.dumps(sorted(nothing | {''}))}  # the texts that mean a missing value, in any column",
        "",
        "# Values to embed: hex (up to 8 digits), integer, or string (hashed).",
        "[categorical]",
        *(
            f"{_key(name)} = {json.dumps(kind)}  # {looks[name].words}"
            for name, kind in kinds.items()
            if kind not in ("dense", None)
        ),
        *(f"# left out: {_key(name)}, {looks[name].words}" for name, kind in kinds.items() if kind is None),
    ]
    return "\n".join(lines) + "\n"


def _look(column: pl.Series) -> _Look:
    text = column.cast(pl.String) if isinstance(column.dtype, pl.Categorical | pl.Enum) else column
    nothing = set()
    if text.dtype == pl.String:
        rest = text.filter(~text.is_in(NOTHING))
        if rest.len() and rest.str.contains(NUMBER).all():
            nothing = set(text.unique()) & set(NOTHING)
            whole = rest.str.contains(INTEGER).all()
        else:
            rest, whole = text.filter(text != ""), False
            if rest.len() and rest.str.contains("^[0-9a-f]{8}$").all():
                return _Look("hex", _words(column, rest), nothing, None)
            return _Look("string" if rest.len() else None, _words(column, rest), nothing, None)
        numbers = rest.cast(pl.Float64)
    elif text.dtype.is_numeric() or text.dtype == pl.Boolean:
        rest = text.drop_nulls()
        numbers = rest.cast(pl.Float64).drop_nans()
        whole = text.dtype.is_integer() or text.dtype == pl.Boolean
    else:
        return _Look(None, f"neither number nor text, but {text.dtype}", nothing, None)
    if not numbers.len():
        return _Look(None, "no value in the sample", nothing, None)
    named = re.search(r"(^|_)id$|[a-z]I[dD]$", column.name, re.IGNORECASE if "_" in column.name else 0)
    kind = "integer" if whole and (named or rest.n_unique() <= FEW) else "dense"
    words = _words(column, rest)
    if kind == "dense":
        words = f"{numbers.min():g} to {numbers.max():g}, {words}"
    return _Look(kind, words, nothing, numbers)


def _words(column: pl.Series, rest: pl.Series) -> str:
    distinct, missing = rest.n_unique(), 1 - rest.len() / max(column.len(), 1)
    own = ", each row its own" if distinct == column.len() > 1 else ""
    return f"{distinct:,} distinct{own}" + (f", {missing:.2g} missing" if missing else "")


def _label(path: Path, looks: dict[str, _Look]) -> tuple[str, float | None]:
    """The column that is most likely the label, and from which value on it is 1 if it is more than 0 and 1."""
    whole = {
        name: look.numbers for name, look in looks.items() if look.numbers is not None and not look.nothing
    }
    binary = [name for name, numbers in whole.items() if set(numbers.unique()) == {0.0, 1.0}]
    for name in binary:
        if name.lower() in LABELS:
            return name, None
    for name, numbers in whole.items():
        if name.lower() in RATINGS:
            # The value that comes nearest to parting the rows in two.
            return name, min(numbers.unique().sort(), key=lambda value: abs((numbers >= value).mean() - 0.5))
    if not binary:
        raise DataError(
            f"{path}: no column holds just 0 and 1, or is called rating; name the label in a schema"
        )
    return binary[0], None


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)
