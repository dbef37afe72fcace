from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.schema import DataError
from data_pipeline.splits import split

WEEK = [4, 4, 4, 3, 3, 3, 3]


def rows(part):
    """The (day, row) of every row of a part."""
    return [(day, row) for day, start, stop in part for row in range(start, stop)]


@pytest.mark.parametrize(
    ("days", "how", "first", "note"),
    [
        ([5, 7], "mlperf", "test", "(as MLPerf v1, unlike TorchRec)"),
        ([5, 6], "torchrec", "validation", "(as TorchRec, unlike MLPerf v1)"),
        (WEEK, "kaggle", "test", "(of 7 equal blocks, as DLRM does with Criteo Kaggle)"),
    ],
)
def test_halves_of_the_last_day(days, how, first, note):
    """The first half is the larger of two unequal ones, as NumPy's array_split and TorchRec cut."""
    parts, words = split(days, how)
    second = {"test": "validation", "validation": "test"}[first]
    last, half = len(days) - 1, (days[-1] + 1) // 2
    assert parts[first] == ((last, 0, half),)
    assert parts[second] == ((last, half, days[-1]),)
    assert parts["train"] == tuple((day, 0, n) for day, n in enumerate(days[:-1]))
    assert words == f"{first} is the first half of the last day, {second} the second {note}"


def test_mlperf_is_the_default():
    assert split([5, 7]) == split([5, 7], "mlperf")


@pytest.mark.parametrize("days", [[10, 10], WEEK[:6], [4, 4, 4, 4, 4, 4, 2]])
def test_kaggle_is_of_seven_equal_days(days):
    with pytest.raises(
        DataError, match=r"--split kaggle: is of 7 equal days, not .*; give one file and --bl"
    ):
        split(days, "kaggle")


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda days: sum(days) >= 20),
    st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.7, 0.1, 0.2)]),
)
def test_shares_take_the_rows_in_order(days, shares):
    how = ",".join(map(str, shares))
    parts, note = split(days, how)
    everything = [(day, row) for day, n in enumerate(days) for row in range(n)]
    names = ("train", "validation", "test")
    assert list(chain.from_iterable(rows(parts[name]) for name in names)) == everything
    for name, share in zip(names, shares, strict=True):
        # Both ends are rounded to whole rows.
        assert abs(len(rows(parts[name])) - share * len(everything)) <= 1
        assert all(start < stop for _, start, stop in parts[name])
    train, validation, test = shares
    words = f"the first {train} train, the next {validation} validate, {test} test"
    assert note == f"in the order of the log, {words}"


def test_days_by_number():
    parts, note = split([1, 2, 0, 4, 5], "test=4,validation=0-1")
    assert parts == {"train": ((3, 0, 4),), "test": ((4, 0, 5),), "validation": ((0, 0, 1), (1, 0, 2))}
    assert note == "test=4,validation=0-1 (days counted from 0), the others train"


@pytest.mark.parametrize(
    ("days", "how", "message"),
    [
        (
            [5, 1],
            "mlperf",
            r"leaves no row to validation of days of \[5, 1\] rows; give more",
        ),
        ([5], "torchrec", "leaves no row to train"),
        ([5, 5], "test=1", "leaves no row to validation"),
        ([5, 5], "test=0,validation=1", "leaves no row to train"),
        ([5, 5, 5], "test=0,validation=0-1", "day 0 is named twice; correct it"),
        ([5, 5, 5], "test=0,validation=3", "day 3 is none of 0 to 2; correct it"),
        ([5, 5, 5], "test=0,validation=1-999999999999", "day 3 is none of 0 to 2"),
        ([5, 5, 5], "0.8,0.1,0.2", "three shares must add up to 1"),
        ([5, 5, 5], "0.8,0.1,.1.", "three shares must add up to 1"),
        ([1, 1, 1], "0.98,0.01,0.01", "leaves no row to test|leaves no row to validation"),
        ([5, 5], "halves", "give mlperf, torchrec, kaggle, or shares to train, validate and test"),
        ([5, 5], "test=a", "or days"),
    ],
)
def test_splits_that_cannot_be(days, how, message):
    with pytest.raises(DataError, match=message) as error:
        split(days, how)
    assert str(error.value).startswith(f"--split {how}: ")
    assert len(str(error.value).splitlines()) == 1
