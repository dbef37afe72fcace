"""Ways to make more of an array that were tried: what they read, their gradients and bytes, a verdict."""

import dataclasses
from functools import partial

import numpy as np
import pytest
from conftest import resolved
from trainings_made import trained

from analysis import tried
from analysis.tried import COMPRESSIONS, DIVIDED, KNOWN, ROBE, ROBE_SGD, STRETCHED, WAYS
from analysis.tried_embeddings import (
    KEY,
    PlacedEmbedding,
    divided,
    folded,
    placed,
    readers_of,
    scaled,
    stored_bytes,
    stretched,
    summed,
)
from robe.backend import select
from robe.config import ConfigError, DataSpec
from robe.embeddings import create
from robe.kernels.parts.hashing import slots_reference

DATA = DataSpec(3, (200, 3, 40, 1, 9), "dictionary", "", "test")
WIDTH, WEIGHTS = 8, 600  # all tables whole have 2,024
MADE = {
    "two readings": summed,
    "three readings": partial(summed, readings=3),
    "scales": scaled,
    "fold": folded,
    "places": placed,
}
TINY = dataclasses.replace(tried.QUICK, rows=4000, seeds=2, most=2, ways=("fold", "scale per row"))


def make(way, optimizer="sgd", dtype="float64", weights=WEIGHTS):
    embedding = {"weights": weights, "init_bound": 0.5, "block": 8, "hash_seed": 3}
    config = resolved({"width": WIDTH}, embedding, {"optimizer": optimizer}, batch=12)
    return (MADE | {"divided": divided, "stretched": stretched, "array": create})[way](
        config, DATA, select("cpu"), dtype
    )


def draw(rows=12, seed=0):
    """Ids (B, F), every third row like the first, and a gradient (B, F, D)."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.integers(0, n, rows) for n in DATA.cardinalities], axis=1).astype(np.uint32)
    ids[::3] = ids[0]
    return ids, rng.standard_normal((rows, len(DATA.cardinalities), WIDTH))


def looked_up(embedding, ids):
    """Vectors (B, F, D), as a model has them: behind the output of the bottom MLP."""
    vectors = np.full(
        (len(ids), 1 + ids.shape[1], WIDTH), np.nan, next(iter(arrays(embedding).values())).dtype
    )
    embedding.lookup(ids, vectors[:, 1:])
    return vectors[:, 1:]


def arrays(embedding):
    """Name -> the weights that it is trained by."""
    own = {"own": embedding.own.memory} if isinstance(embedding, PlacedEmbedding) else {}
    return {name: part.memory for name, part in embedding.parts.items()} | own


@pytest.mark.parametrize("half", [1, 2])
@pytest.mark.parametrize("way", MADE)
def test_a_step_follows_the_gradient(way, half):
    """What SGD takes off, over the rate, is the central difference of <vectors, d>, by every weight."""
    embedding, twin = make(way), make(way)
    for one in (embedding, twin):
        if "scales" in one.parts:  # they begin at 0
            one.parts["scales"].memory[:] = np.linspace(-0.4, 0.4, one.parts["scales"].weights)
        if half == 2:
            one.halfway()
    ids, d_vectors = draw()
    before = {name: array.copy() for name, array in arrays(embedding).items()}
    embedding.update(ids, d_vectors, 0.25)
    for name, array in arrays(twin).items():
        numeric = np.empty_like(array)
        for i, kept in enumerate(array.copy()):
            sums = []
            for step in (1e-5, -1e-5):
                array[i] = kept + step
                sums.append((looked_up(twin, ids) * d_vectors).sum())
            array[i] = kept
            numeric[i] = (sums[0] - sums[1]) / 2e-5
        gradient = (before[name] - arrays(embedding)[name]) / 0.25
        # Vectors are of degree one in every weight, so only round-off (1e-15) over the step is left.
        np.testing.assert_allclose(gradient, numeric, rtol=1e-8, atol=1e-8, err_msg=name)
        assert (gradient != 0).any() == (name != "own" or half == 1)


def test_steps_are_divided_by_readers():
    array, parts = make("array"), make("divided")
    readers = np.zeros(WEIGHTS)
    for f, n in enumerate(DATA.cardinalities):
        for i in range(n):
            slots, _ = slots_reference(array.slot_map, array.base[f : f + 1] + np.uint64(i))
            np.add.at(readers, slots[0], 1)
    assert readers.sum() == 253 * WIDTH
    np.testing.assert_array_equal(readers_of(parts, DATA.cardinalities), np.maximum(readers, 1))
    before, (ids, d_vectors) = array.memory.copy(), draw()
    np.testing.assert_array_equal(parts.memory, before)
    array.update(ids, d_vectors, 0.25)
    parts.update(ids, d_vectors, 0.25)
    expected = before + (array.memory - before) / np.maximum(readers, 1)
    np.testing.assert_allclose(parts.memory, expected, rtol=1e-12, atol=1e-15)
    assert (parts.memory != before).any()


def test_learned_scales_follow_their_gradient():
    """That of LSQ: what look-ups read is linear in each weight between the outer levels, and in the log of a
    scale as far as the levels of its weights stay; of a weight beyond, in the scale alone."""
    embedding, twin, (ids, d_vectors) = make("stretched", "adagrad"), make("array"), draw()
    embedding.stretch[:] = np.linspace(-0.5, 0.3, 10)[:, None]  # in some groups weights lie beyond
    embedding._show()
    weights, t = np.append(embedding.memory, np.zeros(40)).reshape(10, 64), embedding.stretch.copy()
    scale = np.exp(t) * abs(weights).max(axis=1, keepdims=True) / 7
    levels = np.clip(np.round(weights / scale), -8, 7)
    np.testing.assert_allclose(embedding.shown, (levels * scale).ravel()[:WEIGHTS])
    outside = (weights / scale > 7) | (weights / scale < -8)
    assert 0 < outside.sum() < 100
    twin.memory[:] = 0
    twin.update(ids, d_vectors, 1.0)
    by_shown = np.append(-twin.memory, np.zeros(40)).reshape(10, 64)
    # Adagrad's first step of the rate r is r times the sign; the sums are the squares.
    embedding.update(ids, d_vectors, 0.1)
    np.testing.assert_allclose(
        embedding.accumulator, (by_shown * ~outside).ravel()[:WEIGHTS] ** 2, atol=1e-12
    )
    read = np.where(outside, levels * scale, levels * scale - weights)
    by_t = (by_shown * read).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(embedding.squares, by_t**2, rtol=1e-9)
    np.testing.assert_allclose(embedding.stretch, t - 0.1 * np.sign(by_t), atol=1e-5)
    out = looked_up(embedding, ids)
    twin.memory[:] = embedding.shown
    np.testing.assert_array_equal(out, looked_up(twin, ids))
    assert embedding.looks_up_by is None  # a kernel that does more at once would read `memory`
    assert stored_bytes(embedding) == 10 * (32 + 2)
    embedding.begin(1)
    assert not embedding.stretch.any()
    assert not embedding.squares.any()


@pytest.mark.parametrize("weights", [253 * WIDTH, 600, 599, 97])
def test_slots_of_a_fold_have_as_many_readers(weights):
    """To within one; an array as large as the table has one each."""
    fold = make("fold", weights=weights)
    readers = np.zeros(weights, int)
    for f, n in enumerate(DATA.cardinalities):
        ids = np.zeros((n, 5), np.uint32)
        ids[:, f] = np.arange(n)
        slots, _ = slots_reference(
            fold.slot_map, fold.base[f] + fold.row_of(ids, slice(None))[:, f].astype(np.uint64)
        )
        np.add.at(readers, slots.ravel(), 1)
    assert readers.sum() == 253 * WIDTH
    assert readers.max() - readers.min() <= 1


def test_places_are_those_of_the_nearest_blocks():
    """Halfway each chunk of a learned id becomes one of `k` means; the ids behind read what they did."""
    embedding = make("places", "adagrad")
    ids = np.stack([np.arange(200) % n for n in DATA.cardinalities], axis=1).astype(np.uint32)
    learned = ids < embedding.hot
    assert embedding.hot.tolist() == [23, 3, 22, 1, 9]
    embedding.update(*draw(), 0.1)
    before, sums = looked_up(embedding, ids), embedding.own.accumulator.reshape(-1, 4, 2)
    embedding.halfway()
    after = looked_up(embedding, ids)
    np.testing.assert_array_equal(after[~learned], before[~learned])
    chunks, own = after[learned].reshape(-1, 4, 2), embedding.own.memory.reshape(-1, 4, 2)
    for j in range(4):
        found = np.unique(chunks[:, j], axis=0)
        assert 2 <= len(found) <= embedding.k == 8
        first = slice(j * 16, (j + 1) * 16)
        means, kept = (a[first].reshape(8, 2) for a in (embedding.memory, embedding.accumulator))
        nearest = ((own[:, j, None] - means) ** 2).sum(axis=2).argmin(axis=1)
        assert (nearest == embedding.index[:, j]).mean() > 0.9  # means move once more after the last round
        for place in np.unique(embedding.index[:, j]):
            mine = embedding.index[:, j] == place
            np.testing.assert_allclose(means[place], own[mine, j].mean(axis=0))
            np.testing.assert_allclose(kept[place], sums[mine, j].mean(axis=0))
    embedding.begin(1)
    assert len(np.unique(looked_up(embedding, ids)[learned], axis=0)) == embedding.hot.sum()


@pytest.mark.parametrize("weights", [WEIGHTS, 97])
@pytest.mark.parametrize("way", [*MADE, "divided"])
def test_ways_take_the_bytes_of_the_array(way, weights):
    embedding = make(way, dtype="float32", weights=weights)
    assert 4 * weights - 4 < stored_bytes(embedding) <= 4 * weights
    if way == "places":
        assert stored_bytes(embedding) == embedding.memory.nbytes + embedding.hot.sum() * (4 + KEY)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    return folder, tried.measure(study=TINY, cache=folder, say=lambda text: None)


def test_trainings_are_kept_and_one_that_was_killed_begins_anew(cache, monkeypatch):
    folder, rows = cache
    made = trained(monkeypatch)
    killed = next(folder.glob("*/summary.json")).parent
    (killed / "summary.json").unlink()
    (killed / "checkpoints" / "step_00000013").mkdir(parents=True)
    assert tried.measure(study=TINY, cache=folder, say=lambda text: None) == rows
    assert len(made) == 1
    scored = [row for row in rows if row["kind"] == "score"]
    assert [(row["seed"], row["compression"], row["way"]) for row in scored] == [
        (seed, c, way) for seed in (1, 2) for c in COMPRESSIONS for way in (ROBE, *TINY.ways)
    ]
    assert len({row["log_loss"] for row in scored}) == 12
    for row, size in zip((row for row in rows if row["kind"] == "read"), COMPRESSIONS, strict=True):
        assert row["readers"] == pytest.approx(size, rel=0.01)
        assert row["p"] <= row["most_read"] < 3 * row["theory"]
        assert row["theory"] - row["p"] == pytest.approx(26 * 16 / row["weights"])
    assert 0 < next(row["apart"] for row in rows if row["kind"] == "adagrad") < 1e-9
    with pytest.raises(ConfigError, match="'folds' is no way of this study"):
        tried.measure(study=TINY, ways=("folds",), cache=folder)


def planted(spread=1e-4, apart=1e-12, most_read=0.6, stored=0, small=1.0, **changes):
    rng = np.random.default_rng(0)
    auc = (
        dict.fromkeys(WAYS, 0.77) | {ROBE_SGD: 0.76, DIVIDED: 0.757, KNOWN: 0.785, STRETCHED: 0.78} | changes
    )
    noise = {way: spread * rng.standard_normal(4) for way in WAYS}
    scored = [
        {"kind": "score", "way": way, "compression": c, "rate": 0.03, "seed": seed, "first_stage": True}
        | {
            "auc": auc[way] + noise[way][seed],
            "synthetic": True,
            "stored_bytes": 1000 + stored * (way != ROBE),
        }
        for seed in range(4)
        for c in COMPRESSIONS
        for way in WAYS
    ]
    read = [
        {"kind": "read", "compression": c, "most_read": most_read, "theory": 0.5, "p": 0.4, "readers": c}
        for c in COMPRESSIONS
    ]
    tuned = [
        {
            "kind": "tuned",
            "tuned": ROBE_SGD,
            "compression": c,
            "rate": rate,
            "validation_auc": 0.7 + (rate == best),
        }
        for c, best in zip(COMPRESSIONS, (1.0, small), strict=True)
        for rate in (0.1, 1.0)
    ]
    return [*scored, *tuned, *read, {"kind": "adagrad", "apart": apart}]


def test_the_verdict_accepts_what_the_claim_says(tmp_path):
    verdict = tried.verdict(planted())
    assert verdict.holds, verdict.text
    tried.plot(planted()).savefig(tmp_path / "figure.png")
    lines = tried.table(tried.summarise(planted())).splitlines()
    assert len(lines) == 4 + 2 * len(WAYS)
    assert [line.split(" | ")[1] for line in lines if "**" in line] == 2 * [KNOWN]
    assert tried.held_against(STRETCHED) == (ROBE, KNOWN, STRETCHED)


@pytest.mark.parametrize(
    ("told", "wrong"),
    [
        ("fold does not gain", {"fold": 0.7705}),
        (f"{DIVIDED} does not gain", {DIVIDED: 0.7605}),
        (f"{STRETCHED} does not gain", {STRETCHED: 0.7857}),
        (f"known: {KNOWN} gains", {KNOWN: 0.7699, STRETCHED: 0.769}),
        ("bytes", {"stored": 1}),
        ("theory: at", {"most_read": 1.6}),
        ("theory: under Adagrad", {"apart": 1e-3}),
        ("theory: the best rate of SGD", {"small": 0.1}),
    ],
)
def test_the_verdict_refuses_a_planted_wrong_result(told, wrong):
    verdict = tried.verdict(planted(**wrong))
    failed = [check.what for check in verdict.checks if not check.holds]
    assert failed
    assert all(what.startswith(told) for what in failed)


def test_seeds_follow_the_widest_difference():
    assert tried.wanted(planted(1e-5), 0.0005) == 4
    assert tried.wanted(planted(1e-3), 0.0005) > 8
