"""A guess at the schema of a table from its first rows, as a TOML text for its owner to correct.

What each column seems to be is guessed by `guesses.py`; here the label is found among them. What is doubtful
stands in a comment beside it. Where more than one column may be the label, none is chosen: a model that
learned to predict another column would look like any other.
"""

import re
import sys
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from data_pipeline import guesses
from data_pipeline.columns import NUMBER, head, no_header, quote_of, times
from data_pipeline.formats import format_of
from data_pipeline.guesses import FEW, NOTHING, TIME_STAMP, Look, listed, quoted, role
from data_pipeline.schema import Bag, DataError
from data_pipeline.stores import located

# What a label is called, the surest names first: it may have these words, and others of BESIDE.
LABELS = (
    {"label", "labels", "target", "y"},
    {"click", "clicked", "clk"},
    guesses.DEEDS,
)
BESIDE = {"is", "has", "was", "did", "user", "ad", "item", "flag", "bool", "label", "target", "y", "final"}
RATINGS = {"rating", "ratings", "stars", "star", "score", "vote", "votes", "overall"}
RATED = {"user", "book", "movie", "item", "product", "review", "my", "the"}
MAYBE = "may be the label"
ALL = sys.maxsize
TOLD = 50  # so many rows of each label with nothing in common are no chance
STEPS = 10  # a column of up to so many numbers may be cut into a label
UNFILLED = (
    "# No name decides which column is the label: take the # from one of these lines. The others may be"
)


class _Label(NamedTuple):
    """A column that may be the label, and the value from which on it is 1, if it holds more than 0 and 1."""

    name: str
    threshold: float | None
    words: str


def propose(path: Path | str, rows: int) -> str:
    """The text of a schema for a table, guessed from its first `rows` rows.

    It has no label where none is sure: `unfilled` tells so.

    Raises DataError if the table cannot be read, is empty, has no header, or no column that can be the label
    or none that can be embedded.
    """
    path = located(path)
    sample = head(path, rows)
    if sample.is_empty():
        raise DataError(f"{path}: empty, there is no row 1; check where the file comes from")
    if format_of(path) in ("csv", "raw"):
        _require_header(path, sample)
    looks = {column.name: guesses.look(column) for column in sample}
    chosen, others = _labels(path, looks)
    looks = _without_outcomes(looks, chosen, others)
    looks = _embedding_something(path, looks)
    dense = {name: look for name, look in looks.items() if look.kind == "dense"}
    embedded = {name: look for name, look in looks.items() if look.kind not in ("dense", None)}
    used = {name: look for name, look in looks.items() if look.kind and not look.left_out}
    marked = {name: look.nothing for name, look in used.items() if look.nothing - {""}}
    bags = {name: look.bag for name, look in used.items() if look.bag}
    negative = {name: _below(look) for name, look in dense.items() if name in used and _below(look)}
    transforms = ", if [transform] names no other" if negative else ""
    markers = ", in columns that [missing_in] does not name" if marked else ""
    file = quoted(path.name)[1:-1]
    lines = [
        f"# Guessed from the first {sample.height:,} rows of {file}: look it over before you prepare.",
        f"name = {quoted(path.name.split('.')[0] or 'table')}",
        "",
        *_label_lines(chosen, others),
        *_split_lines(sample, looks),
        *([] if quote_of(path) else ['quote = ""  # quotes are part of the text, not around it']),
        "",
        f"# Numbers. The model gets log(max(x, 0) + 1) of each{transforms}.",
        "dense = [",
        *(_line(look, f"{quoted(name)},", "  ") for name, look in dense.items()),
        "]",
        "dense_missing = 0  # what a missing number becomes",
        f'missing = [""]  # the texts that mean so{markers}',
        *(["", "[missing_in]"] if marked else []),
        *(f"{_key(name)} = {listed(texts | {''})}" for name, texts in marked.items()),
        *(["", "[transform]  # none leaves a number as it is"] if negative else []),
        *(
            f'{_key(name)} = "none"  # {share:.1%} below 0, which log1p makes 0'
            for name, share in negative.items()
        ),
        "",
        "# Values to embed: hex (up to 8 digits), integer, or string (hashed).",
        "[categorical]",
        *(_line(look, f"{_key(name)} = {_kind(look)}") for name, look in embedded.items()),
        *(f"# left out: {quoted(name)}, {look.words}" for name, look in looks.items() if not look.kind),
        *(
            ["", "# Of these, cells that hold any number of ids; pooling may be sum, mean or max."]
            if bags
            else []
        ),
        *(["[bags]"] if bags else []),
        *(f"{_key(name)} = {_rules(bag)}" for name, bag in bags.items()),
    ]
    return "\n".join(lines) + "\n"


def unfilled(text: str) -> bool:
    """Whether a proposal leaves the label to its reader."""
    return UNFILLED in text


def _require_header(path: Path, sample: pl.DataFrame) -> None:
    """Raise DataError if the first line of a CSV file looks like the others."""
    names = sample.columns
    columns = [column.alias("") for column in sample]
    texts = [column.filter(~column.is_in(NOTHING)) for column in columns]
    numeric = [
        name
        for name, values in zip(names, texts, strict=True)
        if values.len() and values.str.contains(NUMBER).all()
    ]
    numbered = names[names[0] == "" :]
    if len(names) > 2 and numbered == [str(i) for i in range(len(numbered))]:  # Pandas numbers columns so
        return
    found = [name for name in numeric if re.fullmatch(NUMBER, name)]
    if numeric:
        data = bool(found) and all(name in found or name in NOTHING for name in numeric)
    else:
        found = [name for name, values in zip(names, texts, strict=True) if name in set(values)]
        data = 2 * len(found) >= len(names) > 0
    if data:
        raise no_header(path, found[0])


def _labels(path: Path, looks: dict[str, Look]) -> tuple[_Label | None, list[_Label]]:
    """The label, if one is sure, and what else may be it.

    That is the one column that is called like a label, the surest names first; else like a rating; else the
    only column of 0 and 1, unless it is called like a code. Raises DataError if no column may be it.
    """
    usable = {name: look for name, look in looks.items() if look.numbers is not None and name}
    binary = [name for name, look in usable.items() if look.only({0, 1}) and look.distinct == 2]
    tiers = [[name for name in usable if _called(name, names, BESIDE)] for names in LABELS[:2]]
    tiers.append([name for name in binary if _called(name, LABELS[2], BESIDE)])
    tiers.append([name for name in usable if _called(name, RATINGS, RATED)])
    tiers.append([name for name in binary if role(name) != "code"] if len(binary) == 1 else [])
    tier, found = next(((tier, names) for tier, names in enumerate(tiers) if names), (0, []))
    most = (FEW if not binary else 2, 2, 2, ALL, 2)[tier]  # a label of more values is doubted
    if len(found) == 1 and _fits(looks[found[0]], most):
        others = [_candidate(name, looks[name]) for name in binary if name != found[0]]
        return _candidate(found[0], looks[found[0]]), others
    # Probabilities, and numbers of a few steps, become labels by a threshold.
    found = list(dict.fromkeys([*found, *binary])) or [
        name
        for name, look in usable.items()
        if look.kind == "dense" and (_within(look, 0, 1) or look.distinct <= STEPS)
    ]
    if not found:
        remedy = "name the column to predict click or rating, or write a schema by hand"
        raise DataError(f"{path}: no column is just 0 and 1, or called rating; {remedy}{_reasons(looks)}")
    return None, [_candidate(name, looks[name]) for name in found]


def _called(name: str, names: set[str], beside: set[str]) -> bool:
    """Whether a name has one of these words, and but for them only words that may stand beside it."""
    words = guesses.words(name)
    return bool(words & names) and words <= names | beside


def _fits(look: Look, most: int) -> bool:
    """Whether a column has no missing number, and at most so many different ones."""
    assert look.numbers is not None
    return look.numbers.null_count() == 0 and look.distinct <= most


def _candidate(name: str, look: Look) -> _Label:
    assert look.numbers is not None
    words = look.words
    if look.numbers.null_count():
        words += " (prepare refuses such rows, or leaves them out with --bad-rows skip)"
    if set(look.numbers.drop_nulls()) <= {0.0, 1.0}:
        return _Label(name, None, f"{words}, {_share(look.numbers == 1):.1%} are 1")
    # The threshold at which the share of positive rows comes nearest to one half.
    values, counts = np.unique(look.numbers.drop_nulls().to_numpy(), return_counts=True)
    shares = counts[::-1].cumsum()[::-1] / counts.sum()
    return _Label(name, float(values[np.abs(shares - 0.5).argmin()]), words)


def _without_outcomes(looks: dict[str, Look], label: _Label | None, others: list[_Label]) -> dict[str, Look]:
    """The features, with those left out that say what the label says, or happened with it or after it."""
    twins = {one.name for one in others}
    if label is None:
        maybe = {name: look._replace(left_out=look.left_out or MAYBE) for name, look in looks.items()}
        return {name: maybe[name] if name in twins else look for name, look in looks.items()}
    found = {}
    numbers = looks[label.name].numbers
    assert numbers is not None
    positive = numbers >= (1 if label.threshold is None else label.threshold)
    for name, look in looks.items():
        if name == label.name:
            continue
        if look.numbers is not None and not look.left_out:
            look = look._replace(left_out=_outcome(name, look.numbers, positive, name in twins))
        if name in twins and not look.left_out:
            doubt = "0 and 1 too: if it is known only after the click, leave it out"
            look = look._replace(doubts=(*look.doubts, doubt))
        found[name] = look
    return found


def _outcome(name: str, numbers: pl.Series, positive: pl.Series, twin: bool) -> str:
    """Why a column of numbers is known only with the label or after it, in words; "" if it is not.

    positive: the labels as bool; twin: whether the numbers are 0 and 1 alone.
    """
    if _called(name, RATINGS, RATED):
        return "known only with the label, as ratings are"
    if twin and any(_called(name, names, BESIDE) for names in LABELS):
        return "0 and 1 too, and called like what comes with the label or after it"
    return _told(numbers, positive)


def _told(numbers: pl.Series, positive: pl.Series) -> str:
    """How a column alone tells the label, in words; "" if it does not."""
    ones, zeros = numbers.filter(positive), numbers.filter(~positive)
    if min(ones.len(), zeros.len()) < TOLD:
        return ""
    there = ones.len() - ones.null_count(), zeros.len() - zeros.null_count()
    if there in ((ones.len(), 0), (0, zeros.len())):
        return f"there only where the label is {int(there[1] == 0)}"
    if min(there) >= TOLD and (ones.min() > zeros.max() or ones.max() < zeros.min()):  # type: ignore[operator]
        return "tells the label by itself"
    return ""


def _embedding_something(path: Path, looks: dict[str, Look]) -> dict[str, Look]:
    """The columns, with one of codes taken for a category if there is none else, as a model needs one.

    Raises DataError if there is none.
    """
    if any(
        look.kind not in ("dense", None) and (not look.left_out or look.left_out == MAYBE)
        for look in looks.values()
    ):
        return looks
    codes = {
        name: look for name, look in looks.items() if look.code and look.kind == "dense" and not look.left_out
    }
    if not codes:
        raise DataError(
            f"{path}: no column to embed, and a model needs one: codes or texts, not just numbers; add such "
            f"a column, for instance a number cut into classes, or a constant{_reasons(looks)}"
        )
    name = min(codes, key=lambda name: codes[name].distinct)
    doubt = "a number? a model needs something to embed, and this is the nearest to it"
    return looks | {name: codes[name]._replace(kind="integer", doubts=(doubt,))}


def _reasons(looks: dict[str, Look]) -> str:
    """Which columns are left out, and why, as the end of a message."""
    unused = {name: look for name, look in looks.items() if look.left_out or not look.kind}
    reasons = {name: look.left_out or look.words for name, look in unused.items()}
    return "".join(f"; {quoted(name)} is left out: {reason}" for name, reason in reasons.items())


def _within(look: Look, least: float, most: float) -> bool:
    assert look.numbers is not None
    return bool(look.numbers.drop_nulls().is_between(least, most).all())


def _below(look: Look) -> float:
    """The share of the numbers that are below 0."""
    return 0.0 if look.numbers is None else _share(look.numbers < 0)


def _share(found: pl.Series) -> float:
    """The share of a column of bool that is true, of those that are not null."""
    return float(found.drop_nulls().to_numpy().mean())


def _label_lines(chosen: _Label | None, others: list[_Label]) -> list[str]:
    if chosen is not None:
        names = ", ".join(quoted(one.name) for one in others)
        words = chosen.words + (f"; or one of these, which are 0 and 1 too: {names}" if others else "")
        return _as_label(chosen._replace(words=words))
    lines = [UNFILLED, "# features; they are left out below."]
    return [*lines, *(f"# {line}" for one in others for line in _as_label(one))]


def _split_lines(sample: pl.DataFrame, looks: dict[str, Look]) -> list[str]:
    """How the first column of times could split the table, as comments; nothing if there is none."""
    for name, look in looks.items():
        column = sample[name].alias("")  # Polars takes some names for patterns
        time, found = times(pl.col(""), column.dtype), look.numbers
        if not (look.left_out or look.words).startswith(TIME_STAMP) or (found is None and time is None):
            continue
        found = column.to_frame().select(time).to_series() if found is None else found
        found = found.drop_nulls().sort()
        if found.is_empty():
            continue
        two = [found[found.len() * tenths // 10] for tenths in (8, 9)]
        if two[0] < two[1]:
            return [
                "# In place of --split, by time: rows before the first train, and from the second on test.",
                f"# split = {quoted(name)}",
                f"# split_at = [{', '.join(map(_time, two))}]  # behind 80% and 90% of these rows",
            ]
    return []


def _time(time: datetime | float) -> str:
    """A time as TOML has it in `split_at`."""
    if isinstance(time, datetime):
        return quoted(time.isoformat(" ").removesuffix(" 00:00:00"))
    return f"{time:.15g}"


def _as_label(label: _Label) -> list[str]:
    lines = [f"label = {quoted(label.name)}  # {label.words}"]
    if label.threshold is not None:
        lines.append(f"threshold = {label.threshold!r}  # the label is 1 from this value on, else 0")
    return lines


def _line(look: Look, text: str, indent: str = "") -> str:
    """A line of the proposal: as a comment if the column is left out, with what is known of it beside it."""
    words = "; ".join([*([f"left out: {look.left_out}"] if look.left_out else []), look.words, *look.doubts])
    return f"{indent}{'# ' if look.left_out else ''}{text}  # {words}"


def _kind(look: Look) -> str:
    """What [categorical] says of a column."""
    return listed(look.parts) if look.parts else f'"{look.kind}"'


def _rules(bag: Bag) -> str:
    """What [bags] says of a column."""
    rules = [f'pooling = "{bag.pooling}"']
    rules += [f"separator = {quoted(bag.separator)}"] if bag.separator != Bag().separator else []
    rules += ["weights = true"] if bag.weights else []
    return f"{{ {', '.join(rules)} }}"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else quoted(name)
