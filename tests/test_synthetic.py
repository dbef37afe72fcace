import gzip
import json
import re
import tracemalloc
from dataclasses import replace
from itertools import combinations
from math import exp, log1p

import numpy as np
import pytest

from data_pipeline import synthetic
from data_pipeline.schema import DataError
from data_pipeline.synthetic import Law, SyntheticConfig, write, zipf_ranks

LINE = re.compile(r"[01](\t(-?[0-9]+)?){13}(\t([0-9a-f]{8})?){26}")


@pytest.fixture(scope="module")
def law(tmp_path_factory):
    return Law(SyntheticConfig(tmp_path_factory.mktemp("law"), rows=0))


@pytest.fixture(scope="module")
def chunk(law):
    return law.draw(100_000, 7)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Settings that are quick to write, and still end chunks within a half."""
    monkeypatch.setattr(synthetic, "CHUNK_ROWS", 300)
    monkeypatch.setattr(synthetic, "SAMPLE_CHUNKS", 5)
    return SyntheticConfig(tmp_path / "log", rows=2003, days=2)


def drawn(config):
    """The chunks of each file of 1002 and of 1001 rows."""
    law = Law(config)
    for day, halves in enumerate([(501, 501), (501, 500)]):
        yield [
            law.draw(min(300, rows - start), day, half, start)
            for half, rows in enumerate(halves)
            for start in (0, 300)
        ]


def as_text(cell):
    return "" if np.isnan(cell) else str(int(cell))


def test_files_are_the_drawn_rows_in_criteos_format(small):
    write(small)
    assert sorted(path.name for path in small.out.iterdir()) == ["day_0", "day_1", "synthetic.json"]
    law = Law(small)
    for day, chunks in enumerate(drawn(small)):
        expected = []
        for chunk in chunks:
            values = law.values(chunk.ranks)
            for label, dense, ranks, hashed in zip(
                chunk.label, chunk.dense, chunk.ranks, values, strict=True
            ):
                cells = [str(int(label)), *map(as_text, dense)]
                cells += [f"{v:08x}" if rank else "" for v, rank in zip(hashed, ranks, strict=True)]
                expected.append("\t".join(cells))
        text = (small.out / f"day_{day}").read_bytes().decode("ascii")
        assert text == "".join(line + "\n" for line in expected)
        assert all(LINE.fullmatch(line) for line in expected)


def test_text_of_extreme_counts():
    dense = np.array([[0, -3, 9, 10, 2**31 - 1, np.nan, 100, 99, 1_000_000, 1, 0, np.nan, 4_294_967]])
    ranks = np.array([[0, 1] * 13], np.uint32)
    values = np.array([[7, 0xABC] * 13], np.uint32)
    line = synthetic.to_text(synthetic.Chunk(np.array([True]), dense, ranks, np.zeros(1)), values)
    counts = b"0\t-3\t9\t10\t2147483647\t\t100\t99\t1000000\t1\t0\t\t4294967"
    assert line == b"1\t" + counts + 13 * b"\t\t00000abc" + b"\n"


def test_the_same_settings_give_the_same_bytes_packed_or_not(small):
    outs = {name: small.out.with_name(name) for name in ("again", "packed", "repacked", "other")}
    write(small)
    write(replace(small, out=outs["again"]))
    write(replace(small, out=outs["other"], seed=1))
    for name in ("packed", "repacked"):
        write(replace(small, out=outs[name], gzip=True))
    for name in ("day_0", "day_1", "synthetic.json"):
        assert (outs["again"] / name).read_bytes() == (small.out / name).read_bytes()
        assert (outs["other"] / name).read_bytes() != (small.out / name).read_bytes()
    for name in ("day_0", "day_1"):
        packed = (outs["packed"] / f"{name}.gz").read_bytes()
        assert packed == (outs["repacked"] / f"{name}.gz").read_bytes()
        assert packed[3:8] == bytes(5)  # no flags, so no name, and no time
        assert gzip.decompress(packed) == (small.out / name).read_bytes()
    plain, packed = (json.loads((out / "synthetic.json").read_text()) for out in (small.out, outs["packed"]))
    assert list(packed["files"]) == ["day_0.gz", "day_1.gz"]
    for file, (name, figures) in zip(plain["files"].values(), packed["files"].items(), strict=True):
        assert figures.pop("bytes") == (outs["packed"] / name).stat().st_size
        assert figures == {part: file[part] for part in figures}
        assert len(figures) == 3


def test_no_chunk_repeats_another(law):
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2**32)]
    assert len({law.draw(50, *key).dense.tobytes() for key in keys}) == len(keys)
    np.testing.assert_array_equal(law.draw(50, 1, 0, 0).ranks, law.draw(50, 1, 0, 0).ranks)


def exact_figures(label, logit):
    """The same as `synthetic.json` holds, by definition: every pair of rows, every term."""
    positives, negatives = logit[label], logit[~label]
    wins = (positives[:, None] > negatives).sum() + (positives[:, None] == negatives).sum() / 2
    return {
        "rows": len(label),
        "auc": wins / (len(positives) * len(negatives)),
        "log_loss": np.mean([log1p(exp(-s if y else s)) for y, s in zip(label, logit, strict=True)]),
        "base_rate": label.mean(),
    }


def test_figures_are_those_of_the_true_probabilities(small):
    report = write(small)
    assert json.loads((small.out / "synthetic.json").read_text()) == report
    assert list(report) == ["note", "config", "files"]
    assert report["config"]["rows"] == 2003
    assert "out" not in report["config"]
    for day, chunks in enumerate(drawn(small)):
        label = np.concatenate([chunk.label for chunk in chunks])
        logit = np.concatenate([chunk.logit for chunk in chunks])
        parts = {"all": (label, logit)}
        cut = zip(np.array_split(label, 2), np.array_split(logit, 2), strict=True)
        parts |= dict(zip(["first_half", "second_half"], cut, strict=True))
        figures = report["files"][f"day_{day}"]
        assert list(figures) == ["bytes", *parts]
        assert figures["bytes"] == (small.out / f"day_{day}").stat().st_size
        for part, rows in parts.items():
            expected = exact_figures(*rows)
            assert list(figures[part]) == list(expected)
            assert figures[part]["rows"] == expected["rows"]
            assert figures[part]["auc"] == pytest.approx(expected["auc"], abs=1e-5)
            assert figures[part]["log_loss"] == pytest.approx(expected["log_loss"], abs=1e-12)
            assert figures[part]["base_rate"] == pytest.approx(expected["base_rate"], abs=1e-12)


def ranked_auc(label, score):
    """Exact for scores without ties."""
    order = np.argsort(score)
    positives = label.sum()
    ranks = np.flatnonzero(label[order]) + 1
    return (ranks.sum() - positives * (positives + 1) / 2) / (positives * (len(label) - positives))


def test_the_histogram_resolves_the_auc(chunk):
    tally = synthetic._Tally()
    tally.add(chunk.label, chunk.logit)
    negatives, positives = tally.counts
    bound = float(negatives @ positives) / 2 / (float(negatives.sum()) * float(positives.sum()))
    assert bound < 1e-5
    assert abs(tally.figures()["auc"] - ranked_auc(chunk.label, chunk.logit)) <= bound


def test_one_sided_labels_have_no_auc_and_far_logits_still_count():
    tally = synthetic._Tally()
    tally.add(np.array([True, True]), np.array([-99.0, 99.0]))
    assert tally.figures() == {"rows": 2, "auc": None, "log_loss": 49.5, "base_rate": 1.0}
    tally.add(np.array([False]), np.array([0.0]))
    assert tally.figures()["auc"] == 0.5


@pytest.mark.parametrize(("base_rate", "seed"), [(0.25, 1), (0.032, 2)])
def test_base_rate_is_within_one_percent(tmp_path, base_rate, seed):
    chunk = Law(SyntheticConfig(tmp_path, rows=0, base_rate=base_rate, seed=seed)).draw(200_000, 3)
    probability = 1 / (1 + np.exp(-chunk.logit))
    assert probability.mean() == pytest.approx(base_rate, rel=0.01)
    # Labels follow the probabilities: overall, and among the rows of a like probability.
    for rows in np.array_split(np.argsort(chunk.logit), 5):
        p, y = probability[rows], chunk.label[rows]
        assert abs((y - p).sum()) < 5 * np.sqrt((p * (1 - p)).sum())


def test_ranks_follow_the_zipf_law(law, chunk):
    for feature, cardinality in enumerate(law.cardinalities):
        ranks = chunk.ranks[:, feature]
        ranks = ranks[ranks > 0]
        edges = np.arange(cardinality + 1) + 0.5
        expected = -np.diff(edges**-0.2) / (edges[0] ** -0.2 - edges[-1] ** -0.2) * len(ranks)
        seen = np.bincount(ranks, minlength=cardinality + 1)[1:]
        assert len(seen) == cardinality
        common = expected >= 5
        expected = np.append(expected[common], expected[~common].sum())
        seen = np.append(seen[common], seen[~common].sum())
        chi_square = ((seen - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
        freedom = len(expected) - 1
        assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.2])
def test_zipf_over_forty_million_ranks(exponent):
    cardinality = 40_000_000
    uniform = (np.arange(1_000_000)[:, None] + 0.5) / 1_000_000
    ranks = zipf_ranks(uniform, np.array([cardinality]), exponent)[:, 0].astype(int)
    assert 1 <= ranks.min() <= ranks.max() <= cardinality
    k = np.arange(1, cardinality + 1, dtype=np.float64)
    weight = k**-exponent
    total = weight.sum()
    for low, high in [(3, 10), (10, 100), (1000, 10_000), (10**6, cardinality)]:
        share = np.mean((ranks >= low) & (ranks < high))
        assert share == pytest.approx(weight[low - 1 : high - 1].sum() / total, rel=0.04)


def test_ranks_have_values_of_their_own(law):
    ranks = np.repeat(np.arange(1, 100_001, dtype=np.uint32)[:, None], 26, axis=1)
    values = law.values(ranks)
    assert values.dtype == np.uint32
    assert values.min() > 0
    for feature in range(26):
        assert len(np.unique(values[:, feature])) == len(ranks)
    assert len(np.unique(values[:100])) == 2600  # nor do features share them
    assert (values >> 31).mean() == pytest.approx(0.5, abs=0.01)


def test_values_are_mixed_by_a_bijection_and_zero_needs_a_rank_that_does_not_exist(law):
    assert not law.values(law.value_keys[None]).any()
    assert np.all(law.value_keys >= 2**31)
    assert np.all(law.values(law.value_keys[None] ^ np.uint32(1)) == 0x514E28B7)  # MurmurHash3's fmix32(1)


def test_counts_are_heavy_tailed_partly_negative_and_partly_missing(chunk):
    assert np.isnan(chunk.dense).mean(axis=0) == pytest.approx(synthetic.DENSE_MISSING / 100, abs=0.01)
    assert (chunk.ranks == 0).mean(axis=0) == pytest.approx(synthetic.IDS_MISSING / 100, abs=0.01)
    assert np.nanmin(chunk.dense, axis=0).tolist() == [0, -3] + 11 * [0]
    assert {-3, -2, -1} <= set(chunk.dense[:, 1])
    assert np.all(np.nanmax(chunk.dense, axis=0) > 15 * (1 + np.nanmedian(chunk.dense, axis=0)))
    assert np.nanmax(chunk.dense) < 2**31


def test_the_logit_is_linear_part_plus_all_pairs(law):
    chunk = law.draw(20, 1)
    for row in range(20):
        parameters = law._parameters(chunk.ranks[row : row + 1])[0] - law.centre
        paired = [parameters[f, 1:].astype(float) for f in range(0, 26, 4)]
        parts = [
            sum(
                w * log1p(max(x, 0))
                for w, x in zip(law.dense_weights, chunk.dense[row], strict=True)
                if x == x
            ),
            parameters[:, 0].sum(),
            sum(u @ v for u, v in combinations(paired, 2)),
        ]
        logit = law.bias + sum(w * p for w, p in zip(law.part_weights, parts, strict=True))
        assert chunk.logit[row] == pytest.approx(logit, abs=1e-4)


def test_each_part_has_the_deviation_asked_for(law, chunk):
    parts = law._parts(chunk.dense, chunk.ranks) * law.part_weights
    assert parts.std(axis=0) == pytest.approx([0.3, 1.1, 0.8], rel=0.03)
    # The parts are not the same thing in other words, so only pairs can tell what pairs say.
    correlation = np.corrcoef(parts.T)
    assert np.abs(correlation[np.triu_indices(3, 1)]).max() < 0.02
    for feature in range(0, 26, 4):
        for rank in (1, 2, 3):
            pairs = parts[chunk.ranks[:, feature] == rank, 2]
            assert abs(pairs.mean() - parts[:, 2].mean()) < 5 * pairs.std() / np.sqrt(len(pairs)) + 0.01


def test_dense_columns_and_single_categories_are_not_enough(law, chunk):
    parts = law._parts(chunk.dense, chunk.ranks) * law.part_weights
    best = ranked_auc(chunk.label, chunk.logit)
    assert 0.78 < best < 0.83
    assert ranked_auc(chunk.label, parts[:, 0]) < best - 0.2
    assert ranked_auc(chunk.label, parts[:, 0] + parts[:, 1]) < best - 0.04


def test_progress_counts_rows(small):
    seen = []
    write(small, lambda done, total: seen.append((done, total)))
    steps = np.diff([0] + [done for done, _ in seen])
    assert all(0 < step <= 300 for step in steps)
    assert seen[-1] == (2003, 2003)
    assert {total for _, total in seen} == {2003}


def test_a_failure_leaves_nothing_behind(small, monkeypatch):
    def stop(done, total):
        if done > 1500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(small, stop)
    assert list(small.out.parent.iterdir()) == []
    monkeypatch.setattr(synthetic, "to_text", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(DataError, match="No space left; more space is needed"):
        write(small)
    assert list(small.out.parent.iterdir()) == []


def test_a_taken_folder_is_refused_and_kept(small):
    small.out.mkdir()
    write(small)  # an empty one will do
    before = {path: path.read_bytes() for path in small.out.iterdir()}
    with pytest.raises(DataError, match="not an empty folder"):
        write(replace(small, seed=5))
    assert {path: path.read_bytes() for path in small.out.iterdir()} == before
    with pytest.raises(DataError, match="not an empty folder"):
        write(replace(small, out=small.out / "day_0"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"days": 0},
        {"rows": 3},
        {"scale": 0},
        {"scale": 300},
        {"base_rate": 0},
        {"base_rate": 1},
        {"seed": -1},
        {"zipf": float("nan")},
        {"effects": float("inf")},
        {"decay": -1e9},
    ],
)
def test_impossible_settings_are_refused(small, wrong):
    with pytest.raises(DataError, match=next(iter(wrong)).replace("_", "-")):
        write(replace(small, **wrong))
    assert not small.out.exists()


def test_memory_does_not_grow_with_the_rows(small):
    def peak(rows):
        tracemalloc.start()
        write(replace(small, out=small.out.with_name(f"{rows}"), rows=rows, days=1))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(30_000) < peak(3_000) + 1_000_000  # its text alone is six times as large
