"""The rivals to ROBE, and its array with exact rows: what vectors are made of, gradients, steps and sizes."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import EVERY, VERSIONS, resolved

from robe import checkpoint
from robe.backend import select
from robe.checkpoint import Position
from robe.config import ConfigError, DataSpec, from_json
from robe.embeddings import create, declared, stored_weights
from robe.embeddings.hot import exact_rows, share_of
from robe.embeddings.mixed_dimension import widths
from robe.embeddings.quotient_remainder import divisor, divisors
from robe.embeddings.tables import capped_rows
from robe.embeddings.tensor_train import best_rank, core_weights, digits, factors
from robe.interaction import Interaction
from robe.kernels.parts.hashing import K1, mix64, slot_map, slots_reference
from robe.model import build
from robe.plan import plan

CARDINALITIES = (200, 3, 40, 1, 9)
DATA = DataSpec(3, CARDINALITIES, "dictionary", "", "test")
WIDTH, WEIGHTS = 8, 600  # all tables whole have 2,024
RIVALS = {
    "hashing": {"method": "hashing"},
    "frequency": {"method": "frequency"},
    "compositional": {"method": "compositional"},
    "two chunks": {"method": "compositional", "chunks": 2},
    "product": {"method": "quotient_remainder"},
    "sum": {"method": "quotient_remainder", "combine": "add"},
    "tensor_train": {"method": "tensor_train"},
    "hot": {"method": "hot", "hot_share": 0.6},
    "mixed_dimension": {"method": "mixed_dimension"},
    "low dimension": {"method": "mixed_dimension", "alpha": 0.0},
    "cce": {"method": "cce"},
}
each_rival = pytest.mark.parametrize("rival", RIVALS)
each_of_tables = pytest.mark.parametrize("rival", sorted(RIVALS.keys() - {"hot"}))


def settings(rival, optimizer="sgd", **embedding):
    embedding = {"weights": WEIGHTS, "init_bound": 0.5} | RIVALS[rival] | embedding
    model = {"width": WIDTH, "bottom": (4,), "top": (4,)}
    return resolved(model, embedding, {"optimizer": optimizer}, batch=12)


def make(rival, backend="reference", dtype="float64", data=DATA, **changes):
    return create(settings(rival, **changes), data, select(backend), dtype)


def draw(rows=12, seed=0):
    """Ids (B, F), every third row like the first, and a gradient (B, F, D)."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.integers(0, n, rows) for n in CARDINALITIES], axis=1).astype(np.uint32)
    ids[::3] = ids[0]
    return ids, rng.standard_normal((rows, len(CARDINALITIES), WIDTH))


def looked_up(embedding, ids):
    """Vectors (B, F, D), as a model has them: behind the output of the bottom MLP."""
    dtype = next(iter(embedding.state().values())).dtype
    vectors = np.full((len(ids), 1 + len(CARDINALITIES), WIDTH), np.nan, dtype)
    embedding.lookup(ids, vectors[:, 1:])
    return vectors[:, 1:]


def trained_arrays(embedding):
    """Those of `state()` that steps change: all but an index."""
    return {name: array for name, array in embedding.state().items() if array.dtype.kind == "f"}


def split(embedding, rows):
    """The tables of an array, of so many rows each."""
    return np.split(embedding.memory.reshape(sum(rows), -1), np.cumsum(rows)[:-1])


def test_hashing_is_ids_modulo_rows():
    embedding = make("hashing")
    rows, (ids, _) = capped_rows(settings("hashing"), DATA), draw()
    assert rows.tolist() == [31, 3, 31, 1, 9]  # 75 rows of 8
    tables, vectors = split(embedding, rows), looked_up(embedding, ids)
    for (b, f), i in np.ndenumerate(ids):
        np.testing.assert_array_equal(vectors[b, f], tables[f][int(i) % int(rows[f])])


def test_rare_values_share_the_last_row():
    embedding = make("frequency")
    rows, (ids, _) = capped_rows(settings("frequency"), DATA), draw()
    ids[:3, 0] = 29, 30, 31
    tables, vectors = split(embedding, rows), looked_up(embedding, ids)
    for (b, f), i in np.ndenumerate(ids):
        np.testing.assert_array_equal(vectors[b, f], tables[f][min(int(i), int(rows[f]) - 1)])


def test_first_ids_have_rows_and_all_others_are_read_from_the_ring():
    embedding, (ids, _) = make("hot", hash_seed=5, block=4), draw()
    rows = exact_rows(settings("hot"), DATA, WEIGHTS)
    assert rows.tolist() == [14, 3, 13, 1, 9]  # 40 rows of 8: 320 of the 360 weights are a multiple of 64
    ids[:2, [0, 2]] = rows[[0, 2]] - 1, rows[[0, 2]]
    tables = np.split(embedding.memory[:320].reshape(40, WIDTH), np.cumsum(rows)[:-1])
    ring, vectors = embedding.memory[320:], looked_up(embedding, ids)
    where = slot_map("mix", WIDTH, 4, WEIGHTS - 320, seed=5)
    for (b, f), i in np.ndenumerate(ids):
        if i < rows[f]:
            expected = tables[f][i]
        else:
            slots, signs = slots_reference(where, np.array([(f << 32) + 40 + int(i)], np.uint64))
            expected = (signs * ring[slots])[0]
        np.testing.assert_array_equal(vectors[b, f], expected)


def test_exact_rows_start_as_those_of_tables_and_the_ring_as_an_array():
    data = dataclasses.replace(DATA, cardinalities=(4000, 3, 900))
    config = settings("hot", weights=20_000, init_bound=None)
    memory = abs(create(config, data, select("cpu"), "float64").memory)
    ends = np.cumsum(exact_rows(config, data, 20_000) * WIDTH)
    bounds = 4000**-0.5, 3**-0.5, 900**-0.5, (3 / 4903) ** 0.5
    for weights, bound in zip(np.split(memory, ends), bounds, strict=True):
        assert 0.9 * bound < weights.max() <= bound


@pytest.mark.parametrize(
    ("compression", "share"), [(2, 0.5), (10, 0.5), (10**1.5, 0.6), (100, 0.7), (1000, 0.8), (10**5, 0.9)]
)
def test_the_share_of_exact_rows_follows_the_compression(compression, share):
    data = dataclasses.replace(DATA, cardinalities=(10_000_000,))
    given = round(8 * 10_000_000 / compression)
    assert share_of(settings("hot", hot_share=None), data, given) == pytest.approx(share, abs=1e-3)
    asked = settings("hot", hot_share=0.25)
    assert int(exact_rows(asked, data, given).sum()) * WIDTH == given // 4 // 64 * 64


def test_a_ring_without_room_for_a_block_is_refused():
    make("hot", weights=80, hot_share=1.0)
    with pytest.raises(ConfigError, match=r"1 leaves 15 of 79 weights .* less than a block of 16"):
        make("hot", weights=79, hot_share=1.0)


def test_chunks_are_hashed_by_themselves():
    """By the mixer of kernels/parts/hashing.py; features 1, 3 and 4 fit whole, and keep their rows."""
    embedding = make("compositional", hash_seed=5)
    rows, (ids, _) = capped_rows(settings("compositional"), DATA), draw()
    key = int(slot_map("mix", 1, 1, 1, seed=5).key)
    tables, vectors = split(embedding, rows.repeat(4)), looked_up(embedding, ids)
    for (b, f), i in np.ndenumerate(ids):
        for k in range(4):
            row = int(i)
            if rows[f] < CARDINALITIES[f]:
                word = mix64(np.uint64((key + ((4 * f + k << 32) + row) * int(K1)) % 2**64))
                row = (int(word) >> 32) * int(rows[f]) >> 32
            np.testing.assert_array_equal(vectors[b, f, 2 * k : 2 * k + 2], tables[4 * f + k][row])


def test_chunks_collide_as_often_as_independent_hashes():
    """Of pairs of ids, 1 / rows agree in a chunk, and 1 / rows^2 in two."""
    data = dataclasses.replace(DATA, cardinalities=(4000, *CARDINALITIES[1:]))
    shares = []
    for seed in range(8):
        embedding = make("two chunks", data=data, hash_seed=seed)
        ids = np.zeros((4000, 5), np.uint32)
        ids[:, 0] = np.arange(4000)
        rows = embedding.row_of(ids, slice(None))[:, :2]
        n = int(rows.max()) + 1
        one, both = (np.bincount(x) for x in (rows[:, 0], rows[:, 0] * n + rows[:, 1]))
        shares.append(
            [(c.astype(float) * (c - 1)).sum() / 4000 / 3999 * n**k for c, k in ((one, 1), (both, 2))]
        )
    # 8 times 8 million pairs, of which one in 32 or in 1,000 collides, nearly independently: standard errors
    # below 0.004. Hashes that are linear in the id are off by 0.15.
    np.testing.assert_allclose(np.mean(shares, axis=0), 1, rtol=0.02)


@pytest.mark.parametrize(("rival", "combine"), [("product", np.multiply), ("sum", np.add)])
def test_quotient_and_remainder_tell_all_ids_apart(rival, combine):
    embedding, c = make(rival), divisors(settings(rival), DATA)
    quotients = [-(-n // int(d)) for n, d in zip(CARDINALITIES, c, strict=True)]
    above, below = split(embedding.parts["quotient"], quotients), split(embedding.parts["remainder"], c)
    assert c[0] > 1
    for f, n in enumerate(CARDINALITIES):
        ids = np.zeros((n, 5), np.uint32)
        ids[:, f] = np.arange(n)
        vectors = looked_up(embedding, ids)[:, f]
        for i in range(n):
            np.testing.assert_array_equal(vectors[i], combine(above[f][i // c[f]], below[f][i % c[f]]))
        assert len(np.unique(vectors, axis=0)) == n


def test_the_divisor_is_the_smallest_that_fits():
    for n in [*range(1, 60), 97, 100, 101, 10_000, 10_001]:
        sizes = [-(-n // c) + c for c in range(1, n + 1)]
        for rows in (1, 7, min(sizes) - 1, min(sizes), min(sizes) + 3, n, n + 1, n + 9):
            allowed = max(rows, min(sizes))
            assert divisor(n, rows) == 1 + next(i for i, size in enumerate(sizes) if size <= allowed)


def test_tensor_trains_are_products_of_three_matrices():
    embedding, config = make("tensor_train", weights=500), settings("tensor_train", weights=500)
    rank, (d1, d2, d3) = best_rank(config, DATA), factors(WIDTH)
    assert (rank, d1, d2, d3) == (3, 2, 2, 2)
    trains = [f for f, n in enumerate(CARDINALITIES) if core_weights(config, DATA, rank)[f] < n * WIDTH]
    assert trains == [0, 2, 4]
    p = digits([CARDINALITIES[f] for f in trains])
    cores = [split(embedding.parts[f"core{k + 1}"], p[k]) for k in range(3)]
    tables = split(embedding.parts["tables"], (3, 1))
    for f, n in enumerate(CARDINALITIES):
        ids = np.zeros((n, 5), np.uint32)
        ids[:, f] = np.arange(n)
        vectors = looked_up(embedding, ids)[:, f]
        if f not in trains:
            np.testing.assert_array_equal(vectors, tables[[1, 3].index(f)])
            continue
        t = trains.index(f)
        i1, i2, i3 = np.unravel_index(np.arange(n), p[:, t])
        for i in range(n):
            a = cores[0][t][i1[i]].reshape(d1, rank)
            b = cores[1][t][i2[i]].reshape(rank, d2, rank)
            c = cores[2][t][i3[i]].reshape(rank, d3)
            # float64 sums in another order
            np.testing.assert_allclose(vectors[i], np.einsum("ar,rbs,sc->abc", a, b, c).ravel(), atol=1e-15)


def test_factors_and_digits():
    assert [factors(d) for d in (16, 32, 64, 128, 7)] == [
        (2, 2, 4),
        (2, 4, 4),
        (4, 4, 4),
        (4, 4, 8),
        (1, 1, 7),
    ]
    n = np.array([*range(1, 2000), 10_131_227, 39_884_406])
    p = digits(n)
    assert (p.prod(axis=0) >= n).all()
    # Few numbers are wasted, and the digits are near one another.
    assert (p.max(axis=0) <= np.ceil(np.cbrt(n)) + 1).all()


def test_rows_are_shorter_where_there_are_more_ids_and_are_projected():
    embedding = make("mixed_dimension", alpha=0.5)
    found = widths(settings("mixed_dimension", alpha=0.5), DATA)
    assert found.tolist() == [1, 8, 4, 8, 8]  # 1.96, and sqrt(200 / 40) times that
    first, third, _, projections = (part.memory for part in embedding.parts.values())
    tables, projections = split(embedding.parts["tables"], (3, 1, 9)), projections.reshape(-1, WIDTH)
    ids, _ = draw()
    vectors = looked_up(embedding, ids)
    for b, (i, _, j, _, _) in enumerate(ids):
        np.testing.assert_allclose(vectors[b, 0], first[i] * projections[0], rtol=1e-15)
        np.testing.assert_allclose(vectors[b, 2], third.reshape(40, 4)[j] @ projections[1:], atol=1e-15)
        for f, table in zip((1, 3, 4), tables, strict=True):
            np.testing.assert_array_equal(vectors[b, f], table[ids[b, f]])


def test_without_alpha_all_rows_have_one_width():
    """The largest: a row of one more weight in each feature that is projected would be too large."""
    data = dataclasses.replace(DATA, cardinalities=(3000, 300, 900))
    for weights in (5000, 9000, 20_000):
        config = settings("low dimension", weights=weights)
        (width,) = set(widths(config, data))
        assert stored_weights(config, data) == width * (4200 + 3 * WIDTH) <= weights
        assert (width + 1) * (4200 + 3 * WIDTH) > weights
    whole = settings("low dimension", weights=8 * 4200)
    assert declared(whole, data)["projections"].count == 0
    ids = np.zeros((2, 3), np.uint32)
    embedding, vectors = create(whole, data, select("cpu")), np.empty((2, 3, WIDTH), np.float32)
    embedding.update(ids, np.ones_like(vectors), 0.5)
    embedding.lookup(ids, vectors)
    np.testing.assert_array_equal(vectors[0, 1], embedding.parts["tables"].memory[3000 * 8 :][:8])


@pytest.mark.kernels
@each_rival
@pytest.mark.parametrize("name", EVERY)
def test_a_step_follows_the_gradient(rival, name):
    """What SGD takes off, over the rate, is the central difference of <vectors, d>, by every weight."""
    embedding = make(rival, name)
    ids, d_vectors = draw()
    before = {key: array.copy() for key, array in trained_arrays(embedding).items()}
    embedding.update(ids, d_vectors, 0.25)
    gradient = {key: (before[key] - array) / 0.25 for key, array in trained_arrays(embedding).items()}
    twin = make(rival)
    for key, array in trained_arrays(twin).items():
        numeric = np.empty_like(array)
        for i, kept in enumerate(array.copy()):
            sums = []
            for step in (1e-5, -1e-5):
                array[i] = kept + step
                sums.append((looked_up(twin, ids) * d_vectors).sum())
            array[i] = kept
            numeric[i] = (sums[0] - sums[1]) / 2e-5
        # Vectors are of degree one in every weight, so only round-off (1e-15) over the step is left.
        np.testing.assert_allclose(gradient[key], numeric, rtol=1e-8, atol=1e-8, err_msg=key)
        assert (gradient[key] != 0).any()


@pytest.mark.kernels
@each_rival
@pytest.mark.parametrize("name", EVERY)
def test_adagrad_steps_by_the_sum_over_the_batch(rival, name):
    """Its steps are those of the formula, for the gradients that SGD takes of the same weights."""
    embedding, expected = make(rival, name, optimizer="adagrad"), make(rival)
    squares = {key: np.zeros_like(array) for key, array in trained_arrays(expected).items()}
    for seed in range(3):
        ids, d_vectors = draw(seed=seed)
        before = {key: array.copy() for key, array in trained_arrays(expected).items()}
        embedding.update(ids, d_vectors, 0.1)
        expected.update(ids, d_vectors, 1.0)
        for key, array in trained_arrays(expected).items():
            gradient = before[key] - array
            squares[key] += gradient**2
            array[...] = before[key] - 0.1 * gradient / (np.sqrt(squares[key]) + 1e-8)
            # The gradient is the difference of weights, so it has lost some of its 16 digits; where it is 0
            # but for round-off, a step may be of any size.
            sure = (np.abs(gradient) > 1e-9) | (gradient == 0)
            np.testing.assert_allclose(
                trained_arrays(embedding)[key][sure], array[sure], rtol=1e-6, atol=1e-7
            )
            assert sure.mean() > 0.95


@pytest.mark.kernels
@each_rival
@pytest.mark.parametrize("name", VERSIONS)
def test_all_backends_agree(rival, name):
    here, reference = make(rival, name, "float32"), make(rival, dtype="float32")
    ids, _ = draw()
    # float32 sums of few products in another order
    np.testing.assert_allclose(looked_up(here, ids), looked_up(reference, ids), rtol=1e-5, atol=1e-6)


@each_rival
def test_interaction_is_that_of_the_vectors(rival):
    embedding, (ids, _) = make(rival, "cpu"), draw()
    first = np.random.default_rng(1).standard_normal((len(ids), WIDTH))
    vectors = np.concatenate([first[:, None], looked_up(embedding, ids)], axis=1)
    i, j = np.tril_indices(6, -1)
    out = Interaction(embedding, len(ids), embedding.backend, "float64").predict(first, ids)
    expected = np.concatenate([first, (vectors[:, i] * vectors[:, j]).sum(axis=-1)], axis=1)
    np.testing.assert_allclose(out, expected, rtol=1e-12)


@pytest.mark.kernels
@each_rival
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize("name", VERSIONS)
def test_backward_is_interaction_backward_and_update(rival, optimizer, name):
    here, reference = (make(rival, which, optimizer=optimizer) for which in (name, "reference"))
    ids, _ = draw()
    rng = np.random.default_rng(1)
    vectors, d_out = rng.standard_normal((12, 6, WIDTH)), rng.standard_normal((12, WIDTH + 15))
    expected = np.full_like(vectors, np.nan)
    layer = Interaction(here, len(ids), here.backend, "float64")
    layer.vectors[...] = vectors
    d_first = layer.backward(d_out, ids, 0.1)
    reference.backend.kernels.interaction_backward(d_out, vectors, expected)
    reference.update(ids, expected[:, 1:], 0.1)
    # float64 sums in another order
    np.testing.assert_allclose(d_first, expected[:, 0], rtol=1e-9, atol=1e-12)
    for (key, array), other in zip(here.state().items(), reference.state().values(), strict=True):
        np.testing.assert_allclose(array, other, rtol=1e-9, atol=1e-12, err_msg=key)


@each_rival
def test_adam_corrects_by_the_number_of_the_step(rival):
    """Of a training that goes on, too, whose parts do not know it."""
    ids, gradient = draw()
    one, other, late = (make(rival, optimizer="adam") for _ in range(3))
    for step in range(2):
        one.update(ids, gradient, 0.1)
        if step == 0:
            for name, array in one.state().items():
                other.state()[name][...] = late.state()[name][...] = array
    other.steps, late.steps = 1, 5
    other.update(ids, gradient, 0.1)
    late.update(ids, gradient, 0.1)
    assert one.steps == other.steps == 2
    for name, array in one.state().items():
        np.testing.assert_array_equal(array, other.state()[name], err_msg=name)
        if name.endswith("memory"):
            assert not np.allclose(array, late.state()[name], rtol=1e-6, atol=1e-6)


@each_rival
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_planned_bytes_are_those_of_the_arrays(rival, optimizer):
    config = settings(rival, optimizer)
    model = build(config, DATA, select("cpu"))
    planned, said = plan(config, DATA, rows=1), model.embedding.describe()
    for item, size in model.embedding.bytes().items():
        assert planned["memory"][item] == size
    state = model.embedding.state()
    weights = sum(array.size for name, array in state.items() if name.endswith("memory"))
    assert stored_weights(config, DATA) == weights == said["embedding_parameters"]
    assert planned["memory"]["embedding weights"] == 4 * weights
    assert said["embedding_bytes"] == 4 * weights + planned["memory"].get("embedding index", 0)
    everything = sum(array.nbytes for array in model.state().values())
    assert planned["checkpoint"]["weights and optimizer state"] == everything


@each_of_tables
def test_sizes_keep_to_the_budget_and_use_it(rival):
    """A table more or a rank more would be too large; with enough all tables are whole."""
    given = range(480, 4000, 7)
    sizes = np.array([stored_weights(settings(rival, weights=weights), DATA) for weights in given])
    assert (np.diff(sizes) >= 0).all()
    left = given - sizes
    assert (left >= 0).all()
    remainders = 5 * WIDTH if rival in ("product", "sum") else 0
    assert sizes[-1] == sum(CARDINALITIES) * WIDTH + remainders
    if RIVALS[rival]["method"] in ("hashing", "frequency", "compositional"):
        assert (left[sizes < sizes[-1]] < WIDTH).all()


@each_of_tables
def test_too_few_weights_are_refused(rival):
    method = RIVALS[rival]["method"]
    with pytest.raises(ConfigError, match=f"--method {method} takes at least .* is given 39; give more"):
        create(settings(rival, weights=39), DATA, select("cpu"))


@pytest.mark.parametrize(
    "rival", sorted(RIVALS.keys() - {"frequency", "hot"})
)  # of which one row stands for many ids, or weights for several features
def test_vectors_start_as_those_of_full_tables(rival):
    """Their elements have the variance a^2 / 3 = 1 / (3 n) of a feature of n values, whatever makes them."""
    data = dataclasses.replace(DATA, cardinalities=(3000, 3, 2000, 1, 900))
    ids = np.random.default_rng(0).integers(0, [900, 3, 900, 1, 900], (900, 5)).astype(np.uint32)
    ids[:, 0], ids[:, 2], ids[:, 4] = np.arange(900), np.arange(1100, 2000), np.arange(900)
    mean = []
    for seed in range(6):
        config = dataclasses.replace(settings(rival, weights=12_000, init_bound=None), seed=seed)
        vectors = looked_up(create(config, data, select("cpu"), "float64"), ids)
        mean.append([(vectors[:, f] ** 2).mean() * 3 * data.cardinalities[f] for f in (0, 2, 4)])
    # 6 seeds of some hundred to thousand weights; a forgotten square or root is off by a factor of n.
    np.testing.assert_allclose(np.mean(mean, axis=0), 1, rtol=0.25)


def test_only_some_take_hashed_ids():
    hashed = dataclasses.replace(DATA, dialect="hash")
    ids = np.random.default_rng(0).integers(0, 2**32, (50, 5), np.uint32)
    for rival in ("hashing", "compositional"):
        embedding = make(rival, "cpu", data=hashed)
        embedding.check(ids)
        assert np.isfinite(looked_up(embedding, ids)).all()
    for rival in ("frequency", "product", "tensor_train", "mixed_dimension", "cce"):
        with pytest.raises(ConfigError, match=r"the ids of these data \(hash\); .* --ids dictionary"):
            make(rival, data=hashed)
    modulo = dataclasses.replace(DATA, dialect="modulo")
    with pytest.raises(ConfigError, match=r"the ids of these data \(modulo\)"):
        make("frequency", data=modulo)
    make("tensor_train", data=modulo)


@each_rival
def test_ids_without_a_row_are_refused(rival):
    embedding = make(rival)
    with pytest.raises(ConfigError, match="feature 2 has 40 rows, but an id of the data is 40"):
        embedding.check(np.array([[0, 0, 40, 0, 0]], np.uint32))


def test_chunks_must_divide_the_width():
    for rival in ("compositional", "cce"):
        with pytest.raises(ConfigError, match="--chunks 3 must divide the width 8"):
            make(rival, chunks=3)


@each_rival
def test_a_checkpoint_holds_all_of_it(rival, tmp_path):
    """Two more steps from a checkpoint are those of the model that wrote it; its settings survive JSON."""
    config = settings(rival, "adagrad")
    assert from_json(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    rng, (ids, _) = np.random.default_rng(0), draw()
    batch = rng.integers(0, 2, 12).astype(np.float32), rng.random((12, 3), np.float32), ids
    model = build(config, DATA, select("cpu"))
    model.step(*batch, 0.1)
    saved = checkpoint.save(tmp_path, model, config, DATA, Position(1))
    other = build(dataclasses.replace(config, seed=1), DATA, select("cpu"))
    checkpoint.load_weights(saved, other)
    for _ in range(2):
        model.step(*batch, 0.1)
        other.step(*batch, 0.1)
    for (name, array), found in zip(model.state().items(), other.state().values(), strict=True):
        np.testing.assert_array_equal(array, found, err_msg=name)
