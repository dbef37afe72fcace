"""Quantised rows and their cache: how they are rounded, the cache against a plain oracle, and training."""

import dataclasses
import math
from collections import Counter

import numba
import numpy as np
import pytest
from conftest import each_version
from hypothesis import given, settings
from hypothesis import strategies as st
from test_embeddings import HASHED, NUMBERED
from test_embeddings import settings as embedding_settings
from test_train import DATA, config, rows, train, weights_of

from robe import checkpoint
from robe.backend import select
from robe.config import ConfigError, EmbeddingConfig, OptimizerConfig
from robe.embeddings import create
from robe.kernels import admit, cached_step
from robe.kernels.parts.cache import EMPTY, WAYS, hash_row, set_of
from robe.kernels.parts.codes import NO_ROW, Form, code_bytes, row_bytes
from robe.kernels.parts.groups import expanded
from robe.kernels.parts.half import from_half, rounding_key
from robe.kernels.quantise import quantise_reference
from robe.kernels.workbench.cases import CASES, calls
from robe.model import build
from robe.train import predict

forms = pytest.mark.parametrize(
    "form",
    [Form(bits, random, width) for bits in (3, 4, 8, 16) for random in (True, False) for width in (7, 64)],
)


def quantised(x, form, seed=0, run=quantise_reference):
    """(rows (N, D) as they read, the table)."""
    table = np.zeros((len(x), row_bytes(form)), np.uint8)
    numbers = np.arange(len(x), dtype=np.uint32)
    run(x, numbers, rounding_key(seed, 1), form, table)
    return expanded(table, numbers, form), table


def scales(table, form):
    return from_half(table[:, code_bytes(form) :].copy().view(np.uint16)[:, 0])[:, None]


def outside_bound(x, read, table, form):
    """How many elements are off by more than rounding may: one step, or half of it to the nearest."""
    step = (
        np.spacing(abs(x).astype(np.float16)).astype(np.float32) if form.bits == 16 else scales(table, form)
    )
    # Besides, sums in float32 are off by some ulp of the largest element.
    slack = 1e-6 * abs(x).max(axis=1, keepdims=True)
    return (abs(read - x) > step * (1 if form.stochastic else 0.5) + slack).sum()


@pytest.mark.kernels
@each_version("quantise")
@forms
def test_each_element_is_off_by_a_step_at_most(form, run, rng):
    x = (rng.standard_normal((30, form.width)) * 10.0 ** rng.integers(-4, 3, (30, 1))).astype(np.float32)
    x += rng.integers(-3, 4, (30, 1)).astype(np.float32)
    read, table = quantised(x, form, run=run)
    assert outside_bound(x, read, table, form) == 0
    if form.bits == 16:
        return
    # Scales are the least that reach the largest element, which halves tell to one part in 2^10.
    levels = 2**form.bits - 1
    spread = np.ptp(x, axis=1)[:, None]
    low = from_half(table[:, code_bytes(form) :].copy().view(np.uint16)[:, 1])[:, None]
    assert (low <= x).all()
    assert (
        scales(table, form) <= (spread + (x.min(axis=1)[:, None] - low)) / levels * (1 + 2**-9) + 2**-24
    ).all()
    wrong, larger = table.copy(), (1.25 * scales(table, form)).astype(np.float16)
    wrong[:, code_bytes(form) : code_bytes(form) + 2] = larger.view(np.uint8)
    assert outside_bound(x, expanded(wrong, np.arange(30), form), table, form) > 0


@pytest.mark.kernels
@each_version("quantise")
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_rounding_is_right_on_average(bits, run, rng):
    """Over 2,000 keys: a mean deviates by scale * sqrt(f (1 - f) / 2000), f how far x lies above a code."""
    form, keys = Form(bits, True, 16), 50 if run.__name__ == "quantise_cuda" else 2000
    x = rng.standard_normal((1, 16)).astype(np.float32)
    read = np.array([quantised(x, form, seed, run)[0][0] for seed in range(keys)], np.float64)
    lower, upper = read.min(axis=0), read.max(axis=0)
    between = upper > lower
    assert between.sum() >= 13  # the least and the largest element may lie on a code
    share = (x[0] - lower)[between] / (upper - lower)[between]
    z = (read.mean(axis=0) - x[0])[between] / ((upper - lower)[between] * np.sqrt(share * (1 - share) / keys))
    assert abs(z).max() < 5
    if keys == 2000:
        nearest = quantised(x, form._replace(stochastic=False), 0, run)[0][0]
        off = (nearest - x[0])[between] / ((upper - lower)[between] * np.sqrt(share * (1 - share) / keys))
        assert abs(off).max() > 10


@pytest.mark.kernels
@each_version("quantise")
@pytest.mark.parametrize("bits", [3, 4, 8, 16])
@pytest.mark.parametrize("random", [True, False])
def test_what_a_row_can_hold_it_holds(bits, random, run, rng):
    """Rows of one half, and rows from code 0 to the last with a scale of 2^-6, whatever is drawn."""
    form = Form(bits, random, 20)
    x = np.repeat(np.array([0, 1, -0.25, 3.140625], np.float32)[:, None], 20, axis=1)
    codes = rng.integers(0, 2 ** min(bits, 8), (4, 20))
    codes[:, 3], codes[:, 5] = 0, 2 ** min(bits, 8) - 1
    x = np.concatenate([x, (codes * 2.0**-6 - 1.5).astype(np.float32)])
    read, table = quantised(x, form, run=run)
    np.testing.assert_array_equal(read, x)
    np.testing.assert_array_equal(quantised(read, form, seed=9, run=run)[1], table)


@pytest.mark.kernels
@each_version("quantise")
@pytest.mark.parametrize(("bits", "width"), [(1, 64), (1, 7), (2, 64), (2, 7)])
def test_two_bits_and_one_follow_the_law_of_a_row(bits, width, run, rng):
    """Levels lie evenly around the mean, as far apart as deviations say; each element takes the nearest."""
    x = (rng.standard_normal((30, width)) * 10.0 ** rng.integers(-2, 3, (30, 1))).astype(np.float32)
    x[0], x[1] = 3, rng.standard_normal(width) - 1000  # a row of one number, and one far from 0
    read, table = quantised(x, Form(bits, False, width), run=run)
    exact = x.astype(np.float64)
    off = exact - exact.mean(axis=1, keepdims=True)
    spread = 2 * abs(off).mean(axis=1) if bits == 1 else np.sqrt((off**2).mean(axis=1))
    levels = np.arange(2**bits) - (2**bits - 1) / 2
    expected = exact.mean(axis=1, keepdims=True) + spread[:, None] * levels
    ends = from_half(table[:, -4:].copy().view(np.uint16))
    stored = ends[:, 1:] + ends[:, :1] * np.arange(2**bits)
    # Scale and bias are halves, and means are taken in steps of 2^-12 of the range.
    reach = abs(expected).max(axis=1, keepdims=True)
    assert (abs(stored - expected) < 2**-10 * reach + 2**-11 * np.ptp(x, axis=1, keepdims=True)).all()
    nearest = abs(stored[:, :, None] - x[:, None]).min(axis=1)
    assert (abs(read - x) <= nearest + 1e-6 * reach).all()
    np.testing.assert_array_equal(read[0], 3)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("width", [64, 20, 13, 8])
def test_codes_take_no_more_bytes_than_their_bits(bits, width, rng):
    """And are what the docstring of codes.py says of them: in the order of bits, the lowest first."""
    form = Form(bits, False, width)
    read, table = quantised(rng.standard_normal((5, width)).astype(np.float32), form)
    assert table.shape[1] == math.ceil(width * bits / 8) + 4
    for row, found in zip(table, read, strict=True):
        number = int.from_bytes(row[:-4].tobytes(), "little")
        codes = [number >> (i * bits) & (2**bits - 1) for i in range(width)]
        scale, bias = row[-4:].view(np.float16).astype(np.float32)
        np.testing.assert_array_equal(found, bias + scale * np.array(codes, np.float32))
        assert len(set(codes)) > 1
        assert number >> width * bits == 0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.kernels
@each_version("quantise")
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_a_row_that_is_not_finite_reads_as_nan(bits, run, rng):
    x = rng.standard_normal((5, 6)).astype(np.float32)
    x[1, 2], x[2, 0], x[3, 5] = np.nan, np.inf, -np.inf
    read, _ = quantised(x, Form(bits, True, 6), run=run)
    np.testing.assert_array_equal(np.isnan(read).all(axis=1), [False, True, True, True, False])
    assert np.isfinite(read[[0, 4]]).all()


class Oracle:
    """The cache in plain Python: each set a list of [row, used, values] or None."""

    def __init__(self, table, form, sets, least_used, seed):
        self.table, self.form, self.least_used, self.seed = table.copy(), form, least_used, seed
        self.sets = [[None] * WAYS for _ in range(sets)]
        self.counted, self.step = Counter(), 0

    @staticmethod
    def hashed(row):
        """MurmurHash3's finaliser."""
        row ^= row >> 16
        row = row * 0x85EBCA6B % 2**32
        row ^= row >> 13
        row = row * 0xC2B2AE35 % 2**32
        return row ^ row >> 16

    def ways(self, row):
        return self.sets[self.hashed(row) * len(self.sets) >> 32] if self.sets else []

    def line(self, row):
        return next((line for line in self.ways(row) if line and line[0] == row), None)

    def read(self, row):
        line = self.line(row)
        return line[2] if line else expanded(self.table, [row], self.form)[0]

    def write_back(self, row, values):
        key = rounding_key(self.seed, self.step)
        quantise_reference(values[None], np.array([row], np.uint32), key, self.form, self.table)

    def batch(self, look_ups, gradients, rate):
        """look_ups: rows in the order of the batch; gradients, one each."""
        self.step += 1
        counts, total = Counter(look_ups), {}
        for row, gradient in zip(look_ups, gradients, strict=True):
            total[row] = total.get(row, 0) + gradient
        in_order = sorted(counts, key=self.hashed)
        touched = [self.line(row) for row in in_order if self.line(row)]
        for line in touched:
            line[1] = line[1] + counts[line[0]] if self.least_used else self.step
            self.counted["hits"] += counts[line[0]]
        for row in in_order:
            if self.line(row):
                self.line(row)[2] -= np.float32(rate) * total[row]
                continue
            self.counted["misses"] += counts[row]
            values, ways = self.read(row), self.ways(row)
            free = [k for k, line in enumerate(ways) if not any(line is t for t in touched)]
            stepped = values - np.float32(rate) * total[row]
            if not free:
                self.counted["direct"] += 1
                self.write_back(row, stepped)
                continue
            k = min(free, key=lambda k: ways[k][1] if ways[k] else -1)
            if ways[k]:
                self.counted["evictions"] += 1
                self.write_back(ways[k][0], ways[k][2])
            self.counted["loads"] += 1
            ways[k] = [row, counts[row] if self.least_used else self.step, stepped]
            touched.append(ways[k])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([4, 8, 16]),
    policy=st.sampled_from(["lru", "lfu"]),
    cache=st.sampled_from([0, 0.02, 0.05]),
    batches=st.lists(st.integers(0, 120), min_size=1, max_size=8),
)
def test_the_cache_is_that_of_the_oracle(seed, bits, policy, cache, batches):
    """Up to 360 look-ups of 1,310 rows at a time, and 0 to 64 places: some batches want more."""
    settings = embedding_settings(
        method="mixed_precision", bits=bits, policy=policy, cache=cache, init_bound=0.25
    )
    embedding = create(dataclasses.replace(settings, seed=seed), NUMBERED, select("cpu"))
    oracle = Oracle(embedding.table, embedding.form, embedding.sets, policy == "lfu", seed)
    assert embedding.sets == {0: 0, 0.02: 1, 0.05: 2}[cache]
    rng = np.random.default_rng(seed)
    sizes = np.array(NUMBERED.cardinalities)
    for rows_of_batch in batches:
        ids = (sizes * rng.random((rows_of_batch, 3)) ** 4).astype(np.uint32)
        look_ups = (ids + embedding.base.astype(np.uint32)).ravel().tolist()
        before, out = (
            {n: a.tobytes() for n, a in embedding.state().items()},
            np.empty((*ids.shape, 8), np.float32),
        )
        embedding.lookup(ids, out)
        assert {n: a.tobytes() for n, a in embedding.state().items()} == before
        for row, found in zip(look_ups, out.reshape(-1, 8), strict=True):
            np.testing.assert_array_equal(found, oracle.read(row))
        # Small multiples of 2^-12: sums of them are exact.
        gradients = rng.integers(-8, 9, (len(look_ups), 8)).astype(np.float32) / 4096
        embedding.update(ids, gradients.reshape(*ids.shape, 8), 0.5)
        oracle.batch(look_ups, gradients, 0.5)
        lines = [line for ways in oracle.sets for line in ways]
        np.testing.assert_array_equal(embedding.tags.ravel(), [line[0] if line else EMPTY for line in lines])
        np.testing.assert_array_equal(embedding.used.ravel(), [line[1] if line else 0 for line in lines])
        np.testing.assert_array_equal(embedding.table, oracle.table)
    assert {name: count for name, count in embedding.counts().items() if name != "bytes_moved"} == {
        name: oracle.counted[name] for name in admit.COUNTED
    }
    moved = oracle.counted["loads"] + oracle.counted["evictions"] + 2 * oracle.counted["direct"]
    assert embedding.counts()["bytes_moved"] == moved * row_bytes(embedding.form)
    embedding.flush()
    oracle.step += 1
    for line in filter(None, lines):
        oracle.write_back(line[0], line[2])
    np.testing.assert_array_equal(embedding.table, oracle.table)
    assert (embedding.tags == EMPTY).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_count_of_look_ups_stays_at_the_most_that_32_bits_hold(backend):
    """Else it would begin at 0 again, and the most used row be the first to leave."""
    settings = embedding_settings(method="mixed_precision", cache=0.02, policy="lfu")
    embedding = create(settings, NUMBERED, select(backend))
    ids, gradient = np.zeros((5, 3), np.uint32), np.zeros((5, 3, 8), np.float32)
    embedding.update(ids, gradient, 1)
    assert sorted(embedding.used.ravel().tolist())[-3:] == [5, 5, 5]
    for most, expected in ((2**32 - 6, 2**32 - 1), (2**32 - 5, 2**32 - 1), (2**32 - 7, 2**32 - 2)):
        embedding.used[embedding.used > 0] = most
        embedding.update(ids, gradient, 1)
        assert sorted(embedding.used.ravel().tolist())[-3:] == [expected] * 3


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("cache", [0, 0.02])
def test_a_row_without_a_gradient_stays_under_adagrad(backend, cache):
    """Its step is 0 / (sqrt(0) + eps); without eps it would be 0 / 0."""
    settings = embedding_settings(method="mixed_precision", cache=cache, bits=16, rounding="nearest")
    settings = dataclasses.replace(settings, optimizer=OptimizerConfig("adagrad", 0.1))
    embedding = create(settings, NUMBERED, select(backend))
    ids = np.arange(15, dtype=np.uint32).reshape(5, 3) % 4
    before, after = np.empty((2, 5, 3, 8), np.float32)
    embedding.lookup(ids, before)
    embedding.update(ids, np.zeros((5, 3, 8), np.float32), 0.1)
    embedding.lookup(ids, after)
    np.testing.assert_array_equal(after, before)
    assert np.abs(before).max() > 0


def test_counters_are_kept_by_feature():
    """100 rows of a feature fight for 32 places, and evict those of another, which counts them."""
    embedding = create(embedding_settings(method="mixed_precision", cache=0.02), NUMBERED, select("cpu"))
    gradient = np.zeros((100, 3, 8), np.float32)
    embedding.update(
        np.stack([np.zeros(100), np.arange(100) % 10, np.zeros(100)], 1).astype(np.uint32), gradient, 1
    )
    embedding.update(
        np.stack([np.arange(100), np.zeros(100), np.zeros(100)], 1).astype(np.uint32), gradient, 1
    )
    first, second, third = embedding.counters.tolist()
    # Row 0 of each feature is there; 29 of 99 others find places, 12 of them held: 9 by rows of feature 1.
    assert first == [1, 100 + 99, 1 + 29, 0, 70]
    assert second == [100, 100, 10, 9, 0]
    assert third == [100, 100, 1, 0, 0]
    assert embedding.describe()["cache"]["features"][1]["evictions"] == 9


@pytest.mark.parametrize("operation", [admit, cached_step], ids=["admit", "cached_step"])
def test_bytes_do_not_depend_on_the_number_of_threads(operation):
    name = operation.__name__.split(".")[-1]
    call = calls(CASES[1]._replace(rows=3001, memory=300_000))[name]
    available, states = numba.get_num_threads(), set()
    try:
        for threads in range(1, available + 1):
            numba.set_num_threads(threads)
            arguments = call.copy()
            getattr(operation, f"{name}_cpu")(*arguments.values())
            states.add(b"".join(arguments[output].tobytes() for output in call.outputs))
    finally:
        numba.set_num_threads(available)
    assert len(states) == 1


def hit_rate(p, sets, least_used, tags, used):
    """Of the second half of 12,000 look-ups drawn from p, one at a time."""
    ids = np.random.default_rng(0).choice(len(p), (12_000, 1, 1), p=p).astype(np.uint32)
    embedding = create(
        embedding_settings(
            method="mixed_precision", cache=sets * WAYS / len(p), policy="lfu" if least_used else "lru"
        ),
        dataclasses.replace(NUMBERED, cardinalities=(len(p),)),
        select("cpu"),
    )
    embedding.tags[:], embedding.used[:] = tags, used
    gradient = np.zeros((1, 1, 8), np.float32)
    for turn, batch in enumerate(ids):
        if turn == 6000:
            embedding.counters[:] = 0
        embedding.update(batch, gradient, 0.0)
    return embedding.counts()["hits"] / 6000


def test_hit_rates_on_a_zipf_trace():
    """LFU, once it has settled, keeps the most frequent rows of each set in all places but one, which holds
    the last other row that was looked up. LRU after Che (2002): a row is there with 1 - exp(-p T); they sum
    to WAYS."""
    sets, p = 2, np.arange(1, 501.0) ** -1.0
    p /= p.sum()
    of = set_of(hash_row(np.arange(len(p), dtype=np.uint64)), sets)
    lfu = lru = 0.0
    tags, used = np.full((sets, WAYS), EMPTY), np.zeros((sets, WAYS), np.uint32)
    for s in range(sets):
        members = np.flatnonzero(of == s)  # the most frequent come first
        kept, others = p[members[: WAYS - 1]], p[members[WAYS - 1 :]]
        lfu += kept.sum() + (others**2).sum() / others.sum()
        tags[s, : WAYS - 1], used[s, : WAYS - 1] = members[: WAYS - 1], 10_000
        low, high = 0.0, 1e6
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if -np.expm1(-p[members] * middle).sum() < WAYS else (low, middle)
        lru += (p[members] * -np.expm1(-p[members] * low)).sum()
    settled = hit_rate(p, sets, True, tags, used)
    recent = hit_rate(p, sets, False, EMPTY, 0)
    # Of 6,000 look-ups a share is known to 0.5 / sqrt(6,000); Che's approximation errs by some 0.002 here.
    assert abs(settled - lfu) < 4 * 0.5 / np.sqrt(6000)
    assert abs(recent - lru) < 4 * 0.5 / np.sqrt(6000)
    assert lru + 0.05 < lfu
    # From nothing, LFU learns slowly: a row that leaves has to begin again.
    assert recent < hit_rate(p, sets, True, EMPTY, 0) < settled


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_in_a_cache_of_all_rows_training_is_in_float32(optimizer, rng):
    """Against steps on the same first rows, by hand; no set has more rows than ways."""
    data = dataclasses.replace(NUMBERED, cardinalities=(20, 10))
    embedding = create(
        embedding_settings(optimizer, method="mixed_precision", bits=4, cache=1.0), data, select("cpu")
    )
    table = expanded(embedding.table, np.arange(30), embedding.form).astype(np.float64)
    sums = np.zeros(30)
    for _ in range(20):
        ids = rng.integers(0, (20, 10), (40, 2)).astype(np.uint32)
        d_vectors = rng.standard_normal((40, 2, 8)).astype(np.float32)
        embedding.update(ids, d_vectors, 0.1)
        gradient = np.zeros((30, 8))
        np.add.at(gradient, ids + np.array([0, 20]), d_vectors)
        sums += (gradient**2).mean(axis=1)
        root = np.sqrt(sums[:, None]) + 1e-30 if optimizer == "adagrad" else 1
        table -= 0.1 * gradient / root
    out = np.empty((20, 2, 8), np.float32)
    embedding.lookup(np.stack([np.arange(20), np.arange(20) % 10], 1).astype(np.uint32), out)
    # 20 steps of order 1 in float32.
    np.testing.assert_allclose(out[:, 0], table[:20], atol=1e-5)
    np.testing.assert_allclose(out[:10, 1], table[20:], atol=1e-5)


def mixed(optimizer="sgd", **changes):
    embedding = {"bits": 8, "cache": 0.5, "policy": "lru"} | changes
    return dataclasses.replace(
        config(),
        embedding=EmbeddingConfig("mixed_precision", **embedding),
        optimizer=OptimizerConfig(optimizer, 0.1),
    )


TABLES = dataclasses.replace(DATA, dialect="dictionary", cardinalities=(200, 40))


def many_rows():
    """As those of test_train, with more ids than there are places in the cache."""
    found = rows()
    for part in found.values():
        part.ids = part.ids * np.uint32(10) % np.array([200, 40], np.uint32) + np.arange(
            part.count, dtype=np.uint32
        )[:, None] % np.uint32(10)
        part.ids %= np.array([200, 40], np.uint32)
    return found


@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [
        ("sgd", {}),
        ("adagrad", {"policy": "lfu", "cache": 0.1}),
        ("sgd", {"bits": 4, "cache": 0.0}),
        ("adagrad", {"bits": 16, "rounding": "nearest"}),
    ],
)
def test_a_run_stopped_anywhere_ends_as_if_it_had_not(optimizer, changes, tmp_path):
    """Weights, tags, counters and all, from each of the checkpoints of a run; evaluations disturb nothing."""
    settings = mixed(optimizer, **changes)
    whole = train(settings, TABLES, many_rows(), tmp_path / "whole")
    assert whole["cache"]["misses"] > 0
    undisturbed = dataclasses.replace(settings, eval_every=1000)
    train(undisturbed, TABLES, many_rows(), tmp_path / "undisturbed")
    assert weights_of(tmp_path / "undisturbed") == weights_of(tmp_path / "whole")
    part = many_rows()

    class Stopped(Exception):
        pass

    batches = part["train"].batches

    def stopping(*arguments, **more):
        for number, batch in enumerate(batches(*arguments, **more)):
            if number == 8:
                raise Stopped
            yield batch

    part["train"].batches = stopping
    with pytest.raises(Stopped):
        train(settings, TABLES, part, tmp_path / "part")
    resumed = train(settings, TABLES, many_rows(), tmp_path / "part")
    assert weights_of(tmp_path / "part") == weights_of(tmp_path / "whole")
    assert (resumed["cache"], resumed["test"]) == (whole["cache"], whole["test"])


def test_a_loaded_checkpoint_predicts_what_the_run_did(tmp_path):
    settings = mixed(bits=4, cache=0.1)
    summary = train(settings, TABLES, many_rows(), tmp_path)
    model = build(settings, TABLES, select("cpu"))
    checkpoint.load_weights(checkpoint.latest(tmp_path), model)
    label, logits = predict(model, many_rows()["test"])
    from robe import metrics

    assert metrics.summary(label, logits) == summary["test"]
    model.embedding.flush()
    _, flushed = predict(model, many_rows()["test"])
    assert 0 < abs(flushed - logits).max() < 0.1


def test_what_it_needs_and_says():
    with pytest.raises(ConfigError, match=r"mixed_precision cannot use the ids .*--ids dictionary"):
        create(embedding_settings(method="mixed_precision"), HASHED, select("cpu"))
    with pytest.raises(ConfigError, match="--cache must be from 0 to 1, not 2"):
        embedding_settings(method="mixed_precision", cache=2.0)
    embedding = create(
        embedding_settings(method="mixed_precision", bits=4, cache=0.02), NUMBERED, select("cpu")
    )
    with pytest.raises(ConfigError, match="feature 1 has 10 rows, but an id of the data is 10"):
        embedding.check(np.array([[999, 10, 5]], np.uint32))
    said = embedding.describe()
    # Rows of 4 bytes of codes and 4 of ends; 32 places of 8 floats, a tag and a stamp.
    assert said["embedding_bytes"] == 1310 * (4 + 4) + 32 * (32 + 8)
    assert said["compression"] == 1310 * 32 / said["embedding_bytes"]
    defaults = [
        create(embedding_settings(method="mixed_precision", bits=b), NUMBERED, select("cpu"))
        for b in (4, 8, 16)
    ]
    assert [e.sets for e in defaults] == [1, 2, 2]


def test_rows_that_are_no_rows_are_left_out():
    form, table = Form(8, True, 4), np.zeros((3, 8), np.uint8)
    numbers = np.array([2, NO_ROW], np.uint32)
    quantise_reference(np.ones((2, 4), np.float32), numbers, rounding_key(0, 0), form, table)
    assert (table.any(axis=1) == [False, False, True]).all()
