import dataclasses
import errno
import hashlib
import subprocess
import sys
import threading
import time
from itertools import pairwise, product

import numpy as np
import pytest

from data_pipeline import batches
from data_pipeline.background import ahead
from data_pipeline.batches import Rows
from data_pipeline.manifest import KINDS, Day, Ids, Manifest, shard_name
from data_pipeline.npy import NpyFile
from data_pipeline.schema import DataError, Schema

SCHEMA = Schema("small", "label", ("number", "half"), ("a", "b", "c"))
DAYS = (37, 50, 23)
SPLIT = {
    "train": ((0, 0, 37), (1, 0, 50)),
    "test": ((2, 0, 12),),
    "validation": ((2, 12, 23),),
    "none": (),
}
SIZES = {"block_rows": 8, "window_blocks": 3}  # train: 5 + 7 blocks, the last of each day short; 4 windows


def columns(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What stands in the rows with these numbers; the first dense column is the number itself."""
    dense = np.stack([numbers, numbers / 2], axis=1).astype(np.float32)
    ids = (numbers[:, None] * np.array([1, 2654435761, 0x80000001])).astype(np.uint32)
    return (numbers % 3 == 0).astype(np.float32), dense, ids


@pytest.fixture
def manifest(tmp_path):
    for day, (start, stop) in enumerate(pairwise(np.cumsum([0, *DAYS]))):
        label, dense, ids = columns(np.arange(start, stop))
        arrays = label[:, None].astype(np.int32), dense, ids.view(np.int32)
        for kind, array in zip(KINDS, arrays, strict=True):
            np.save(tmp_path / shard_name(day, kind), array)
    ids = Ids("hash", (sum(DAYS),) * 3, True)
    days = tuple(Day(rows, {}, "test") for rows in DAYS)
    return Manifest(SCHEMA, "none", ids, days, SPLIT, "", folder=tmp_path)


@pytest.fixture
def train(manifest):
    return Rows(manifest, "train", **SIZES)


def taught(manifest, value):
    """The files of a teacher whose probability for a row is `value` of its number."""
    files = {}
    for day, (start, stop) in enumerate(pairwise(np.cumsum([0, *DAYS]))):
        path = manifest.folder / f"day_{day}_teacher.npy"
        np.save(path, value(np.arange(start, stop, dtype=np.float32))[:, None])
        files[day] = NpyFile(path, missing="", remedy="")
    return files


@pytest.mark.parametrize("order", [{}, {"seed": 1}, {"seed": 1, "epoch": 3, "start_step": 2}])
def test_what_a_teacher_says_comes_with_its_row(manifest, train, order):
    rows = Rows(manifest, "train", **SIZES, taught=taught(manifest, lambda number: number / 128))
    for expected, batch in zip(train.batches(7, **order), rows.batches(7, **order), strict=True):
        label, probability, dense, ids = batch
        for array, same in zip((label, dense, ids), expected, strict=True):
            np.testing.assert_array_equal(array, same)
        assert probability.dtype == np.float32
        np.testing.assert_array_equal(probability, dense[:, 0] / 128)
    assert rows.base_rate == train.base_rate


def numbers(stream) -> np.ndarray:
    """The row numbers in the order they come; checks that all of each row comes with its number."""
    seen = [np.zeros(0, int)]
    for batch in stream:
        order = batch.dense[:, 0].astype(int)
        for array, expected in zip(batch, columns(order), strict=True):
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected)
        seen.append(order)
    return np.concatenate(seen)


@pytest.mark.parametrize(
    ("split", "start", "stop"), [("train", 0, 87), ("test", 87, 99), ("validation", 99, 110)]
)
def test_without_seed_the_log_is_read_in_order(manifest, split, start, stop):
    rows = Rows(manifest, split, **SIZES)
    assert rows.count == stop - start
    np.testing.assert_array_equal(numbers(rows.batches(10)), np.arange(start, stop))


@pytest.mark.parametrize("signed", [False, True])
def test_ids_of_64_bits_keep_the_low_32(manifest, signed):
    for day in range(2):
        path = manifest.folder / shard_name(day, "sparse")
        ids = np.load(path)
        assert ids.min() < 0
        np.save(path, (ids if signed else ids.view(np.uint32)).astype(np.int64))
    numbers(Rows(manifest, "train", **SIZES).batches(10, seed=1))


@pytest.mark.parametrize("size", [1, 7, 24, 25, 87, 1000])
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_every_row_comes_once_and_only_the_last_batch_is_short(train, size, prefetch):
    lengths = [len(b.label) for b in train.batches(size, seed=3, prefetch=prefetch)]
    assert lengths[:-1] == [size] * (87 // size if 87 % size else 87 // size - 1)
    assert sum(lengths) == 87
    assert len(lengths) == train.steps(size)
    np.testing.assert_array_equal(
        np.sort(numbers(train.batches(size, seed=3, prefetch=prefetch))), np.arange(87)
    )


def test_seed_and_epoch_make_the_order_and_batch_size_and_threads_do_not(train):
    order = numbers(train.batches(10, seed=1, epoch=2))
    np.testing.assert_array_equal(order, numbers(train.batches(7, seed=1, epoch=2, prefetch=0)))
    orders = [numbers(train.batches(10, seed=s, epoch=e)) for s, e in product(range(3), range(3))]
    assert len({order.tobytes() for order in [np.arange(87), *orders]}) == 10


def test_blocks_are_whole_within_a_day_and_permuted_and_windows_mix_them(train):
    order = numbers(train.batches(10, seed=1))
    days = [range(0, 37), range(37, 87)]
    blocks = [day[start : start + 8] for day in days for start in range(0, len(day), 8)]
    block_of = {row: b for b, block in enumerate(blocks) for row in block}
    windows = []
    while len(order):
        window = list(dict.fromkeys(block_of[row] for row in order[: 3 * 8]))[:3]
        length = sum(len(blocks[b]) for b in window)
        head, order = order[:length], order[length:]
        assert sorted(head) == sorted(row for b in window for row in blocks[b])
        # Rows of a block do not stay together in the window.
        assert sum(block_of[a] != block_of[b] for a, b in pairwise(head)) > length // 3
        windows.append(window)
    assert [len(w) for w in windows] == [3, 3, 3, 3]
    assert sorted(b for window in windows for b in window) == list(range(12))
    assert max(max(w) - min(w) for w in windows) > 3


def test_the_order_is_the_same_on_every_machine(train):
    order = numbers(train.batches(10, seed=1, epoch=2))
    assert order[:8].tolist() == [47, 12, 45, 13, 50, 1, 52, 9]
    assert hashlib.sha256(order.astype("<i8")).hexdigest()[:16] == "5620b0ab44348f53"


@pytest.mark.parametrize("n", [0, 1, 2, 3000])
@pytest.mark.parametrize(("upper", "lower"), [(32, 32), (8, 32), (17, 2), (8, 1), (0, 0)])
def test_the_sort_by_parts_is_the_stable_sort(n, upper, lower):
    """Of 32 upper bits and 32 lower ones, so many are drawn: with few, words share the upper or are equal."""
    rng = np.random.default_rng(n)
    words = rng.integers(0, 2**upper, n, np.uint64) << 32 | rng.integers(0, 2**lower, n, np.uint64)
    np.testing.assert_array_equal(batches._argsort(words), np.argsort(words, kind="stable"))


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("size", [7, 30, 87])
def test_an_epoch_resumes_at_any_step(train, seed, size):
    full = list(train.batches(size, seed=seed, epoch=1))
    for step in range(len(full) + 2):
        rest = list(train.batches(size, seed=seed, epoch=1, start_step=step))
        assert len(rest) == len(full[step:])
        for batch, expected in zip(rest, full[step:], strict=True):
            for array, same in zip(batch, expected, strict=True):
                assert array.tobytes() == same.tobytes()


def test_resuming_does_not_read_the_windows_before(train, monkeypatch):
    read = []
    whole = Rows._read
    monkeypatch.setattr(Rows, "_read", lambda *arguments: read.append(1) or whole(*arguments))
    list(train.batches(24, start_step=2))
    assert len(read) == 2


def test_batches_reach_over_days_and_windows(train):
    across = [set(b.dense[:, 0].astype(int)) for b in train.batches(10)]
    assert {36, 37} <= across[3]  # two days
    assert {20, 23, 24, 29} <= across[2]  # two windows: 0-23 and 24-44


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_of_the_threads_reach_the_reader(train, monkeypatch, prefetch):
    reads = iter([Rows._read, Rows._read])

    def read(*arguments):
        step = next(reads, None)
        if step is None:
            raise OSError("the disk is gone")
        return step(*arguments)

    monkeypatch.setattr(Rows, "_read", read)
    before = threading.active_count()
    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        seen.extend(train.batches(8, prefetch=prefetch))
    assert threading.active_count() == before


def test_closing_early_ends_the_threads(train):
    before = set(threading.enumerate())
    stream = train.batches(4, seed=1, prefetch=2)
    next(stream)
    # Two, unless the first was done with its window before there was a second to be made.
    assert set(threading.enumerate()) - before
    stream.close()
    assert set(threading.enumerate()) <= before
    for _ in train.batches(4, seed=1, prefetch=2):
        break  # drops the iterator
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(("prefetch", "seed"), [(0, 1), (1, 1), (3, 1), (2, None)])
def test_memory_of_windows_is_used_again_but_not_while_held(manifest, monkeypatch, prefetch, seed):
    takes, take = [], batches._Memory.take
    monkeypatch.setattr(
        batches._Memory, "take", lambda *arguments: takes.append(arguments) or take(*arguments)
    )
    rows = Rows(manifest, "train", block_rows=2, window_blocks=1)
    stream = rows.batches(2, seed=seed, prefetch=prefetch)
    held = next(stream)
    kept = [array.copy() for array in held]
    first = held.ids[:1]  # a part holds on as well
    del held
    order = numbers(stream)
    assert len(order) == 85
    np.testing.assert_array_equal(first, kept[2][:1])
    assert len(takes) == 44 * (1 if seed is None else 2)
    memory = takes[0][0]
    # What the windows that are made, read and held take, as the docstring says; `first` holds one more.
    assert len(memory.free) <= 2 * max(prefetch, 1) + 2
    before = len(memory.free)
    del first
    assert len(memory.free) == before + 1


def test_a_shard_cut_short_meanwhile_is_named(train, manifest):
    path = manifest.folder / shard_name(1, "dense")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"day_1_dense\.npy: has become shorter"):
        list(train.batches(10))


def test_a_shard_that_cannot_be_read_for_now_is_named_and_not_called_damaged(manifest, train, monkeypatch):
    def fails(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    told = r"/day_\d_\w+\.npy: cannot be read \(Input/output error\); check the disk"
    monkeypatch.setattr("os.preadv", fails)
    with pytest.raises(DataError, match=told):
        next(train.batches(10))
    monkeypatch.setattr("io.open", fails)
    with pytest.raises(DataError, match=told):
        Rows(manifest, "train")


def test_a_program_ends_though_an_iterator_is_open(manifest):
    manifest.save(manifest.folder)
    program = (
        "from data_pipeline.batches import Rows; from data_pipeline.manifest import Manifest\n"
        f"manifest = Manifest.load({str(manifest.folder)!r})\n"
        "stream = Rows(manifest, 'train', block_rows=8, window_blocks=2).batches(4, prefetch=2)\n"
        "print(len(next(stream).label))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "4\n", "")


def test_prefetch_is_how_far_the_thread_runs_ahead():
    made = []

    def items():
        for i in range(20):
            made.append(i)
            yield i

    source = items()
    stream = ahead(source, 3)
    for taken in range(1, 6):
        assert next(stream) == taken - 1
        deadline = time.monotonic() + 10
        while len(made) < taken + 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert len(made) == taken + 3
    stream.close()
    assert source.gi_frame is None  # closed as well


def test_a_split_without_rows_has_no_batches(manifest):
    rows = Rows(manifest, "none")
    assert (rows.count, rows.steps(8), list(rows.batches(8)), list(rows.batches(8, seed=1))) == (0, 0, [], [])


@pytest.mark.parametrize("seed", [None, 1])
def test_a_log_without_dense_columns(manifest, seed):
    for day, rows in enumerate(DAYS):
        np.save(manifest.folder / shard_name(day, "dense"), np.zeros((rows, 0), np.float32))
    bare = dataclasses.replace(manifest, schema=Schema("bare", "label", (), SCHEMA.categorical))
    batches = list(Rows(bare, "train", **SIZES).batches(10, seed=seed))
    assert [batch.dense.shape for batch in batches] == [(10, 0)] * 8 + [(7, 0)]
    ids = np.concatenate([batch.ids[:, 0] for batch in batches])
    np.testing.assert_array_equal(np.sort(ids), np.arange(87))


def test_unusable_folders_and_arguments_are_refused(manifest, train):
    with pytest.raises(DataError, match=r"no split 'valid'.*train, test, validation"):
        Rows(manifest, "valid")
    np.save(manifest.folder / shard_name(0, "dense"), np.zeros((36, 2), np.float32))
    with pytest.raises(DataError, match=r"day_0_dense\.npy"):
        Rows(manifest, "train")
    Rows(manifest, "test")  # does not need that day
    for wrong in [{"batch_size": 0}, {"batch_size": 4, "start_step": -1}, {"batch_size": 4, "prefetch": -1}]:
        with pytest.raises(ValueError, match="must be at least"):
            train.batches(**wrong)


class TestValuesThatCannotBe:
    """Days 0 and 1 train; the first 12 rows of the last day test, the others validate."""

    def spoil(self, manifest, day, kind, row, column, value):
        path = manifest.folder / shard_name(day, kind)
        array = np.load(path)
        array[row, column] = value
        np.save(path, array)
        return path

    @pytest.mark.parametrize("part", [3, 7, 1 << 22])
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_numbers(self, manifest, monkeypatch, value, part):
        monkeypatch.setattr(batches, "CHECKED", part)
        path = self.spoil(manifest, 2, "dense", 15, 1, value)
        told = []
        Rows(manifest, "test", checking=lambda *done: told.append(done)).require_possible("labels", "dense")
        assert [done for done in told if done[0] == 12] == 2 * [(12, 12)]
        assert (len(told) > 2) == (part < 12)
        message = rf"{path}, row 15 \(from 0\), column half: {value} is not finite; prepare the data again"
        with pytest.raises(DataError, match=message):
            Rows(manifest, "validation").require_possible("dense")

    @pytest.mark.parametrize("value", [256, 2, -1, 2**31 - 1])
    def test_labels(self, manifest, value):
        """256 is 0 in eight bits."""
        assert Rows(manifest, "train").base_rate == np.mean(np.arange(87) % 3 == 0)
        path = self.spoil(manifest, 1, "labels", 49, 0, value)
        with pytest.raises(DataError, match=rf"{path}, row 49 .*column label: {value} is not 0 or 1"):
            _ = Rows(manifest, "train").base_rate
        assert Rows(manifest, "test").base_rate == pytest.approx(1 / 3)

    @pytest.mark.parametrize("dialect", ["hash", "dictionary"])
    @pytest.mark.parametrize("dtype", [np.int32, np.int64])
    def test_ids_beyond_their_column(self, manifest, dialect, dtype):
        path = manifest.folder / shard_name(2, "sparse")
        ids = np.tile(np.arange(23)[:, None], 3).astype(dtype)
        ids[13, 2] = 23
        np.save(path, ids)
        rows = Rows(dataclasses.replace(manifest, ids=Ids(dialect, (23, 23, 23), True)), "validation")
        if dialect == "hash":
            rows.require_possible("sparse")
            return
        with pytest.raises(DataError, match=rf"{path}, row 13 .*column c: 23 is not below its column"):
            rows.require_possible("sparse")
