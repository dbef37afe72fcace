"""What the embeddings start from, store, and refuse."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
from conftest import VERSIONS, needs_simulator, resolved

from robe.backend import BackendError, cuda_trouble, select
from robe.config import METHODS, ConfigError, DataSpec
from robe.embeddings import create
from robe.model import build
from robe.plan import plan
from robe.report import plan_text

HASHED = DataSpec(13, (1000, 10, 300), "hash", "", "test")
NUMBERED = DataSpec(13, (1000, 10, 300), "dictionary", "", "test")


def settings(optimizer="sgd", **embedding):
    return resolved({"width": 8}, embedding, {"optimizer": optimizer})


def test_full_tables_start_like_those_of_the_dlrm():
    """Uniform in (-1/sqrt(n), 1/sqrt(n)) per table; a row of feature f follows those of f - 1."""
    embedding = create(settings(method="full"), NUMBERED, select("cpu"))
    tables = np.split(embedding.memory.reshape(-1, 8), [1000, 1010])
    for table, n in zip(tables, NUMBERED.cardinalities, strict=True):
        assert abs(table).max() <= 1 / math.sqrt(n)
        # The standard error of the mean square of N uniforms, relative, is sqrt(4 / 5 / N): 5 of them.
        assert abs((table**2).mean() * 3 * n - 1) < 5 * math.sqrt(0.8 / table.size)
    out = np.empty((1, 3, 8), np.float32)
    embedding.lookup(np.array([[999, 9, 5]], np.uint32), out)
    np.testing.assert_array_equal(out[0], [tables[0][999], tables[1][9], tables[2][5]])


def test_robe_starts_with_the_energy_of_the_full_tables():
    """E sum of squares over the virtual table = that of the full one, sum(n * D / (3 n)) = F * D / 3."""
    embedding = create(settings(weights=5000), HASHED, select("cpu"))
    energy = (embedding.memory**2).mean(dtype=np.float64) * sum(HASHED.cardinalities) * 8
    assert abs(energy / (3 * 8 / 3) - 1) < 5 * math.sqrt(0.8 / 5000)
    assert abs(create(settings(weights=5000, init_bound=0.5), HASHED, select("cpu")).memory).max() > 0.49


def test_seeds_change_the_weights_and_the_hash():
    def vector(**changes):
        out = np.empty((1, 3, 8), np.float32)
        create(settings(weights=500, **changes), HASHED, select("cpu")).lookup(
            np.ones((1, 3), np.uint32), out
        )
        return out

    np.testing.assert_array_equal(vector(), vector())
    assert (vector() != vector(hash_seed=1)).any()
    assert (vector() != vector(sign=False)).any()
    assert (vector() != vector(hash="affine")).any()


def test_features_do_not_share_rows():
    """No id of a feature is a row of another one, neither the same id nor one nearby."""
    embedding = create(settings(weights=5000), HASHED, select("cpu"))
    out = np.empty((20, 3, 8), np.float32)
    embedding.lookup(np.arange(20, dtype=np.uint32)[:, None].repeat(3, axis=1), out)
    assert len(np.unique(out.reshape(60, 8), axis=0)) == 60


def test_compression_names_what_it_is_counted_from():
    described = create(settings(compression=20), HASHED, select("cpu")).describe()
    assert described["embedding_parameters"] == 1310 * 8 // 20
    assert described["compression"] == pytest.approx(20)
    assert described["compressed_from"] == "10,480 weights: 1,310 rows (test), width 8"


def test_a_full_table_refuses_hashed_ids():
    with pytest.raises(ConfigError, match=r"prepare them with .*--ids dictionary"):
        create(settings(method="full"), HASHED, select("cpu"))


@pytest.mark.parametrize("dialect", ["hash", "dictionary"])
@pytest.mark.parametrize("method", METHODS)
def test_data_without_categorical_features_are_refused_by_all_methods_alike(method, dialect):
    config, data = settings(method=method), DataSpec(13, (), dialect, "", "test")
    makes = (lambda: build(config, data, select("cpu")), lambda: plan(config, data, 1))
    for make in makes:
        if method == "none":
            make()
            continue
        with pytest.raises(ConfigError) as refused:
            make()
        assert str(refused.value) == (
            f"--method {method} is for categorical features, and these data have none; train --method none"
        )


def test_ids_beyond_a_table_are_refused():
    """They would be read from another feature's rows, or from beyond the array."""
    embedding = create(settings(method="full"), NUMBERED, select("cpu"))
    embedding.check(np.array([[999, 9, 299]], np.uint32))
    with pytest.raises(ConfigError, match="feature 1 has 10 rows, but an id of the data is 10"):
        embedding.check(np.array([[999, 9, 299], [0, 10, 0]], np.uint32))
    create(settings(weights=500), HASHED, select("cpu")).check(np.full((1, 3), 2**32 - 1, np.uint32))


def test_affine_refuses_too_many_weights_before_allocating_them():
    with pytest.raises(ConfigError, match="use the hash `mix`"):
        create(settings(hash="affine", weights=3 * 10**12), HASHED, select("cpu"))


def test_halves_are_counted_as_they_are_stored():
    """As many weights for a compression, in half the bytes."""
    half, single = (create(settings(memory=memory), HASHED, select("cpu")) for memory in ("fp16", "fp32"))
    assert half.memory.dtype == np.float16
    np.testing.assert_array_equal(half.memory, single.memory.astype(np.float16))
    said, expected = half.describe(), single.describe()
    assert 2 * said.pop("embedding_bytes") == expected.pop("embedding_bytes") == 4 * 104
    assert said == expected
    config = settings(memory="fp16")
    assert "100.8x, 201.5x in bytes" in plan_text(plan(config, HASHED, 1), config, HASHED)


def test_seeds_and_steps_change_how_halves_are_rounded():
    """Small updates of the same weights; only how many were made before differs, or the seed."""

    def updated(seed=0, steps=0):
        config = dataclasses.replace(settings(memory="fp16"), seed=seed)
        embedding = create(config, HASHED, select("cpu"))
        embedding.memory[:], embedding.steps = 1, steps
        for _ in range(5):
            embedding.update(np.zeros((1, 3), np.uint32), np.full((1, 3, 8), 3e-4, np.float32), 1.0)
        assert embedding.steps == steps + 5
        return embedding.memory.tobytes()

    assert updated() == updated()
    assert len({updated(), updated(seed=1), updated(steps=1)}) == 3


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize(
    ("method", "memory"),
    [("robe", "fp32"), ("robe", "fp16"), ("full", "fp32"), ("mixed_precision", "fp32"), ("none", "fp32")],
)
def test_plan_is_what_is_allocated(method, memory, optimizer):
    data = HASHED if method == "robe" else NUMBERED
    config = settings(optimizer, method=method, memory=memory)
    model = build(config, data, select("cpu"))
    planned = plan(config, data, rows=1000)
    memory = planned["memory"]
    for item, size in model.embedding.bytes().items():
        assert memory[item] == size
    assert memory["dense weights"] == model.dense_parameters.nbytes
    assert memory["dense gradient"] == model.dense_gradient.nbytes
    kept = model.optimizer.state
    assert kept.keys() == ({"accumulator"} if optimizer == "adagrad" else set())
    assert memory["dense optimizer state"] == sum(array.nbytes for array in kept.values())
    layer = model.interaction
    buffers = [layer.vectors, layer.d_vectors, layer.out, model.losses, model.d_logits]
    for mlp in (model.bottom, model.top):
        buffers += [*mlp.products, *mlp.d_inputs, mlp.d_first]
    assert memory["activations and their gradients"] == sum(buffer.nbytes for buffer in buffers)
    assert planned["checkpoint"]["weights and optimizer state"] == sum(
        a.nbytes for a in model.state().values()
    )
    assert planned["disk"]["shards"] == 1000 * (1 + 13 + 3) * 4


@needs_simulator
@pytest.mark.kernels
@pytest.mark.parametrize(("deterministic", "pays"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("sgd", {"weights": 104}),
        ("sgd", {"weights": 104, "memory": "fp16"}),
        ("adagrad", {"weights": 104}),
        ("none", {"weights": 104, "memory": "int8"}),
        ("sgd", {"weights": 104, "memory": "int4"}),
        ("sgd", {"method": "full"}),
        ("adagrad", {"method": "hot", "weights": 104, "memory": "fp16"}),
        ("sgd", {"method": "compositional", "chunks": 2, "compression": 2}),
        ("sgd", {"method": "quotient_remainder", "weights": 900}),
        ("sgd", {"method": "mixed_dimension", "weights": 2000}),
        ("sgd", {"method": "cce", "weights": 900}),
        ("sgd", {"method": "mixed_precision"}),
    ],
)
def test_plan_of_a_gpu_is_what_is_allocated(optimizer, options, deterministic, pays, monkeypatch):
    """Sums beside the weights and no vectors, or all vectors; integers where no order may matter."""
    monkeypatch.setattr("robe.interaction.gathering_again_pays", lambda *sizes: pays)
    kept = {}
    monkeypatch.setattr("robe.kernels.parts.scratch._kept", kept)
    config = dataclasses.replace(settings(optimizer, **options), backend="cuda", batch=2)
    config = dataclasses.replace(config, deterministic=deterministic)
    data = HASHED if options.get("method", "robe") == "robe" else NUMBERED
    model = build(config, data, select("cuda", deterministic=deterministic))
    planned = plan(config, data, rows=1)["memory"]
    for item, size in model.embedding.bytes().items():
        assert planned[item] == size, item
    on_a_cpu = plan(dataclasses.replace(config, backend="cpu"), data, rows=1)["memory"]
    layer, features = model.interaction, model.embedding.features
    every = 2 * 4 * 8 * 2048 * (1 + features)  # vectors, their gradients; D = 8
    activations = "activations and their gradients"
    saved = every - layer.vectors.nbytes - layer.d_vectors.nbytes
    assert planned[activations] == on_a_cpu[activations] - saved
    assert (saved > 0) == bool(layer.again) <= pays
    assert {"embedding gradients as integers", "batches of CUDA graphs"}.isdisjoint(on_a_cpu)
    if optimizer != "none" and options.get("method") != "mixed_precision":  # that sorts, and adds up nothing
        zeros, ids = np.zeros((2, 14), np.float32), np.zeros((2, features), np.uint32)
        model.step(zeros[:, 0], zeros[:, 1:], ids, 0.1)
    sums = sum(array.nbytes for (_, name, *_), array in kept.items() if name == "sums")
    assert planned.get("embedding gradients as integers", 0) == sums
    if options == {"weights": 104}:
        assert sums == deterministic * 2 * model.embedding.memory.nbytes
        assert bool(layer.again) == (pays and not deterministic)


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize(
    "embedding",
    [
        *({"method": name} for name in ("full", "none", "mixed_precision")),
        *({"method": name, "compression": 2} for name in METHODS if "compression" in METHODS[name].options),
        {"method": "robe", "compression": 2, "memory": "fp16"},
        {"method": "robe", "compression": 2, "memory": "int3"},
        {"method": "full", "memory": "int8"},
    ],
    ids=lambda embedding: "-".join(map(str, embedding.values())),
)
def test_a_pass_begins_with_weights_of_its_own_and_no_memory(embedding, optimizer, name):
    """The first as a new embedding does, and each as it would without the others, in the same arrays."""
    config = resolved(
        {"width": 8}, {"block": 4} | embedding if embedding["method"] == "robe" else embedding,
        {"optimizer": optimizer}, batch=4, seed=2**40,
    )  # fmt: skip
    data, backend = DataSpec(2, (9, 40), "dictionary", "", ""), select(name)
    made = create(config, data, backend)
    rng = np.random.default_rng(0)

    def state():
        arrays = {key: a for key, a in made.state().items() if not key.endswith("counters")}
        return {key: (a.copy(), id(a)) for key, a in arrays.items()}

    def train():
        ids = np.stack([rng.integers(0, n, 4) for n in data.cardinalities], 1).astype(np.uint32)
        made.update(ids[:, : made.features], rng.normal(size=(4, made.features, 8)).astype(np.float32), 0.5)

    states = {0: state()}
    for number in (1, 2, 0, 1):
        train()
        made.begin(number)
        for key, (array, same) in states.setdefault(number, state()).items():
            assert np.array_equal(made.state()[key], array), (number, key)
            assert id(made.state()[key]) == same
    weights = [key for key in states[0] if key.endswith(("memory", "table")) and states[0][key][0].size]
    assert bool(weights) == (embedding["method"] != "none")
    for key, (a, b) in itertools.product(weights, itertools.combinations(range(3), 2)):
        one, other = states[a][key][0], states[b][key][0]
        drawn = (one != 0) | (other != 0)  # rows of hot ids wait for these, at 0
        assert np.mean(one[drawn] != other[drawn]) > 0.5


def test_plan_of_criteo_terabyte():
    """MLPerf's 187,767,399 rows of 128 floats are the published 96.1 GB; 27 million weights are 108 MB."""
    from data_pipeline.schema import PUBLIC_DATA_SETS

    rows, cardinalities = PUBLIC_DATA_SETS["criteo-tb"]
    assert rows == 4_373_472_329
    data = DataSpec(13, cardinalities, "dictionary", "", "published")
    mlperf = {"preset": "mlperf"}
    full = plan(resolved(mlperf, {"method": "full"}), data, rows)
    assert full["memory"]["embedding weights"] == 187_767_399 * 128 * 4
    assert full["memory"]["embedding optimizer state"] == 0
    robe = plan(resolved(mlperf, {"weights": 27_000_000}), data, rows)
    assert robe["memory"]["embedding weights"] == 108_000_000


def test_unknown_backends_and_missing_devices_are_refused():
    with pytest.raises(BackendError, match="choose one of auto, reference, cpu, cuda"):
        select("tpu")
    if trouble := cuda_trouble():
        assert re.search(r"use --backend cpu|needs CuPy: pip install .*cuda13", trouble)
        with pytest.raises(BackendError, match=f"^{re.escape(trouble)}$"):
            select("cuda")
        assert select("auto").name == "cpu"


def test_threads_follow_the_size_of_the_products():
    import numba
    from threadpoolctl import threadpool_info

    from robe.threads import _blas, limit_threads

    _blas.cache_clear()  # SciPy, which other tests import, brings a BLAS of its own

    def threads():
        blas = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
        return *blas, numba.get_num_threads()

    most = numba.config.NUMBA_NUM_THREADS
    for flops, expected in ((1e6, (1, 1)), (1e9, (most, most)), (1e8, (most, 1)), (1e9, (most, most))):
        limit_threads(flops)
        assert threads() == expected
