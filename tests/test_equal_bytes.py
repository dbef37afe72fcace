"""Quality at equal bytes: what fits, how many seeds it takes, and verdicts that can fail."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import resolved
from trainings_made import trained

from analysis import claim, equal_bytes, product_quantisation
from analysis.equal_bytes import AFTERWARDS, FLOAT, FULL, WAYS, fitted, stored_bytes
from robe.backend import select
from robe.config import NUMBERED, ConfigError, DataSpec, EmbeddingConfig
from robe.embeddings import create

DATA = DataSpec(13, (1000, 300, 50), "dictionary", "", "test")
AFTER = f"{FLOAT}, 8 bits after training"
TINY = dataclasses.replace(equal_bytes.QUICK, seeds=2, most=2, ways=(FLOAT, "hashing", AFTER))


def measure(folder, **changes):
    study = dataclasses.replace(TINY, **changes)
    return equal_bytes.measure(study=study, cache=folder, say=lambda text: None)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    return folder, measure(folder)


@pytest.mark.parametrize("size", [700, 20_000])
@pytest.mark.parametrize("way", WAYS)
def test_as_many_weights_as_fit_and_no_more(way, size):
    found = fitted(WAYS[way], DATA, size)
    if found is None:  # a dictionary alone takes 5,400 bytes; a train needs some hundred weights
        assert size == 700
        # `hot` numbers its ids by count; a sketch has whole sets.
        assert WAYS[way].method in (*NUMBERED, "hot", "adaembed")
        return
    assert 0.8 * size < stored_bytes(found, DATA) <= size  # rows, groups and ranks are whole
    more = dataclasses.replace(found, weights=found.weights + 1)
    assert stored_bytes(more, DATA) > size


def test_bytes_are_those_of_the_arrays_and_of_the_dictionary():
    assert stored_bytes(EmbeddingConfig(weights=640), DATA) == 4 * 640
    # Ten groups of 64 codes of half a byte, each with two halves.
    assert stored_bytes(EmbeddingConfig(weights=640, memory="int4"), DATA) == 10 * (32 + 4)
    assert stored_bytes(EmbeddingConfig("full"), DATA) == 1350 * (16 * 4 + 4)
    assert stored_bytes(EmbeddingConfig("hashing", weights=640), DATA) <= 4 * 640


def test_product_quantisation_stores_a_byte_a_part_and_its_centroids(rng):
    """The bytes are those of the arrays; a table of few rows stays whole; more parts lose less."""
    spec = dataclasses.replace(DATA, cardinalities=(1000, 300, 50))
    config = resolved({"width": 16}, {"method": "full"})
    lost = []
    for parts in (1, 4):
        embedding = create(config, spec, select("cpu"))
        before = embedding.memory.reshape(-1, 16).copy()
        codes, centroids = product_quantisation.coded(before[:1000], parts, np.random.default_rng(0))
        sizes = [product_quantisation.stored_bytes(n, 16, parts) for n in spec.cardinalities]
        assert sizes == [codes.nbytes + centroids.nbytes, 300 * parts + 256 * 64, 50 * 64]
        point = equal_bytes.Point(equal_bytes.QUANTISED, 10, config.embedding, parts=parts)
        assert point.stored_bytes(spec) == sum(sizes) + 4 * 1350
        product_quantisation.quantise(embedding, spec, parts, seed=0)
        after = embedding.memory.reshape(-1, 16)
        np.testing.assert_array_equal(after[1300:], before[1300:])
        for j, part in enumerate(np.split(after[:1000], parts, axis=1)):
            expected = centroids[j][codes[:, j]]
            np.testing.assert_array_equal(part, expected)
            assert len(np.unique(part, axis=0)) <= 256
        lost.append(((after - before) ** 2)[:1000].sum() / (before[:1000] ** 2).sum())
    assert lost[1] < lost[0] / 4
    assert lost[0] < 0.7


def test_tables_have_as_many_parts_or_chunks_as_fit():
    spec = dataclasses.replace(DATA, cardinalities=(100_000,))
    hashed = dataclasses.replace(spec, dialect="hash")

    def found(way, size, spec=spec):
        return list(
            equal_bytes.smaller_tables(equal_bytes.Point(way, 10, EmbeddingConfig("full")), spec, size)
        )

    for size, parts in ((516_384, 1), (616_383, 1), (616_384, 2), (10**9, 16)):
        assert [point.parts for point in found(equal_bytes.QUANTISED, size)] == [parts]
    # The dictionary, half a byte and an eighth of one an id, and chunks of 16 bytes.
    for size in (462_516, 462_531, 700_000, 2_000_000):
        (point,) = found(equal_bytes.PRUNED, size)
        assert size - 16 < point.stored_bytes(spec) <= size
    for way, size in ((equal_bytes.QUANTISED, 516_383), (equal_bytes.PRUNED, 462_515)):
        assert found(way, size) == []
        assert found(way, 10**7, hashed) == []


def test_hashed_ids_are_studied_without_what_numbers_them():
    hashed = dataclasses.replace(DATA, cardinalities=(100_000,), dialect="hash")
    points = {point.way for point in equal_bytes.plan(equal_bytes.Sizes(compressions=(10,)), hashed)}
    assert {FLOAT, "exact rows and ROBE, online", "hashing", AFTER} <= points
    assert not points & {FULL, "quotient-remainder", "CCE", equal_bytes.QUANTISED, equal_bytes.PRUNED}


def test_points_of_a_size_take_equal_bytes_and_the_same_seeds(cache):
    _, rows = cache
    sizes = {row["way"]: row["stored_bytes"] for row in rows}
    budget = next(row["stored_bytes"] for row in rows if row["way"] == FLOAT)
    assert set(sizes) == {FULL, *TINY.ways}
    assert all(0.8 * budget < sizes[way] <= budget for way in TINY.ways)
    assert {tuple(row["seed"] for row in rows if row["way"] == way) for way in sizes} == {(1, 2)}
    training = {row["way"]: row["training_bytes"] for row in rows}
    assert training[AFTER] > 3 * training[FLOAT]


def test_trainings_at_a_time_are_those_one_after_the_other(cache, tmp_path):
    """At this batch no product is worth a second thread, so weights are the same; evaluations have larger
    batches, where the threads cut float32 products elsewhere."""
    folder, rows = cache
    for data in folder.glob("data-*"):
        shutil.copytree(data, tmp_path / data.name)
    found = measure(tmp_path, ways=(FLOAT,), jobs=2)
    alone = [row for row in rows if row["way"] in (FULL, FLOAT)]
    assert [row["auc"] for row in found] == [row["auc"] for row in alone]
    assert [row["log_loss"] for row in found] == pytest.approx([row["log_loss"] for row in alone], rel=1e-6)
    assert "NUMBA_NUM_THREADS" not in os.environ


def test_a_study_that_is_killed_leaves_no_process(tmp_path):
    program = tmp_path / "study.py"
    program.write_text(
        "import multiprocessing, time\n"
        "from analysis.trainings import _end_with_the_parent\n"
        "def work(started):\n"
        "    _end_with_the_parent()\n"
        "    started.set()\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    spawn = multiprocessing.get_context('spawn')\n"
        "    started = spawn.Event()\n"
        "    process = spawn.Process(target=work, args=(started,))\n"
        "    process.start()\n"
        "    started.wait()\n"
        "    print(process.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(claim.FOLDER.parent)}
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, env=environment) as study:
        process = int(study.stdout.readline())
        study.kill()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{process}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{process}").exists()


def test_what_is_stored_afterwards_is_what_is_scored(cache, monkeypatch):
    """Codes instead of floats: the same training, another score, and both are kept."""
    folder, rows = cache
    made = trained(monkeypatch)
    assert measure(folder) == rows
    assert made == []
    monkeypatch.setitem(AFTERWARDS, AFTER, (FLOAT, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equal_bytes, "fitted", lambda embedding, spec, size: weights_of(rows, embedding))
        other = measure(folder, ways=(FLOAT, AFTER))
    assert len(made) == 2  # those stored in 4 bits are not those stored in 8
    scores = {row["way"]: row["auc"] for row in other if row["seed"] == 1}
    assert scores[AFTER] != scores[FLOAT]
    assert scores[AFTER] == pytest.approx(scores[FLOAT], abs=0.02)


def test_tables_that_are_stored_smaller_have_scores_of_their_own(cache):
    """In one part, or pruned, to a quarter of the bytes: not the score that the table itself has."""
    ways = equal_bytes.QUANTISED, equal_bytes.PRUNED
    rows = measure(cache[0], ways=(FLOAT, *ways), compressions=(4,))
    found = {row["way"]: row for row in rows if row["seed"] == 1}
    budget = found[FLOAT]["stored_bytes"]
    for way in ways:
        assert 0.7 * budget < found[way]["stored_bytes"] <= budget
        assert found[way]["auc"] != found[FULL]["auc"]
        assert found[way]["auc"] == pytest.approx(found[FULL]["auc"], abs=0.05)


def weights_of(rows, embedding):
    """As many weights as the float32 array of the study had, whatever they are stored in."""
    size = next(row["stored_bytes"] for row in rows if row["way"] == FLOAT)
    return dataclasses.replace(embedding, weights=size // 4)


def test_a_study_without_intervals_is_refused(cache):
    with pytest.raises(ConfigError, match="an interval needs 2"):
        measure(cache[0], seeds=1)


def test_a_way_that_is_not_known_is_refused(cache):
    with pytest.raises(
        ConfigError, match=r"^'nothing' is no way of this study; there are ROBE, ROBE in 8 bits, "
    ):
        measure(cache[0], ways=("nothing",))


def test_a_script_tells_in_a_line_what_it_cannot_use(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "__main__", equal_bytes)
    monkeypatch.setattr(sys, "argv", ["equal_bytes.py", "--data", str(tmp_path)])
    with pytest.raises(SystemExit) as exit:
        equal_bytes.main()
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/manifest.json: not found; ")


GOOD = {
    (FULL, 1): 0.790,
    (FLOAT, 100): 0.780,
    ("ROBE in 3 bits", 100): 0.7895,
    ("ROBE in 8 bits", 100): 0.785,
    ("hashing", 100): 0.775,
    (FLOAT, 1000): 0.760,
    ("ROBE in 3 bits", 1000): 0.775,
    ("hashing", 1000): 0.750,
}


def planted(spread=1e-4, seeds=4, **changes):
    rng = np.random.default_rng(0)
    names = {f"{way} {compression}": (way, compression) for way, compression in GOOD}
    auc = GOOD | {names[name]: value for name, value in changes.items()}
    return [
        {
            **{"way": way, "compression": compression, "seed": seed, "first_stage": True, "rate": 0.03},
            **{"stored_bytes": 100_000 // compression, "training_bytes": 1, "best_auc": 0.8},
            **{"auc": value + spread * rng.standard_normal(), "log_loss": 1 - value},
        }
        for (way, compression), value in auc.items()
        for seed in range(seeds)
    ]


def test_the_verdict_accepts_what_the_claim_says():
    verdict = equal_bytes.verdict(planted())
    assert verdict.holds, verdict.text
    assert len(verdict.checks) == 5


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("few bits", {"ROBE in 3 bits 1000": 0.768}),
        ("few bits", {f"{FLOAT} 100": 0.7885}),
        ("rivals", {"hashing 100": 0.792}),
        ("rivals", {"hashing 1000": 0.776}),
        ("whole", {f"{FULL} 1": 0.793}),
    ],
)
def test_the_verdict_refuses_a_planted_wrong_result(part, wrong):
    verdict = equal_bytes.verdict(planted(**wrong))
    assert not verdict.holds
    assert part in [check.what.split(":")[0] for check in verdict.checks if not check.holds]


def test_intervals_too_wide_to_tell_refute_nothing():
    """As those of a quick study, whose deviations are as large as what is claimed."""
    assert equal_bytes.verdict(planted(spread=0.02, seeds=2)).holds


def test_steins_rule_has_its_level_whatever_the_deviation(rng):
    """Two stages of normal differences around 0.01: 95% of 2,000 intervals of half 0.5 hold it, 3 deviations
    of that share (0.0049) allowed; and no interval is wider than was asked for."""
    inside = 0
    for deviation in np.tile([0.05, 1, 2], 667):
        first = 0.01 + deviation * rng.standard_normal(4)
        more = wanted_for(first, 0.5) - len(first)
        less = np.concatenate([first, 0.01 + deviation * rng.standard_normal(more)])
        mean, half = equal_bytes.stein(less, 4)
        assert half <= 0.5
        inside += abs(mean - 0.01) <= half
    assert inside / 2001 == pytest.approx(0.95, abs=0.015)


def wanted_for(less, resolution):
    rows = [
        {"way": way, "compression": 10, "seed": seed, "auc": value * (way == "hashing")}
        for way in (FLOAT, "hashing")
        for seed, value in enumerate(less)
    ]
    return equal_bytes.wanted(rows, resolution)


def test_more_seeds_are_trained_until_differences_are_told(cache, monkeypatch):
    folder, _ = cache
    made = trained(monkeypatch)
    rows = measure(folder, resolution=1e-6, most=3, ways=(FLOAT, "hashing"))
    assert {config.seed for config in made} == {3}
    assert {row["seed"]: row["first_stage"] for row in rows} == {1: True, 2: True, 3: False}
    made.clear()
    assert len(measure(folder, resolution=1, most=3, ways=(FLOAT, "hashing"))) == 2 * 3
    assert made == []


def test_a_way_that_is_told_to_be_worse_goes_no_further(cache, monkeypatch):
    """hashing has the seeds of the heat alone; float32 goes on, although it is worse than 8 bits."""
    folder, _ = cache
    ways = FLOAT, "ROBE in 8 bits", "hashing"
    auc = {way: iter([good, good + 1e-4, good]) for way, good in zip(ways, (0.77, 0.78, 0.76), strict=True)}

    def run(self, point, rate, seed, passes):
        half = {"auc": next(auc[point.way]) if point.way in auc else 0.79, "log_loss": 0.5}
        return {"test": half, "validation": half}

    monkeypatch.setattr(equal_bytes.PointTrainings, "run", run)
    rows = measure(folder, heat=2, seeds=3, most=3, ways=ways)
    seeds = {way: [row["seed"] for row in rows if row["way"] == way] for way in (FULL, *ways)}
    assert seeds == {FULL: [1, 2, 3], FLOAT: [1, 2, 3], "ROBE in 8 bits": [1, 2, 3], "hashing": [1, 2]}
    points = {point["way"]: point for point in equal_bytes.summarise(rows)["points"]}
    assert points["hashing"]["seeds"] == 2
    assert points["hashing"]["less_float"] == pytest.approx((-0.01, 0.0), abs=1e-9)  # of the two alone


def test_table_and_figure_tell_the_best_of_each_size(tmp_path):
    rows = planted()
    summary = json.loads(json.dumps(equal_bytes.summarise(rows)))
    table = equal_bytes.table(summary).splitlines()
    assert table[0] == "Up to 4 seeds; the best possible test AUC is 0.8000."
    bold = [line.split(" | ")[1] for line in table if "**" in line]
    assert bold == [FULL, "ROBE in 3 bits", "ROBE in 3 bits"]
    assert len(table) == 4 + len(GOOD)
    equal_bytes.plot(rows).savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(("wrong", "code"), [({}, 0), ({"hashing 100": 0.792}, 1)])
def test_a_study_ends_with_its_checks_and_leaves_its_figures(wrong, code, tmp_path, monkeypatch, capsys):
    rows = planted(**wrong)
    verdict, figure = equal_bytes.verdict(rows), tmp_path / "equal_bytes.png"
    found = claim.Result(equal_bytes, {}, rows, verdict, figure, 0.0)
    monkeypatch.setattr(claim, "asked", lambda options: found)
    with pytest.raises(SystemExit) as exit:
        equal_bytes.main()
    assert exit.value.code == code
    summary = json.loads((tmp_path / "equal_bytes.json").read_text())
    assert summary == json.loads(json.dumps(equal_bytes.summarise(rows)))
    out = capsys.readouterr().out
    assert out.startswith(equal_bytes.table(summary))
    assert out.count("\nholds ") == 5 - code
    assert out.count("\nFAILS rivals: at 100x") == code
