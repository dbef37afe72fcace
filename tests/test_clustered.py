"""Clusters, and the embedding whose index they are: what it reads, clusters, keeps and refuses."""

import dataclasses

import numpy as np
import pytest
from conftest import VERSIONS, resolved
from test_rivals import CARDINALITIES, DATA, WIDTH, draw, looked_up, make, settings
from test_train import MemoryRows, Stopped, stopping, train, weights_of

from robe import checkpoint
from robe.backend import select
from robe.config import OptimizerConfig
from robe.convert import convert_embedding
from robe.embeddings import create, planned_bytes
from robe.embeddings.cce import sizes
from robe.embeddings.clusters import clustered, means, nearest
from robe.kernels.parts.hashing import K1, mix64, slot_map

EVERY = np.stack([np.arange(200) % n for n in CARDINALITIES], axis=1).astype(np.uint32)


@pytest.mark.parametrize("dimensions", [2, 7])
def test_clusters_that_lie_apart_are_found(dimensions, rng, monkeypatch):
    monkeypatch.setattr("robe.embeddings.clusters.AT_ONCE", 100)
    centres = 10 * rng.permutation(np.eye(dimensions, dtype=np.float32))
    which = rng.integers(0, dimensions, 400)
    points = centres[which] + rng.normal(0, 0.1, (400, dimensions)).astype(np.float32)
    # Points to begin with that lie apart; Lloyd's rounds do not leave a bad beginning.
    first = np.unique(which, return_index=True)[1]
    ordered = np.concatenate([points[first], points])
    fixed = type("fixed", (), {"permutation": staticmethod(np.arange)})
    found = clustered(ordered, dimensions, fixed)
    np.testing.assert_array_equal(found[dimensions:], found[:dimensions][which])
    centroids = means(points, found[dimensions:], np.zeros_like(centres))
    distances = np.linalg.norm(points[:, None] - centroids, axis=2)
    np.testing.assert_array_equal(nearest(points, centroids), distances.argmin(axis=1))


@pytest.mark.filterwarnings("ignore:(overflow|invalid):RuntimeWarning")  # which a training ignores too
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_training_that_diverged_is_clustered_without_an_error(value):
    """It ends at its next log, in a line."""
    embedding = make("cce", "cpu", "float32", weights=720)
    embedding.parts["tables"].memory[:50] = value
    embedding.halfway()
    assert embedding.flaw() is None
    embedding.parts["tables"].memory[:] = value
    embedding.halfway()
    assert embedding.flaw() is None


def test_means_of_clusters_and_of_none():
    values = np.array([[1, 2], [3, 4], [5, 9]], np.float32)
    found = means(values, np.array([2, 0, 2]), np.full((3, 2), 7, np.float32))
    np.testing.assert_array_equal(found, [[3, 4], [7, 7], [3, 5.5]])
    assert found.dtype == np.float32


def hashes(which, f, j, k, seed):
    """Of all 200 ids of feature f, in Python's integers."""
    key, token = int(slot_map("mix", 1, 1, 1, seed=seed).key), (which << 52) + (4 * f + j << 32)
    words = [int(mix64(np.uint64((key + (token + i) * int(K1)) % 2**64))) for i in range(200)]
    return [(word >> 32) * k >> 32 for word in words]


def chunks_of(embedding, k):
    """(200, chunks, 2) of the feature that is clustered: its rows by the index and by the hash now."""
    tables, helper = (part.memory.reshape(-1, WIDTH // 4) for part in embedding.parts.values())
    index, clusterings = embedding.beside.values()
    helped = [hashes(1 + int(clusterings[0]), 0, j, k, 5) for j in range(4)]
    of_table = [tables[j * k :][index[:, j]] for j in range(4)]
    of_helper = [helper[j * k :][helped[j]] for j in range(4)]
    return np.stack(of_table, axis=1), np.stack(of_helper, axis=1)


@pytest.mark.parametrize("name", ["reference", *VERSIONS])
def test_chunks_are_sums_of_an_indexed_and_a_hashed_row(name):
    """Before a clustering, after it, and in a fresh pass; the small features keep their rows."""
    k, parted = sizes(settings("cce", weights=720), DATA)
    assert (k, parted.tolist()) == (18, [True, False, False, False, False])
    embedding = make("cce", name, weights=720, hash_seed=5)
    index = embedding.beside["index.rows"]
    assert (index.shape, index.dtype) == ((200, 4), np.uint8)
    for verb in (lambda: None, embedding.halfway, embedding.halfway, lambda: embedding.begin(1)):
        verb()
        vectors = looked_up(embedding, EVERY)
        np.testing.assert_array_equal(vectors[:, 0], sum(chunks_of(embedding, k)).reshape(200, WIDTH))
        # Of the feature of 3 ids: a table for each chunk.
        whole = embedding.parts["tables"].memory[k * WIDTH :][: 3 * WIDTH].reshape(4, 3, 2)
        np.testing.assert_array_equal(vectors[:3, 1], whole.swapaxes(0, 1).reshape(3, WIDTH))
        embedding.update(EVERY[:12], vectors[:12], 0.1)
    np.testing.assert_array_equal(index.T, [hashes(0, 0, j, k, 5) for j in range(4)])


@pytest.mark.parametrize(
    ("memory", "optimizer"), [("fp32", "adagrad"), ("int8", "adagrad"), ("fp32", "rowwise_adagrad")]
)
def test_a_clustering_puts_the_mean_of_its_ids_into_each_row(memory, optimizer):
    changes = {"weights": 720, "optimizer": optimizer, "memory": memory, "hash_seed": 5}
    embedding = make("cce", "cpu", "float32", **changes)
    k = embedding.k
    for seed in range(3):
        ids, d_vectors = draw(40, seed)
        embedding.update(ids, d_vectors.astype(np.float32), 0.1)

    def rows(part, name):
        return np.array(getattr(embedding.parts[part], name)).reshape(embedding.parts[part].weights // 2, -1)

    index = embedding.beside["index.rows"].copy()
    helped = np.array([hashes(1, 0, j, k, 5) for j in range(4)]).T
    before = {name: rows("tables", name) for name in ("stepped", "accumulator")}
    lost, helper = before["stepped"][4 * k :].copy(), rows("helper", "stepped")
    embedding.halfway()
    now, spread, left = embedding.beside["index.rows"], 0.0, 0.0
    for j in range(4):
        own = slice(j * k, (j + 1) * k)
        points = before["stepped"][own][index[:, j]] + helper[own][helped[:, j]]
        sums = before["accumulator"][own][index[:, j]]
        for row in np.unique(now[:, j]):
            members = now[:, j] == row
            found = rows("tables", "stepped")[own][row]
            np.testing.assert_allclose(found, points[members].mean(axis=0), rtol=1e-5, atol=1e-6)
            kept = rows("tables", "accumulator")[own][row]
            np.testing.assert_allclose(kept, sums[members].mean(axis=0), rtol=1e-5)
            left += ((points[members] - found) ** 2).sum()
        spread += ((points - points.mean(axis=0)) ** 2).sum()
    assert left < 0.2 * spread  # 18 clusters of two numbers; a hash would leave nearly all
    np.testing.assert_array_equal(rows("tables", "stepped")[4 * k :], lost)
    assert not rows("helper", "stepped").any()
    assert not rows("helper", "accumulator").any()


def test_where_all_features_have_rows_for_their_ids_nothing_is_clustered():
    embedding = make("cce", "cpu", weights=253 * WIDTH, optimizer="adagrad")
    assert embedding.beside["index.rows"].shape == (0, 4)
    embedding.update(EVERY[:50], looked_up(embedding, EVERY[:50]), 0.1)
    before = {name: array.copy() for name, array in embedding.state().items()}
    embedding.halfway()
    before["embedding.index.clusterings"] += 1
    for name, array in embedding.state().items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


def test_converted_it_keeps_what_it_learned():
    config = settings("cce", optimizer="adagrad", weights=720)
    source = create(config, DATA, select("cpu"))
    source.update(EVERY[:50], looked_up(source, EVERY[:50]), 0.1)
    source.halfway()
    kept = dataclasses.replace(config, optimizer=OptimizerConfig("none"))
    target = create(kept, DATA, select("cpu"))
    convert_embedding(source, target, DATA)
    np.testing.assert_array_equal(looked_up(target, EVERY), looked_up(source, EVERY))
    assert planned_bytes(kept, DATA)["embedding index"] == 200 * 4 + 4


def test_an_index_beyond_the_table_is_a_flaw():
    embedding = make("cce", "cpu", weights=720)
    embedding.halfway()
    assert embedding.flaw() is None
    embedding.beside["index.rows"][7, 2] = embedding.k
    assert embedding.flaw() == "its index names rows that are not among 18"


@pytest.mark.parametrize("stop", [2, 3, 4, 9])
def test_a_training_stopped_about_a_clustering_ends_as_if_it_had_not(stop, tmp_path):
    """Six steps a pass, of which the ids are clustered after three."""
    data = dataclasses.replace(DATA, cardinalities=(60, 5), fingerprint="abc")
    rows = {
        name: MemoryRows(n, n, cardinalities=(60, 5))
        for name, n in (("train", 90), ("validation", 30), ("test", 30))
    }
    config = resolved(
        {"width": 8, "bottom": (6,), "top": (6,)},
        {"method": "cce", "weights": 200},
        {"optimizer": "adagrad"},
        batch=16,
        epochs=2,
        eval_every=6,
        checkpoint_every=1,
        backend="cpu",
    )
    whole = train(config, data, rows, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(config, data, rows | {"train": stopping(stop, rows["train"])}, tmp_path / "part")
    assert train(config, data, rows, tmp_path / "part")["test"] == whole["test"]
    assert weights_of(tmp_path / "part") == weights_of(tmp_path / "whole")
    state = checkpoint.load_model(tmp_path / "part", "cpu")[0].state()
    assert state["embedding.index.clusterings"].tolist() == [2]
