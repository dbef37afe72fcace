"""Tables pruned in training: what is stored of them, what is pruned, and a verdict that can fail."""

import dataclasses

import numpy as np
import pytest
from trainings_made import trained

from analysis import pruned_rows
from analysis.pruned_rows import BEGINS, CHUNKS, FULL, RANDOM, SHARE, UTILITY, WIDTH, most_chunks
from data_pipeline.folders import open_folder
from robe.config import ConfigError, EmbeddingConfig, OptimizerConfig, TrainConfig, resolve

TINY = dataclasses.replace(pruned_rows.QUICK, rows=4000, seeds=2, scale=0.005)


@pytest.mark.parametrize("rows", [1, 31, 32, 65, 300])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_rows_are_read_from_what_is_stored(rows, share, rng):
    table = rng.standard_normal((rows, WIDTH)).astype(np.float32)
    kept = rng.random((rows, CHUNKS)) < share
    table.reshape(rows, CHUNKS, -1)[~kept] = 0
    stored = pruned_rows.packed(table)
    assert stored["weights"].nbytes == kept.sum() * 16
    assert stored["bits"].nbytes == -(-rows * CHUNKS // 8)
    assert stored["begins"].nbytes == 4 * -(-rows // BEGINS)
    for i in range(rows):
        np.testing.assert_array_equal(pruned_rows.unpacked(stored, i), table[i])


@pytest.mark.parametrize("rows", [100, 1001])
@pytest.mark.parametrize("share", [0.01, 0.35, 0.9])
def test_as_many_chunks_are_left_as_fit_and_no_more(rows, share):
    def size(chunks):
        table = np.zeros((rows * CHUNKS, WIDTH // CHUNKS), np.float32)
        table[:chunks] = 1
        return sum(array.nbytes for array in pruned_rows.packed(table.reshape(rows, WIDTH)).values())

    most = most_chunks(rows, share)
    allowed = share * rows * WIDTH * 4
    assert size(most) <= allowed < size(most + 1) or (most == 0 and size(0) > allowed)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    return folder, pruned_rows.measure(quick=True, study=TINY, cache=folder, say=lambda text: None)


def pruned_table(cache, by):
    manifest = open_folder(next(cache[0].glob("data-*/prepared")))
    made = pruned_rows.PrunedTrainings(manifest, 32, cache[0], print)
    config = TrainConfig(embedding=EmbeddingConfig("full"), optimizer=OptimizerConfig("adagrad"), seed=3)
    return made.made(resolve(config), by=by, share=SHARE).embedding


def test_chunks_of_the_least_utility_are_pruned_and_stay_so(cache, rng):
    table = pruned_table(cache, UTILITY)
    sizes = table.rows.astype(int)
    ids = np.stack([rng.integers(0, n, 200) for n in sizes], axis=1).astype(np.uint32)
    d_vectors = rng.standard_normal((200, len(sizes), WIDTH)).astype(np.float32)
    table.update(ids, d_vectors, 0.1)
    sums = table.accumulator.reshape(-1, CHUNKS, WIDTH // CHUNKS).sum(axis=2)
    before = table.memory.copy()
    table.halfway()
    chunks = table.memory.reshape(*sums.shape, -1)
    left = chunks.any(axis=2)
    assert left.sum() == most_chunks(len(sums), SHARE)
    assert sums[left].min() >= sums[~left].max()
    np.testing.assert_array_equal(chunks[left], before.reshape(chunks.shape)[left])
    kept = chunks[left].copy()
    table.update((ids + 1) % table.rows, d_vectors, 0.1)  # of which many were not seen, and so are pruned
    np.testing.assert_array_equal(chunks.any(axis=2), left)
    assert (chunks[left] != kept).any()
    table.halfway()
    np.testing.assert_array_equal(chunks.any(axis=2), left)


def test_pruned_at_random_others_are_left(cache):
    by_seed = pruned_table(cache, RANDOM)
    by_seed.halfway()
    left = by_seed.memory.reshape(-1, CHUNKS, WIDTH // CHUNKS).any(axis=2)
    assert left.sum() == most_chunks(len(left), SHARE)
    # No feature is spared, and none is pruned more than others.
    assert abs(left.mean() - left[: len(left) // 2].mean()) < 0.05


def test_trainings_are_kept_and_tell_their_bytes(cache, monkeypatch):
    folder, rows = cache
    made = trained(monkeypatch)
    assert pruned_rows.measure(quick=True, study=TINY, cache=folder, say=lambda text: None) == rows
    assert made == []
    assert [(row["pruned"], row["seed"]) for row in rows] == [
        (by, seed) for seed in (1, 2) for by in (FULL, UTILITY, RANDOM)
    ]
    for row in rows:
        assert (
            row["share_of_bytes"] == 1.0 if row["pruned"] == FULL else 0.345 < row["share_of_bytes"] <= 0.35
        )
    assert len({row["auc"] for row in rows}) == 6
    with pytest.raises(ConfigError, match="an interval needs 2"):
        pruned_rows.measure(quick=True, study=TINY, seeds=1, cache=folder)


def planted(spread=1e-4, share=SHARE, **changes):
    rng = np.random.default_rng(0)
    auc = {FULL: 0.79, UTILITY: 0.7895, RANDOM: 0.775} | changes
    return [
        {"pruned": by, "share": 1.0 if by == FULL else SHARE, "seed": seed, "synthetic": True}
        | {"share_of_bytes": 1.0 if by == FULL else share, "auc": value + spread * rng.standard_normal()}
        for seed in range(4)
        for by, value in auc.items()
    ]


def test_the_verdict_accepts_what_the_claim_says(tmp_path):
    verdict = pruned_rows.verdict(planted())
    assert verdict.holds, verdict.text
    pruned_rows.plot(planted()).savefig(tmp_path / "figure.png")


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("bytes", {"share": 0.3501}),
        ("quality", {UTILITY: 0.788}),
        ("utility", {RANDOM: 0.7895}),
    ],
)
def test_the_verdict_refuses_a_planted_wrong_result(part, wrong):
    verdict = pruned_rows.verdict(planted(**wrong))
    assert [check.what.split(":")[0] for check in verdict.checks if not check.holds] == [part]
