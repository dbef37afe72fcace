"""Which rows train, which validate, which test."""

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise

from data_pipeline.manifest import Stretch
from data_pipeline.schema import DataError, Schema

HALVES = {
    "mlperf": ("test", "validation", "as MLPerf v1, unlike TorchRec"),
    "torchrec": ("validation", "test", "as TorchRec, unlike MLPerf v1"),
    "kaggle": ("test", "validation", "of 7 equal blocks, as DLRM does with Criteo Kaggle"),
}
# Of a schema with a `split`: its three days, as `schema.SPLIT_DAYS` numbers them.
BY_COLUMN = "validation=1,test=2"
DAYS = re.compile(r"(test|validation)=(\d+)(?:-(\d+))?")


def halves_of(how: str) -> tuple[str, str] | None:
    """The splits that the two halves of the last day are; None if `how` does not halve it."""
    return HALVES[how][:2] if how in HALVES else None


def split_words(schema: Schema) -> tuple[str, str, str]:
    """Which rows of a log each day of BY_COLUMN has, in words."""
    if schema.split_at is not None:
        first, second = (at if isinstance(at, str) else f"{at:.15g}" for at in schema.split_at)
        told = f"rows whose {schema.split} is"
        return f"{told} before {first}", f"{told} from {first} to before {second}", f"{told} from {second} on"
    train, validation, test = (
        f"rows whose {schema.split} is {name}" for name in ("train", "validation", "test")
    )
    return train, validation, test


def training_days(count: int, how: str) -> tuple[int, ...]:
    """Which of so many days train; raises DataError where that is known only once their rows are counted."""
    if how not in HALVES and "=" not in how:
        raise DataError(
            f"--keep-negatives: has to know which days train before they are read, and --split {how} tells "
            "it only afterwards; name days to test and to validate, as --split test=5,validation=6"
        )
    parts, _ = split([10**6] * count, how)
    return tuple(day for day, _, _ in parts["train"])


def split(days: Sequence[int], how: str = "mlperf") -> tuple[dict[str, tuple[Stretch, ...]], str]:
    """Decide which rows train, which validate and which test.

    days: the number of rows of each day.
    how:
        mlperf     the first half of the last day tests, the second validates; the other days train.
        torchrec   as mlperf, but the first half validates, the second tests.
        kaggle     as mlperf, and there must be 7 days that are equal to within a row.
        0.8,0.1,0.1   shares of all rows in the order of the log: to train, to validate, to test.
        test=5,validation=6   these days (from 0; also ranges, as 20-22); all others train.

    Returns the stretches of `train`, `test` and `validation`, and a note that says in words which they are.
    Raises DataError if a part would have no row, or `how` is none of these.
    """
    if how in HALVES:
        parts, note = _halves(days, how)
    elif re.fullmatch(r"[\d.]+,[\d.]+,[\d.]+", how):
        parts, note = _shares(days, how)
    elif all(DAYS.fullmatch(part) for part in how.split(",")):
        parts, note = _days(days, how)
    else:
        raise DataError(
            f"--split {how}: give {', '.join(HALVES)}, or shares to train, validate and test "
            "(0.8,0.1,0.1), or days (test=5,validation=6)"
        )
    for name in ("train", "test", "validation"):
        if not parts[name]:
            raise DataError(f"--split {how}: leaves no row to {name} of days of {list(days)} rows; give more")
    return {name: tuple(parts[name]) for name in ("train", "test", "validation")}, note


def _halves(days: Sequence[int], how: str) -> tuple[dict[str, list[Stretch]], str]:
    first, second, words = HALVES[how]
    if how == "kaggle" and (len(days) != 7 or max(days) - min(days) > 1):
        raise DataError(
            f"--split kaggle: is of 7 equal days, not of {list(days)} rows; give one file and --blocks 7"
        )
    last = len(days) - 1
    half = (days[last] + 1) // 2
    parts = {
        "train": [(day, 0, rows) for day, rows in enumerate(days[:last]) if rows],
        first: [(last, 0, half)] if half else [],
        second: [(last, half, days[last])] if half < days[last] else [],
    }
    return parts, f"{first} is the first half of the last day, {second} the second ({words})"


def _shares(days: Sequence[int], how: str) -> tuple[dict[str, list[Stretch]], str]:
    try:
        shares = [float(share) for share in how.split(",")]
    except ValueError:
        shares = [0.0]
    if abs(sum(shares) - 1) > 1e-9:
        raise DataError(f"--split {how}: three shares must add up to 1, as 0.8,0.1,0.1 do")
    total = sum(days)
    ends = [0, round(total * shares[0]), round(total * (shares[0] + shares[1])), total]
    starts = list(accumulate(days, initial=0))
    names = ("train", "validation", "test")
    parts = {
        name: [
            (day, max(start, left) - left, min(stop, right) - left)
            for day, (left, right) in enumerate(pairwise(starts))
            if max(start, left) < min(stop, right)
        ]
        for name, (start, stop) in zip(names, pairwise(ends), strict=True)
    }
    train, validation, test = (f"{share:.4g}" for share in shares)
    return (
        parts,
        f"in the order of the log, the first {train} train, the next {validation} validate, {test} test",
    )


def _days(days: Sequence[int], how: str) -> tuple[dict[str, list[Stretch]], str]:
    use = dict.fromkeys(range(len(days)), "train")
    for name, first, last in DAYS.findall(how):
        for day in range(int(first), int(last or first) + 1):
            if use.get(day) != "train":
                words = "is named twice" if day in use else f"is none of 0 to {len(days) - 1}"
                raise DataError(f"--split {how}: day {day} {words}; correct it")
            use[day] = name
    parts = {
        name: [(day, 0, rows) for day, rows in enumerate(days) if use[day] == name and rows]
        for name in ("train", "test", "validation")
    }
    return parts, f"{how} (days counted from 0), the others train"
