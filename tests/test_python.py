"""What the package offers to Python: a trained run, a model of arrays of one's own, and docs/python.md."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl
import pytest
from recipes import ROOT

import robe
from data_pipeline.manifest import Manifest
from data_pipeline.schema import DataError
from robe import checkpoint
from robe import cli as command_line
from robe.config import ConfigError, DataSpec, EmbeddingConfig, ModelConfig, TrainConfig, resolve
from robe.estimator import ArrayError
from robe.model import build
from robe.train import TrainingError, train

TINY = ["--bottom", "8", "--width", "4", "--top", "8", "--batch", "64", "--block", "4", "--compression", "2"]
SCHEMA = """
label = "liked"
dense = ["age", "price"]
missing = ["", "NA"]
dense_missing = 7
[categorical]
user = "integer"
genre = "string"
"""


def run(*arguments):
    command_line.main([str(argument) for argument in arguments])


def rows(count, seed=0):
    """Columns of a table, with missing values and ages as text."""
    rng = np.random.default_rng(seed)
    ages = rng.integers(16, 80, count).astype(str)
    ages[::7] = "NA"
    return {
        "user": rng.integers(300, size=count),
        "price": rng.normal(3, 2, count).round(2),
        "genre": rng.choice(["crime", "drama", "NA", "noir"], count),
        "age": ages,
        "liked": (rng.random(count) < 0.4) * 1,
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of three runs on the same table: hashed ids, and a dictionary with and without codes."""
    folder = tmp_path_factory.mktemp("python")
    pl.DataFrame(rows(5000)).write_parquet(folder / "rows.parquet")
    (folder / "own.toml").write_text(SCHEMA)
    for method, ids in (("robe", "hash"), ("full", "dictionary"), ("mixed_precision", "dictionary")):
        data = folder / ids
        if not data.exists():
            prepare = ["--schema", folder / "own.toml", "--ids", ids, "--split", "0.8,0.1,0.1"]
            run("prepare", folder / "rows.parquet", *prepare, "--out", data)
        sizes = TINY if method == "robe" else TINY[:-4]
        run("train", "--data", data, "--method", method, "--out", folder / method, *sizes)
    return folder


def tables():
    """The same rows in every form that is taken."""
    return {
        "polars": pl.DataFrame,
        "lazy": pl.LazyFrame,
        "dict": dict,
        "pandas": lambda columns: pytest.importorskip("pandas", reason="the extra `readers`").DataFrame(
            columns
        ),
        "arrow": lambda columns: pytest.importorskip("pyarrow", reason="the extra `readers`").table(columns),
    }


@pytest.mark.parametrize("method", ["robe", "full", "mixed_precision"])
@pytest.mark.parametrize("form", tables())
def test_a_table_is_predicted_as_the_command_does(trained, tmp_path, method, form):
    """Bit for bit, over the end of a batch; values that training never saw, too."""
    columns = rows(2500, seed=1)
    columns["user"][:50] = np.arange(50) + 10**12
    del columns["liked"]
    if form == "pandas":
        pytest.importorskip("pyarrow", reason="pandas hands texts over by PyArrow, of the extra `readers`")
    table = tables()[form](columns)
    pl.DataFrame(columns).write_parquet(tmp_path / "new.parquet")
    run("predict", trained / method, tmp_path / "new.parquet", "--out", tmp_path / "p")
    written = (tmp_path / "p").read_text().splitlines()
    found = robe.load(trained / method).predict_table(table)
    assert found.dtype == np.float64
    assert [f"{p:.9g}" for p in found.tolist()] == written
    assert len(set(written)) > 1000


@pytest.mark.parametrize("method", ["robe", "full"])
def test_prepared_rows_are_predicted_as_the_table_is(trained, method):
    model = robe.load(trained / method, backend="cpu")
    manifest = Manifest.load(trained / {"robe": "hash", "full": "dictionary"}[method])
    dense, ids = (
        np.concatenate([manifest.open_shard(day, kind) for day in range(7)]) for kind in ("dense", "sparse")
    )
    found = model.predict(dense, ids.view(np.uint32))
    np.testing.assert_array_equal(found, model.predict_table(rows(5000)))
    assert model.predict(dense[:0], ids[:0]).shape == (0,)
    assert model.predict_table(pl.DataFrame(rows(1))[:0]).shape == (0,)


def test_vectors_are_those_of_the_ids(trained):
    """Of full tables, the rows of the table; 0 is where values land that training never saw."""
    model = robe.load(trained / "full")
    table = model.model.embedding.memory.reshape(-1, 4)
    dictionary = np.load(trained / "full" / "data" / "dictionary.npy")
    users = dictionary[: model.data.cardinalities[0] - 1]
    found = model.vectors("user", users[[0, 5, 3]])
    np.testing.assert_array_equal(found, table[[1, 6, 4]])
    np.testing.assert_array_equal(model.vectors("user", [10**12])[0], table[0])
    first = model.data.cardinalities[0]
    assert model.vectors("genre", pl.Series(["noir", "drama", None])).shape == (3, 4)
    np.testing.assert_array_equal(model.vectors("genre", ["who?", "unheard of"]), table[[first, first]])
    many = model.vectors("user", np.tile(users[:3], 1000))
    np.testing.assert_array_equal(many, np.tile(table[1:4], (1000, 1)))


def test_vectors_of_a_robe_array_are_what_the_model_reads(trained):
    model = robe.load(trained / "robe")
    ids = np.array([[17, 0], [4, 0]], np.uint32)
    expected = np.empty((2, 2, 4), np.float32)
    model.model.embedding.lookup(ids, expected)
    np.testing.assert_array_equal(model.vectors("user", ["17", "4"]), expected[:, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "genre"}, "the table: has no column 'genre'"),
        (lambda t: t | {"age": np.full(3, "old")}, "the table, row 0: age is 'old', not a number"),
        (lambda t: t | {"price": [1.0, 1e39, 2.0]}, "the table, row 1: price is '1e\\+39', not a number"),
        (
            lambda t: t | {"user": [1.5, 2.0, 3.0]},
            "the table, row 0: user is '1.5', not a whole number",
        ),
        (lambda t: t | {"user": [1, "x", 3]}, "the table, column user: cannot be read"),
        (lambda t: t | {"user": [1, 2]}, "the table: cannot be read"),
        (lambda t: [t], "the table: must be of Polars, pandas or Arrow, or a dict of arrays, not a list"),
    ],
)
def test_a_bad_table_is_refused_in_a_line(trained, change, message):
    with pytest.raises(DataError, match=message) as refused:
        robe.load(trained / "robe").predict_table(change(rows(3)))
    assert "\n" not in str(refused.value)


def test_bad_features_and_folders_are_refused(trained, tmp_path):
    model = robe.load(trained / "robe")
    with pytest.raises(DataError, match="'age': not a categorical column; there are user, genre"):
        model.vectors("age", [1])
    with pytest.raises(DataError, match="row 1: user is 'x', not an integer"):
        model.vectors("user", ["1", "x"])
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint here"):
        robe.load(tmp_path)
    robe.DLRM([3], 0, weights=16).save(tmp_path)
    with pytest.raises(ConfigError, match="holds no columns"):
        robe.load(tmp_path).predict_table({"a": [1]})


# Arrays of one's own.

CARDINALITIES = (20, 5)
SIZES = {"width": 4, "bottom": (6,), "top": [6], "weights": 40, "block": 4, "batch": 32, "backend": "cpu"}


def batches(count=320, size=32, seed=0):
    """Rows whose label depends on the first id."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.integers(0, n, count) for n in CARDINALITIES], 1)
    dense = rng.random((count, 3))
    label = rng.random(count) < np.where(ids[:, 0] % 2, 0.9, 0.1)
    return [(label[s : s + size], dense[s : s + size], ids[s : s + size]) for s in range(0, count, size)]


class Memory:
    def __init__(self, parts):
        self.parts, self.count = parts, sum(len(part[0]) for part in parts)

    def batches(self, size, **order):
        for label, dense, ids in self.parts:
            yield label.astype(np.float32), dense.astype(np.float32), ids.astype(np.uint32)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_fit_trains_as_the_command_does(tmp_path, optimizer):
    """The same weights from the same batches, settings and seed, and the same predictions."""
    settings = SIZES | {"optimizer": optimizer, "lr": 0.1, "seed": 3, "warmup_steps": 4}
    model = robe.DLRM(CARDINALITIES, 3, **settings).fit(batches())
    data = DataSpec(3, CARDINALITIES, "dictionary", "", "as they were given")
    network = build(model.config, data, model.model.backend)
    few = Memory(batches(32))
    train(network, model.config, data, {"train": Memory(batches()), "validation": few, "test": few}, tmp_path)
    state = model.model.state()
    assert state.keys() == network.state().keys()
    for name, array in network.state().items():
        np.testing.assert_array_equal(state[name], array, err_msg=name)
    assert len(model.losses) == 10


def test_settings_are_those_of_the_command():
    config = robe.DLRM(CARDINALITIES, 3, preset="kaggle", block=2, lr=1, hash_seed=np.int64(2)).config
    expected = TrainConfig(ModelConfig("kaggle"), EmbeddingConfig(block=2, hash_seed=2))
    optimizer = resolve(expected).optimizer
    assert config.model == resolve(expected).model
    assert config.embedding == expected.embedding
    assert (config.optimizer.optimizer, config.optimizer.lr) == (optimizer.optimizer, 1)


def test_it_learns_and_goes_on_after_saving(tmp_path):
    # The rate rises all the while, and halves are rounded by the number of the step.
    settings = SIZES | {"lr": 0.2, "warmup_steps": 60, "memory": "fp16"}
    whole = robe.DLRM(CARDINALITIES, 3, **settings)
    for epoch in range(6):
        whole.fit(batches(seed=epoch))
    part = robe.DLRM(CARDINALITIES, 3, **settings)
    for epoch in range(3):
        part.fit(batches(seed=epoch))
    part.save(tmp_path)
    part = robe.DLRM.load(tmp_path, backend="cpu")
    for epoch in range(3, 6):
        part.fit(iter(batches(seed=epoch)))
    (label, dense, ids) = batches(5000, 5000, seed=9)[0]
    found = part.predict(dense, ids)
    np.testing.assert_array_equal(found, whole.predict(dense, ids))
    assert found[label].mean() > found[~label].mean() + 0.3
    assert np.mean(whole.losses[-10:]) < 0.6 < whole.losses[0]
    part.save(tmp_path / "more")
    np.testing.assert_array_equal(robe.load(tmp_path / "more").predict(dense, ids), found)
    with pytest.raises(ConfigError, match="more: holds a model of more steps; choose another folder"):
        robe.DLRM(CARDINALITIES, 3, **SIZES).save(tmp_path / "more")


def test_what_stops_in_between_keeps_its_losses():
    def interrupted():
        yield from batches()[:3]
        raise KeyboardInterrupt

    model = robe.DLRM(CARDINALITIES, 3, **SIZES)
    with pytest.raises(KeyboardInterrupt):
        model.fit(interrupted())
    assert len(model.losses) == 3
    assert np.isfinite(model.losses).all()


def test_hashed_ids_are_any_32_bits():
    model = robe.DLRM(CARDINALITIES, 0, hashed=True, **SIZES)
    ids = np.array([[0, 2**32 - 1], [5, 7]], np.uint64)
    model.fit([([0, 1], np.empty((2, 0)), ids)])
    assert model.predict(np.empty((2, 0)), ids).shape == (2,)
    with pytest.raises(ArrayError, match="column 1: is 4294967296, but must be from 0 to 4294967295"):
        model.predict(np.empty((2, 0)), ids + np.uint64(1))
    with pytest.raises(ConfigError, match="method full cannot use the ids of these data"):
        robe.DLRM(CARDINALITIES, 0, hashed=True, method="full")


LABEL, DENSE, IDS = [0, 1], [[1.0, 2, 3]] * 2, [[1, 2], [19, 4]]


@pytest.mark.parametrize(
    ("label", "dense", "ids", "message"),
    [
        (LABEL, [[1.0, 2]] * 2, IDS, r"dense: has shape \(2, 2\), but must have \(2, 3\)"),
        (LABEL, DENSE[:1], IDS, r"dense: has shape \(1, 3\), but must have \(2, 3\)"),
        (LABEL, [[1.0, np.nan, 3]] * 2, IDS, "dense, row 0, column 1: is nan, but must be a finite number"),
        (LABEL, [[1.0, 2, 3], [1, 2, 1e39]], IDS, r"dense, row 1, column 2: is 1e\+39, but must be a finite"),
        (LABEL, [["a", "b", "c"]] * 2, IDS, "dense: holds <U1, but must hold numbers"),
        (LABEL, [[1], [1, 2]], IDS, "dense: is no array"),
        (LABEL, DENSE, [[1, 2], [20, 4]], "ids, row 1, column 0: is 20, but must be from 0 to 19"),
        (LABEL, DENSE, [[1, 2], [3, -1]], "ids, row 1, column 1: is -1, but must be from 0 to 4"),
        (LABEL, DENSE, [[1.0, 2], [3, 4]], "ids: holds float64, but must hold integers"),
        (LABEL, DENSE, [[1, 2, 3]] * 2, r"ids: has shape \(2, 3\), but must have \(2, 2\)"),
        ([0, 2], DENSE, IDS, "label, row 1: is 2, but must be 0 or 1"),
        ([[0], [1]], DENSE, IDS, r"label: has shape \(2, 1\), but must have \(any,\)"),
        ([0, 1, 1], DENSE, IDS, r"ids: has shape \(2, 2\), but must have \(3, 2\)"),
        ([], DENSE, IDS, "a batch has 0 rows; give from 1 to 2048"),
    ],
)
def test_bad_arrays_are_refused_before_a_kernel_sees_them(label, dense, ids, message):
    model = robe.DLRM(CARDINALITIES, 3, **SIZES)
    before = {name: array.copy() for name, array in model.model.state().items()}
    with pytest.raises(ArrayError, match=message) as refused:
        model.fit([(label, dense, ids)])
    assert "\n" not in str(refused.value)
    assert isinstance(refused.value, ValueError)
    for name, array in model.model.state().items():
        np.testing.assert_array_equal(array, before[name])
    if not message.startswith(("label", "a batch", "ids: has shape \\(2, 2")):
        with pytest.raises(ArrayError):
            model.predict(dense, ids)


def test_what_is_no_batch_is_refused():
    model = robe.DLRM(CARDINALITIES, 3, **SIZES)
    for given in ((np.array(LABEL), DENSE, IDS), [(LABEL, DENSE)]):
        with pytest.raises(ArrayError, match=r"a batch must be \(label, dense, ids\)"):
            model.fit(given)
    with pytest.raises(ArrayError, match="a batch has 2049 rows; give from 1 to 2048"):
        model.fit(batches(2049, 2049))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metod": "robe"}, "metod is no setting of a model; there are alpha, backend, batch, "),
        ({"epochs": 3}, "epochs is no setting"),
        ({"method": "rob"}, "method must be one of robe, hot, full"),
        ({"lr": "fast"}, "lr must be a number, not 'fast'"),
        ({"batch": 2.5}, "batch must be an integer, not 2.5"),
        ({"sign": 1}, "sign must be True or False, not 1"),
        ({"top": [8, "x"]}, r"top must be a tuple of an integer, not \(8, 'x'\)"),
        ({"hash_seed": -1}, "^hash_seed must be from 0 to"),
        ({"schedule": "plateau"}, "^schedule plateau has to know what evaluations find, and there are none"),
        ({"schedule": "cosine"}, "^schedule cosine has to know where the training ends; give decay_start"),
        ({"weights": 3}, "an array of 3 weights is smaller than one block of 16; .* a smaller block"),
        ({"weights": 300, "compression": 2.0}, "give one of weights, megabytes and compression"),
    ],
)
def test_bad_settings_are_refused_in_a_line(settings, message):
    with pytest.raises(ConfigError, match=message) as refused:
        robe.DLRM(CARDINALITIES, 3, **settings)
    assert "\n" not in str(refused.value)


def test_no_features_are_refused():
    for cardinalities, dense in (((), 3), ((3, 0), 3), ((3,), -1)):
        with pytest.raises(ConfigError, match="cardinalities"):
            robe.DLRM(cardinalities, dense)


def test_what_diverges_is_noticed():
    model = robe.DLRM(CARDINALITIES, 3, **SIZES, optimizer="sgd", lr=1e30)
    with pytest.raises(
        TrainingError, match=r"the loss became (nan|inf) in step \d+; fit a new model with a lower lr"
    ):
        model.fit(batches())


def python(code, cwd):
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_cheap(tmp_path):
    heavy = "{'numpy', 'numba', 'polars', 'rich', 'tyro'}"
    code = f"import sys, robe; print({heavy} & {{name.partition('.')[0] for name in sys.modules}})"
    assert python(code, tmp_path) == "set()\n"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        robe.nothing  # noqa: B018


def test_options_are_read_before_numba_and_polars_are_imported(tmp_path):
    """They would take three quarters of the time of `--help`, and of a command that is refused."""
    code = "import sys, robe.cli; print({'numba', 'polars'} & sys.modules.keys())"
    assert python(code, tmp_path) == "set()\n"


def test_numpy_may_come_first(tmp_path):
    """And the name of a thing is enough to get it. How threads wait is left alone until that is asked for."""
    model = "DLRM([9], 0, weights=16).predict(numpy.empty((1, 0)), [[3]])"
    parts = "robe.run_folder, robe.train, robe.doctor, data_pipeline.prepare, data_pipeline.frames"
    code = (
        f"import os, numpy; from robe import *; print({model}.shape)\n"
        f"import {parts}; from robe.threads import share_cores, THREAD_POLICY\n"
        "print(THREAD_POLICY.keys() & os.environ); share_cores()\n"
        "print(THREAD_POLICY.items() <= os.environ.items())"
    )
    assert python(code, tmp_path).split("\n") == ["(1,)", "set()", "True", ""]


@pytest.mark.parametrize("method", ["robe", "mixed_precision"])
def test_threads_share_a_model(trained, method):
    """100,000 answers to 8 threads, in questions of 1 to 256 rows, and vectors meanwhile."""
    model = robe.load(trained / method, backend="cpu")
    table = pl.DataFrame(rows(4096, seed=2))
    dense, ids = model._reader.rows(table)
    alone = np.concatenate([model.predict(dense[i : i + 1], ids[i : i + 1]) for i in range(64)])
    np.testing.assert_allclose(model.predict(dense, ids)[:64], alone, rtol=1e-6)
    expected = {
        size: np.concatenate(
            [model.predict(dense[i : i + size], ids[i : i + size]) for i in range(0, 4096, size)]
        )
        for size in (1, 16, 256)
    }
    vectors = model.vectors("user", table["user"])

    def ask(thread):
        rng, wrong, asked = np.random.default_rng(thread), 0, 0
        while asked < 6300:
            size = int(rng.choice([1, 16, 256]))
            start = int(rng.integers(4096 // size)) * size
            part = slice(start, start + size)
            found = model.predict(dense[part], ids[part])
            wrong += int((found != expected[size][part]).sum())
            asked += size
            if size == 256:
                found = model.vectors("user", table["user"][part])
                wrong += int((found != vectors[part]).any(1).sum())
        return wrong, asked

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    assert sum(asked for _, asked in found) >= 50_000
    assert [wrong for wrong, _ in found] == [0] * 8


def test_training_and_answering_take_turns():
    """A model that is asked while it learns learns what it would have learned undisturbed."""
    rng = np.random.default_rng(0)
    batches = [
        (rng.integers(2, size=64), rng.normal(size=(64, 2)), rng.integers(50, size=(64, 3)))
        for _ in range(200)
    ]
    settings = {"width": 4, "bottom": (8,), "top": (8,), "block": 4, "batch": 64, "backend": "cpu"}
    quiet, asked = (robe.DLRM((50,) * 3, 2, **settings, compression=2) for _ in range(2))
    quiet.fit(batches)
    with ThreadPoolExecutor(4) as pool:
        learning = pool.submit(asked.fit, batches)
        while not learning.done():
            list(pool.map(lambda batch: asked.predict(*batch[1:]), batches[:8]))
        learning.result()
    assert asked.losses == quiet.losses
    np.testing.assert_array_equal(asked.predict(*batches[0][1:]), quiet.predict(*batches[0][1:]))


@pytest.mark.parametrize(
    ("dense", "ids", "message"),
    [
        ((3, 1), (3, 2), r"dense: has shape \(3, 1\), but must have \(3, 2\)"),
        ((4, 2), (3, 2), r"dense: has shape \(4, 2\), but must have \(3, 2\)"),
        ((3, 2), (3, 1), r"ids: has shape \(3, 1\), but must have \(3, 2\)"),
        ((3, 2), (6,), r"dense: has shape"),
        ((2049, 2), (2049, 2), "a batch has 2049 rows, but the buffers of the model are for 2048"),
        ((3, 2), np.zeros((3, 2), np.int64), "ids: holds int64, but must hold uint32"),
    ],
)
def test_the_network_inside_reads_nothing_beyond_its_arrays(trained, dense, ids, message):
    network = robe.load(trained / "robe", backend="cpu").model
    ids = np.zeros(ids, np.uint32) if isinstance(ids, tuple) else ids
    with pytest.raises(ArrayError, match=message):
        network.predict(np.zeros(dense, np.float32), ids)
    with pytest.raises(ArrayError, match=message):
        network.step(np.zeros(len(ids), np.float32), np.zeros(dense, np.float32), ids, 0.1)
