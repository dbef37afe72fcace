"""Hot ids, found by a sketch: the sketch against a plain oracle, rows that change hands, and training."""

import dataclasses
import json

import numba
import numpy as np
import pytest
from conftest import VERSIONS, each_version
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_embeddings import HASHED, NUMBERED
from test_embeddings import settings as embedding_settings
from test_train import DATA, config, rows, train, weights_of

from robe import checkpoint
from robe.backend import select
from robe.config import ConfigError, DataSpec, EmbeddingConfig, OptimizerConfig, from_json
from robe.convert import convert_embedding
from robe.embeddings import create, stored_weights
from robe.embeddings.cafe import hot_sets
from robe.embeddings.tables import capped_rows
from robe.kernels.operations import version
from robe.kernels.sort_rows import sort_rows_reference
from robe.kernels.space_saving import EMPTY, HOT, WAYS
from robe.kernels.workbench.cases import CASES, calls
from robe.model import build
from robe.plan import plan

SETS, FEATURES, WIDTH = 2, 3, 4


def hashed(token):
    """MurmurHash3's finaliser of a token whose upper half is folded in."""
    h = (token ^ (token >> 32) * 0xC2B2AE35) % 2**32
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


class Oracle:
    """The sketch as lists: of each set the buckets [token, importance], those with a row first."""

    def __init__(self, sets=SETS):
        self.sets = [[[None, np.float32(0)] for _ in range(WAYS)] for _ in range(sets)]
        self.halved = [0] * sets

    def batch(self, tokens, weights, period):
        """The rows that change hands."""
        by_set = {}
        for token, weight in zip(tokens, weights, strict=True):
            by_set.setdefault(hashed(token) * len(self.sets) >> 32, []).append((token, np.float32(weight)))
        changes = []
        for s, stream in by_set.items():
            stream.sort(key=lambda look_up: hashed(look_up[0]))
            buckets = self.sets[s]
            for bucket in buckets:
                bucket[1] = np.float32(bucket[1] * 2.0 ** (self.halved[s] - period))
            self.halved[s] = period
            for token, weight in stream:
                if weight > 0:
                    known = [bucket for bucket in buckets if bucket[0] == token]
                    bucket = known[0] if known else min(buckets[HOT:], key=lambda bucket: bucket[1])
                    bucket[0], bucket[1] = token, bucket[1] + weight
            while True:
                way = min(range(HOT), key=lambda way: buckets[way][1])
                candidate = max(range(HOT, WAYS), key=lambda way: buckets[way][1])
                if buckets[candidate][1] <= buckets[way][1]:
                    break
                changes.append(s * HOT + way)
                buckets[way], buckets[candidate] = buckets[candidate], buckets[way]
        return changes

    def rows(self):
        """token -> its row."""
        return {
            bucket[0]: s * HOT + way
            for s, buckets in enumerate(self.sets)
            for way, bucket in enumerate(buckets[:HOT])
            if bucket[0] is not None
        }


@pytest.mark.kernels
@each_version("space_saving")
@hypothesis_settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    by_count=st.booleans(),
    batches=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), min_size=2, max_size=8),
)
def test_the_sketch_is_that_of_the_oracle(run, seed, by_count, batches):
    """Up to 90 look-ups at a time, of some hundred ids of which 16 have a row and 48 are candidates."""
    rng, base = np.random.default_rng(seed), np.arange(FEATURES, dtype=np.uint64) << np.uint64(32)
    oracle, period, scale = Oracle(), 0, np.array([1, 0.5, 0], np.float32)
    tags, importance = np.full((SETS, WAYS), EMPTY), np.zeros((SETS, WAYS), np.float32)
    halved, before = np.zeros(SETS, np.uint32), {}
    look_up = version("hot_rows", run.__name__.removeprefix("space_saving_"))
    for count, periods in batches:
        period += periods
        ids = (150 * rng.random((count, FEATURES)) ** 3).astype(np.uint32) * np.uint32(28_000_003)
        d_vectors = rng.standard_normal((count, FEATURES + 1, WIDTH)).astype(np.float32)[:, 1:]
        keys, order = np.empty((2, ids.size), np.uint32)
        sort_rows_reference(ids, base, keys, order)
        moved = np.full(ids.size, 99)
        weights = np.broadcast_to(scale, ids.shape)
        if not by_count:
            squares = [d_vectors[..., i] ** 2 for i in range(WIDTH)]  # added up in order
            weights = weights * np.sqrt(((squares[0] + squares[1]) + squares[2]) + squares[3])
        tokens = (base + ids).ravel().tolist()
        batch = keys, order, ids, base, d_vectors, scale, by_count, np.uint32(period)
        run(*batch, tags, importance, halved, moved)
        changed = oracle.batch(tokens, weights.ravel().tolist(), period)
        assert sorted(moved[moved >= 0].tolist()) == sorted(changed)
        buckets = [bucket for s in oracle.sets for bucket in s]
        np.testing.assert_array_equal(tags.ravel(), [EMPTY if t is None else t for t, _ in buckets])
        np.testing.assert_array_equal(importance.ravel(), [much for _, much in buckets])
        # No id has two buckets, and whoever kept its row is where it was.
        known, hot = tags[tags != EMPTY], oracle.rows()
        assert len(np.unique(known)) == len(known)
        assert all(hot[token] == row for token, row in before.items() if row not in changed)
        assert all(before.get(token) != row for token, row in hot.items() if row in changed)
        before = hot
        out = np.zeros_like(ids)
        look_up(ids, base, tags, out)
        np.testing.assert_array_equal(out.ravel(), [hot.get(token, 2**32 - 1) for token in tokens])


@pytest.mark.parametrize("operation", ["hot_rows", "space_saving"])
def test_bytes_do_not_depend_on_the_number_of_threads(operation):
    call = calls(CASES[1]._replace(rows=601))[operation]
    available, states = numba.get_num_threads(), set()
    try:
        for threads in range(1, available + 1):
            numba.set_num_threads(threads)
            arguments = call.copy()
            version(operation, "cpu")(*arguments.values())
            states.add(b"".join(arguments[output].tobytes() for output in call.outputs))
    finally:
        numba.set_num_threads(available)
    assert len(states) == 1


CAFE = {"method": "cafe", "weights": 2000, "hot_share": 0.2, "init_bound": 0.5}  # 16 rows


def made(backend="cpu", data=HASHED, optimizer="sgd", dtype="float32", **changes):
    settings = embedding_settings(optimizer, **(changes if "method" in changes else CAFE | changes))
    return create(settings, data, select(backend), dtype)


def trace(data=HASHED, batches=12, seed=0):
    """Batches of ids (30, 3) and gradients in steps of 2^-10; which ids are hot changes half-way."""
    rng = np.random.default_rng(seed)
    for number in range(batches):
        drawn = (200 * rng.random((30, 3)) ** 6).astype(np.uint32) + np.uint32(77 * (number >= batches // 2))
        ids = (
            drawn * np.uint32(2654435761) if data.dialect == "hash" else drawn % np.array(data.cardinalities)
        )
        gradients = (rng.integers(-8, 9, (30, 3, 8)) / 1024).astype(np.float32)
        yield ids.astype(np.uint32), gradients


def looked_up(embedding, ids):
    out = np.empty((*ids.shape, embedding.width), embedding.dtype)
    embedding.lookup(ids, out)
    return out


@pytest.mark.kernels
@pytest.mark.parametrize("data", [HASHED, NUMBERED], ids=["hash", "dictionary"])
@pytest.mark.parametrize("method", ["cafe", "adaembed"])
@pytest.mark.parametrize("name", ["reference", *VERSIONS])
def test_rows_and_what_is_hashed_behind_them_are_those_of_the_oracle(name, method, data):
    """Hot ids are trained by themselves, from their hashed row on; others in the row of id modulo rows."""
    size = CAFE if method == "cafe" else {"weights": 400, "init_bound": 0.5}
    embedding = made(name, data, **size | {"method": method}, importance="count", half_life=5)
    tail = [1, 1, 1]
    if method == "cafe":
        hashing = embedding_settings(method="hashing", weights=2000 - 2 * (8 * 8 + 97))
        tail = capped_rows(hashing, data).tolist()
    assert embedding.weights == (16 + sum(tail)) * 8
    first, oracle, own = np.cumsum([16, *tail]), Oracle(), {}
    shared = np.split(embedding.memory.reshape(-1, 8).copy(), first[:-1])[1:]
    hot = set()
    for number, (ids, gradients) in enumerate(trace(data)):
        tokens, state = [], {n: a.tobytes() for n, a in embedding.state().items()}
        for (b, f), found in zip(
            np.ndindex(ids.shape), looked_up(embedding, ids).reshape(-1, 8), strict=True
        ):
            token = (f << 32) + int(ids[b, f])
            tokens.append(token)
            expected = own[token] if token in own else shared[f][int(ids[b, f]) % tail[f]]
            np.testing.assert_array_equal(found, expected)
        assert {n: a.tobytes() for n, a in embedding.state().items()} == state
        embedding.update(ids, gradients, 0.5)
        for token, gradient in zip(tokens, gradients.reshape(-1, 8), strict=True):
            f, i = token >> 32, token % 2**32
            (own[token] if token in own else shared[f][i % tail[f]])[...] -= np.float32(0.5) * gradient
        whole = [data.dialect != "hash" and tail[f] == data.cardinalities[f] for f in range(3)]
        assert whole == [False, data.dialect != "hash" and method == "cafe", False]
        oracle.batch(tokens, [not whole[token >> 32] for token in tokens], number // 5)
        own = {
            t: own[t] if t in own else shared[t >> 32][t % 2**32 % tail[t >> 32]].copy()
            for t in oracle.rows()
        }
        hot |= own.keys()
    assert len(own) == 16 < len(hot)
    assert embedding.describe()["hot"] == {"rows": 16, "in_use": 16, "sketch_bytes": 2 * (WAYS * 12 + 4)}


HOT_ROWS = {"method": "hot", "weights": 2000, "hot_share": 0.2, "init_bound": 0.5, "block": 4}


@pytest.mark.kernels
@pytest.mark.parametrize("online", [False, True], ids=["hash", "dictionary"])
@pytest.mark.parametrize("name", ["reference", *VERSIONS])
def test_hot_ids_in_front_of_an_array_are_those_of_the_oracle(name, online):
    """Hot ids have rows, from what the array says on; the others, and those that cool, are read there."""
    data = NUMBERED if online else HASHED
    embedding = made(name, data, **HOT_ROWS, importance="count", half_life=5, online=online)
    plain = embedding_settings(method="robe", weights=2000 - 2 * 97 - 128, block=4, init_bound=0.5)
    array = create(plain, HASHED, select("reference"))
    assert embedding.weights == 2000 - 2 * 97
    array.memory[...] = embedding.memory[128:]
    oracle, own, hot = Oracle(), {}, set()

    def tail(token):
        """What the array says: an id below 16 is another one there, since these are the rows."""
        ids = np.zeros((1, 3), np.uint32)
        ids[0, token >> 32] = token % 2**32 + 2**31 * (token % 2**32 < 16)
        return ids

    for number, (ids, gradients) in enumerate(trace(data)):
        tokens = [(f << 32) + int(ids[b, f]) for b, f in np.ndindex(ids.shape)]
        for token, found in zip(tokens, looked_up(embedding, ids).reshape(-1, 8), strict=True):
            cold = looked_up(array, tail(token))[0, token >> 32]
            np.testing.assert_array_equal(found, own.get(token, cold))
        embedding.update(ids, gradients, 0.5)
        for token, gradient in zip(tokens, gradients.reshape(-1, 8), strict=True):
            if token in own:
                own[token] -= np.float32(0.5) * gradient
            else:
                d_vectors = np.zeros((1, 3, 8), np.float32)
                d_vectors[0, token >> 32] = gradient
                array.update(tail(token), d_vectors, 0.5)
        oracle.batch(tokens, [1] * len(tokens), number // 5)
        own = {t: own[t] if t in own else looked_up(array, tail(t))[0, t >> 32] for t in oracle.rows()}
        np.testing.assert_array_equal(embedding.memory[128:], array.memory)
        hot |= own.keys()
    assert len(own) == 16 < len(hot)


@pytest.mark.parametrize("memory", ["int8", "int3"])
def test_codes_of_rows_that_change_hands_are_those_of_their_weights(memory):
    """And what Adagrad knows of a row goes with its weights."""
    embedding = made(optimizer="adagrad", memory=memory)
    for ids, gradients in trace():
        embedding.update(ids, gradients, 0.1)
        codes = embedding.memory.copy()
        twin = made(optimizer="adagrad", memory=memory)
        twin.master[...] = embedding.master
        numbers = np.arange(len(codes), dtype=np.uint32)[:, None]
        embedding.backend.kernels.quantise_touched(
            numbers, np.zeros(1, np.uint64), twin.slot_map, twin.master, twin.memory
        )
        np.testing.assert_array_equal(codes[16:], twin.memory[16:])
        used = (embedding.tags[:, :HOT] != EMPTY).reshape(-1)
        np.testing.assert_array_equal(codes[:16][used], twin.memory[:16][used])
    assert used.all()


def test_an_id_that_becomes_hot_takes_the_sums_of_its_row_along():
    embedding = made(optimizer="adagrad", data=NUMBERED)
    for ids, gradients in trace(NUMBERED, 1):
        embedding.update(ids, gradients, 0.1)
    own, sums = (a.reshape(-1, 8) for a in (embedding.memory, embedding.accumulator))
    tokens = embedding.tags[:, :HOT].reshape(-1)
    for row in np.flatnonzero(tokens != EMPTY):
        f, i = int(tokens[row]) >> 32, int(tokens[row]) % 2**32
        cold = int(embedding.cold(f, np.uint32(i)))
        assert cold >= 16
        np.testing.assert_array_equal(own[row], own[cold])
        np.testing.assert_array_equal(sums[row], sums[cold])
        assert (sums[row] > 0).any()


def test_an_id_that_becomes_hot_takes_the_moments_of_adam_along():
    """The mean of its gradients with the signs of its weights, and that of their squares without."""
    embedding = made("reference", optimizer="adam", **HOT_ROWS)
    for ids, gradients in trace(batches=1):
        embedding.update(ids, gradients, 0.1)
    tokens, differ, where = embedding.tags[:, :HOT].reshape(-1), 0, embedding.slot_map

    def read(array, feature, number, **changes):
        found, ids = np.empty((1, 1, 8), np.float32), np.array([[embedding.cold(feature, number)]], np.uint32)
        base = embedding.base[feature : feature + 1]
        embedding.backend.kernels.gather(array, ids, base, where._replace(**changes), found)
        return found[0, 0]

    for row in np.flatnonzero(tokens != EMPTY):
        token, own = (
            (int(tokens[row]) >> 32, np.uint32(int(tokens[row]) % 2**32)),
            slice(8 * row, 8 * row + 8),
        )
        for array in (embedding.memory, embedding.mean):
            np.testing.assert_array_equal(array[own], read(array, *token))
        np.testing.assert_array_equal(embedding.square[own], read(embedding.square, *token, signed=False))
        differ += (embedding.mean[own] != read(embedding.mean, *token, signed=False)).any()
        assert (embedding.square[own] > 0).any()
    assert differ


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["reference", *VERSIONS])
def test_a_step_follows_the_gradient(name):
    """What SGD takes off, over the rate, is the central difference of <vectors, d>, of hot and other ids."""
    embedding, twin = (made(which, dtype="float64") for which in (name, "reference"))
    for ids, gradients in trace(batches=4):
        embedding.update(ids, gradients.astype(np.float64), 0.1)
    for array, other in zip(embedding.state().values(), twin.state().values(), strict=True):
        other[...] = array
    embedding.scale[:] = 0  # so that no row changes hands
    before, gradients = embedding.memory.copy(), np.random.default_rng(1).standard_normal(gradients.shape)
    embedding.update(ids, gradients, 0.25)
    numeric = np.empty_like(before)
    for i, kept in enumerate(before):
        sums = []
        for step in (1e-5, -1e-5):
            twin.memory[i] = kept + step
            sums.append((looked_up(twin, ids) * gradients).sum())
        twin.memory[i] = kept
        numeric[i] = (sums[0] - sums[1]) / 2e-5
    # Vectors are weights, so only round-off (1e-15) over the step is left.
    np.testing.assert_allclose((before - embedding.memory) / 0.25, numeric, rtol=1e-8, atol=1e-8)
    assert (numeric[: 16 * 8] != 0).any()
    assert (numeric[16 * 8 :] != 0).any()


@pytest.mark.parametrize("memory", ["fp32", "int3"])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_planned_bytes_are_those_of_the_arrays(optimizer, memory):
    settings = embedding_settings(optimizer, **CAFE, memory=memory)
    model = build(settings, HASHED, select("cpu"))
    planned, said = plan(settings, HASHED, rows=1), model.embedding.describe()
    for item, size in model.embedding.bytes().items():
        assert planned["memory"][item] == size
    sketch = 2 * (WAYS * 12 + 4)
    assert planned["memory"]["embedding sketch"] == sketch
    assert said["embedding_bytes"] == planned["memory"]["embedding weights"] + sketch
    assert stored_weights(settings, HASHED) == said["embedding_parameters"]
    assert said["compression"] == 1310 * 8 / (said["embedding_parameters"] + sketch / 4)
    assert planned["checkpoint"]["weights and optimizer state"] == sum(
        array.nbytes for array in model.state().values()
    )


def test_hot_rows_take_the_share_of_the_paper():
    """Of the weights that are given, the sketch counted as 4 bytes a weight."""
    data = DataSpec(1, (10**6, 10**6), "hash", "", "test")
    for compression, share in ((2, 0.5), (10, 0.5), (10**1.5, 0.6), (100, 0.7), (1000, 0.8), (20_000, 0.9)):
        given = 2 * 10**6 * 8 / compression
        sets = hot_sets(embedding_settings(method="cafe", compression=compression), data)
        assert sets * (8 * 8 + 97) == pytest.approx(share * given, rel=0.25 if given < 1000 else 0.02)
        total = sets * 97 + stored_weights(embedding_settings(method="cafe", compression=compression), data)
        assert given - 8 < total <= given
    assert hot_sets(embedding_settings(method="cafe", compression=10, hot_share=0), data) == 0
    assert hot_sets(embedding_settings(method="cafe", compression=0.1), NUMBERED) == 164


def test_what_it_refuses():
    with pytest.raises(ConfigError, match="--hot-share must be from 0 to 1, not 2"):
        embedding_settings(method="cafe", hot_share=2.0)
    with pytest.raises(ConfigError, match="--half-life must be positive"):
        embedding_settings(method="cafe", half_life=0)
    with pytest.raises(
        ConfigError, match=r"--hot-share 0\.5 is not for --method robe; it is for --method hot, cafe"
    ):
        embedding_settings(hot_share=0.5)
    with pytest.raises(ConfigError, match="--method cafe takes at least 24 weights"):
        made(weights=20)
    with pytest.raises(ConfigError, match="feature 1 has 10 rows, but an id of the data is 10"):
        made(data=NUMBERED).check(np.array([[999, 10, 5]], np.uint32))
    with pytest.raises(ConfigError, match="--method adaembed takes at least 185 weights"):
        made(method="adaembed", weights=184)
    made(hot_share=0).update(*next(trace()), 0.1)
    with pytest.raises(ConfigError, match="--half-life 5 is for --online; without it the dictionary says"):
        made(data=NUMBERED, **HOT_ROWS, half_life=5)
    with pytest.raises(ConfigError, match="--memory fp16 of --method hot is for inference where a sketch"):
        made(**HOT_ROWS, memory="fp16")
    with pytest.raises(ConfigError, match=r"--hot-share 1 leaves .* less than a block of 4; give more"):
        made(**HOT_ROWS | {"hot_share": 1.0, "weights": 163})


def test_a_sketch_that_no_training_leaves_is_noticed():
    embedding = made()
    for ids, gradients in trace(batches=2):
        embedding.update(ids, gradients, 0.1)
    assert embedding.flaw() is None
    kept = embedding.tags.copy()
    for change, flaw in (
        (lambda: embedding.tags.__setitem__((0, 0), 3 << 32), "an id of feature 3 of 3"),
        (lambda: embedding.tags.__setitem__(slice(None), kept[::-1]), "in a set that is not its own"),
        (lambda: embedding.tags.__setitem__((0, 9), kept[0, 0]), "an id twice"),
        (lambda: embedding.importance.__setitem__((0, 0), -1), "an importance below 0"),
    ):
        change()
        assert flaw in embedding.flaw()
        embedding.tags[...] = kept


@pytest.mark.parametrize("memory", ["fp16", "int8"])
def test_a_converted_sketch_finds_the_same_ids(memory):
    source, target = made(), made(optimizer="none", memory=memory)
    for ids, gradients in trace():
        source.update(ids, gradients, 0.5)
    lost = convert_embedding(source, target, HASHED)
    assert (source.tags[:, :HOT] != EMPTY).all()
    for name in ("tags", "importance", "halved"):
        np.testing.assert_array_equal(getattr(source, name), getattr(target, name))
    off = abs(looked_up(source, ids) - looked_up(target, ids).astype(np.float32)).max()
    assert 0 < off <= lost["largest_error"] < 0.01


def trained(**changes):
    embedding = {"method": "cafe", "weights": 700, "hot_share": 0.4, "half_life": 4} | changes
    optimizer = OptimizerConfig("adagrad", 0.1)
    return dataclasses.replace(config(), embedding=EmbeddingConfig(**embedding), optimizer=optimizer)


MANY = dataclasses.replace(DATA, cardinalities=(200, 40))


def many_rows():
    found = rows()
    for number, part in enumerate(found.values(), 1):
        part.ids = (part.ids**2 * np.uint32(number)) % np.array([200, 40], np.uint32)
    return found


@pytest.mark.parametrize(
    "changes",
    [{"importance": "count"}, {"memory": "int3"}, {"method": "hot"}, {"method": "hot", "memory": "int3"}],
    ids=str,
)
def test_a_run_stopped_anywhere_ends_as_if_it_had_not(changes, tmp_path):
    """Weights, sketch and all; evaluations disturb nothing; and settings survive JSON."""
    settings = trained(**changes)
    assert from_json(json.loads(json.dumps(dataclasses.asdict(settings)))) == settings
    whole = train(settings, MANY, many_rows(), tmp_path / "whole")
    assert 0 < whole["hot"]["in_use"]
    undisturbed = dataclasses.replace(settings, eval_every=1000)
    train(undisturbed, MANY, many_rows(), tmp_path / "undisturbed")
    assert weights_of(tmp_path / "undisturbed") == weights_of(tmp_path / "whole")

    class Stopped(Exception):
        pass

    part = many_rows()
    batches = part["train"].batches

    def stopping(*arguments, **more):
        for number, batch in enumerate(batches(*arguments, **more)):
            if number == 8:
                raise Stopped
            yield batch

    part["train"].batches = stopping
    with pytest.raises(Stopped):
        train(settings, MANY, part, tmp_path / "part")
    resumed = train(settings, MANY, many_rows(), tmp_path / "part")
    assert weights_of(tmp_path / "part") == weights_of(tmp_path / "whole")
    assert resumed["test"] == whole["test"]
    model = checkpoint.load_model(tmp_path / "whole", "cpu")[0]
    assert model.embedding.describe()["hot"] == whole["hot"]


def test_a_pass_that_begins_anew_begins_without_hot_ids():
    embedding, fresh = made(), made()
    for ids, gradients in trace(batches=3):
        embedding.update(ids, gradients, 0.1)
    for one in (embedding, fresh):
        one.begin(1)
    for name, array in fresh.state().items():
        np.testing.assert_array_equal(embedding.state()[name], array)
