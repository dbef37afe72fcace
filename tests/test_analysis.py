"""The scripts in analysis/: their claims hold, and a wrong formula, a bad hash or a wrong condition shows."""

import dataclasses
import os
import re
import subprocess
import sys
from itertools import permutations, product
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from analysis import (
    approximation_bounds,
    cache_hits,
    claim,
    convergence,
    dqrm,
    hash_quality,
    hash_variance,
    hot_drift,
    memory_fetches,
    report,
    sample_tables,
    sketch,
    stochastic_rounding,
    trainings,
)
from robe import cli as command_line
from robe.backend import select
from robe.config import ConfigError
from robe.kernels.parts.hashing import slot_map, slots_reference

ROOT = Path(__file__).parents[1]
NAMES = (
    *("hash_variance", "approximation_bounds", "memory_fetches", "hash_quality", "convergence"),
    *("stochastic_rounding", "cache_hits", "hot_drift", "dqrm"),
)


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    """`run.py analyze --quick`: its results by name, and the folder it wrote."""
    out, results = tmp_path_factory.mktemp("analysis"), {}
    carry_out = claim.carry_out

    def kept(script, *arguments, **options):
        result = carry_out(script, *arguments, **options, cache=out / "cache")
        results[Path(script.__file__).stem] = result
        return result

    with mock.patch.object(claim, "carry_out", kept):
        command_line.main(["analyze", *NAMES, "--quick", "--out", str(out)])
    return results, out


def failed(script, rows):
    """The checks that fail."""
    return [check.what for check in script.verdict(rows).checks if not check.holds]


def test_all_claims_hold(analysis):
    results, _ = analysis
    assert list(results) == list(NAMES)
    for result in results.values():
        assert failed(result.script, result.rows) == []
        assert len(result.verdict.checks) > 5


def test_the_report_is_complete_in_itself(analysis):
    results, out = analysis
    page = (out / "report.html").read_text()
    assert f"All {len(NAMES)} claims hold" in page
    assert page.count("data:image/png;base64,") == len(NAMES)
    assert not re.search(r'(src|href)="https?:', page)
    for name, result in results.items():
        assert (out / f"{name}.csv").read_text().count("\n") == len(result.rows) + 1
        assert (out / f"{name}.png").stat().st_size > 10_000
        assert re.search(rf'href="[^"]*analysis/{name}\.py">verdict \(analysis/{name}\.py:\d+\)', page)
        assert all(report.html.escape(check.what) in page for check in result.verdict.checks)
    for piece in ("numpy ", "matplotlib ", "seed = 0", "quick = True"):
        assert piece in page


# The hash under many seeds is the project's.


@pytest.mark.parametrize(("family", "width", "block"), [("mix", 24, 10), ("mix", 8, 64), ("affine", 24, 10)])
def test_many_seeds_at_once_are_the_seeds_one_by_one(family, width, block):
    tokens = np.array([0, 5, 2**33], np.uint64)
    slots, signs = slots_reference(sketch.many(family, width, block, 999, [3, 1024]), tokens)
    for i, seed in enumerate((3, 1024)):
        one = slots_reference(slot_map(family, width, block, 999, seed), tokens)
        assert np.array_equal(slots[i], one[0])
        assert np.array_equal(signs[i], one[1])


def test_sketching_and_recovering_are_scatter_add_and_gather():
    rng, width, memory = np.random.default_rng(0), 40, 101
    x = rng.integers(-9, 9, width).astype(np.float64)
    slots, signs = sketch.draw([7], width, 6, memory)
    phi = sketch.project(signs * x, slots, memory)
    kernels, ids, base = select("cpu").kernels, np.zeros((1, 1), np.uint32), np.zeros(1, np.uint64)
    where, array, read = slot_map("mix", width, 6, memory, 7), np.zeros(memory), np.empty((1, 1, width))
    kernels.scatter_add(x.reshape(1, 1, -1), ids, base, where, 1.0, array)
    kernels.gather(array, ids, base, where, read)
    assert np.array_equal(phi[0], array)
    assert np.array_equal(sketch.recover(phi, slots, signs)[0], read[0, 0])


# hash_variance


def test_enumeration_agrees_with_the_closed_forms():
    rng, counts = np.random.default_rng(5), dict.fromkeys(("all", "rest", "alias", "full", "edge"), 0)
    for n, block, memory, circular, signs in hash_variance.small_cases(quick=True):
        x, y = rng.normal(1, 1, (2, n))
        layout = (block, memory, circular, signs)
        exact = hash_variance.enumerated(x, y, *layout)
        assert hash_variance.bound(x, y, *layout) == pytest.approx(exact, rel=1e-9, abs=1e-9), layout
        counts["all"] += 1
        counts["rest"] += n % block > 0
        counts["alias"] += 2 * block - 1 > memory
        counts["full"] += block == memory
        counts["edge"] += not circular
    assert counts["all"] >= 150
    assert min(counts.values()) >= 30


def test_lags_that_are_the_same_modulo_the_array():
    """By hand: ones(8), Z = 4; were the lags not taken modulo M, M = 4 would give 44 and M = 5 35.2."""
    x = np.ones(8)
    for memory, variance in ((4, 64), (5, 41.6), (7, 44 * 4 / 7)):
        assert hash_variance.bound(x, x, 4, memory, True, "block")[1] == pytest.approx(variance)


def small_hash_variance(monkeypatch):
    """Measure on few vectors and seeds."""
    trials = sketch.trials
    vectors = sample_tables.vectors
    monkeypatch.setattr(hash_variance, "trials", lambda seed, count, *case: trials(seed, 1000, *case))
    monkeypatch.setattr(
        hash_variance,
        "vectors",
        lambda *a: {k: v for k, v in vectors(*a).items() if k in ("gauss", "positive", "zipf")},
    )
    monkeypatch.setattr(hash_variance, "trained_table", lambda *a: np.ones((125, 16)))
    return hash_variance.measure(quick=True)


RIGHT_BOUND, RIGHT_DRAW = hash_variance.bound, sketch.draw


@pytest.mark.parametrize("wrong", hash_variance.WRONG_FORMULAS)
def test_a_wrong_formula_of_the_variance_is_found(wrong):
    formula, case = hash_variance.WRONG_FORMULAS[wrong]
    rng, rows = np.random.default_rng(0), []
    for n, block, memory, circular, signs in hash_variance.small_cases(quick=True):
        if circular == case["circular"] and signs == case["signs"]:
            x = rng.normal(1, 1, n)
            columns = {"statistic": "enumeration", "n": n, "block": block, "memory": memory}
            columns |= {"circular": circular, "signs": signs}
            layout = (x, x, block, memory, circular, signs)
            with mock.patch.object(hash_variance, "bound", lambda *a: formula_of(formula, *a)):
                rows += hash_variance.compare(columns, x, x, exact=hash_variance.enumerated(*layout))
    worst = max(row["error"] for row in claim.where(rows, formula="right"))
    assert worst > 1e-3


def formula_of(formula, *arguments):
    """The wrong formula, made of the right one."""
    with mock.patch.object(hash_variance, "bound", RIGHT_BOUND):
        return formula(*arguments)


def test_signs_that_are_always_plus_are_found(monkeypatch):
    monkeypatch.setattr(
        hash_variance, "draw", lambda *a: (RIGHT_DRAW(*a)[0], np.ones_like(RIGHT_DRAW(*a)[1]))
    )
    bad = failed(hash_variance, small_hash_variance(monkeypatch))
    assert any("signs: element" in what for what in bad)
    assert not any("signs: none" in what for what in bad)


def test_blocks_that_do_not_cross_the_edge_are_found(monkeypatch):
    """A condition broken: circular formulas, and a hash with fewer starts."""

    def not_circular(seeds, elements, block, memory):
        slots, signs = RIGHT_DRAW(seeds, elements, block, memory)
        first = np.arange(elements) // block * block
        return slots[:, first] * (memory - block + 1) // memory + np.arange(elements) - first, signs

    monkeypatch.setattr(hash_variance, "draw", not_circular)
    assert any("|z|" in what for what in failed(hash_variance, small_hash_variance(monkeypatch)))


# approximation_bounds: a part of the rows is measured again, with a fault


@pytest.mark.parametrize(
    ("name", "wrong", "part", "measure"),
    [
        # Half the slots that any vector needs; a fourth of those a flat one needs.
        ("enough_for_any", lambda e, d: round(1 / (e**2 * d)), "worst vector", "worst_vector"),
        ("enough_for_flat", lambda e, d: round(0.5 / (e**2 * d**0.5)), "flat vector", "flat_vector"),
        ("bound", lambda e, m, rho: 0.5 / (m * e**2), "worst vector", "worst_vector"),
        ("birthday", lambda k, m: k**2 / m, "worst vector", "worst_vector"),
        # Copies that only ever help.
        ("copies_failure", lambda k, m, e: 0.0024 / k, "averaged copies", "averaged_copies"),
        ("enough_for_dense", lambda n, e, d: 4 * n**2, "many points", "many_points"),
        # The law of a normal variable instead of a bound for the largest of n.
        ("recovery_error", lambda n, m, flat: 2 / m**0.5, "largest error", "largest_error"),
        ("recovery_variance", lambda x, z, m: np.full(x.size, x @ x / m), "recovered", "recovered_elements"),
        ("best_residual", lambda n, z, m: 1 - m / n, "no approximation", "no_approximation"),
        ("sign_kept", lambda n, m: 1 - np.arctan(n / m) / np.pi, "no approximation", "no_approximation"),
    ],
)
def test_a_wrong_approximation_bound_is_found(name, wrong, part, measure, analysis, monkeypatch):
    monkeypatch.setattr(approximation_bounds, name, wrong)
    assert failed(approximation_bounds, again(analysis, approximation_bounds, part, measure))


def again(analysis, script, part, measure):
    """The rows of a script with one part measured anew."""
    name = script.__name__.rpartition(".")[2]
    kept = [row for row in analysis[0][name].rows if row["part"] != part]
    return kept + list(getattr(script, measure)(True, 0))


@pytest.mark.parametrize(("part", "measure"), [("recovered", "recovered_elements"), ("flat vector",) * 2])
def test_a_hash_that_uses_half_the_array_is_found(part, measure, analysis, monkeypatch):
    monkeypatch.setattr(approximation_bounds, "draw", lambda *a: (RIGHT_DRAW(*a)[0] // 2, RIGHT_DRAW(*a)[1]))
    measure = measure.replace(" ", "_")
    assert failed(approximation_bounds, again(analysis, approximation_bounds, part, measure))


def test_a_table_of_a_run(tmp_path):
    """Of full tables only: any other run is refused."""
    command_line.main(["synth", "--out", str(tmp_path / "raw"), "--rows", "2000", "--days", "2"])
    prepared = str(tmp_path / "prepared")
    command_line.main(["prepare", str(tmp_path / "raw"), "--out", prepared, "--ids", "dictionary"])
    for method in ("full", "robe"):
        settings = ["--method", method, "--width", "4", "--bottom", "8", "--top", "8"]
        command_line.main(["train", "--data", prepared, "--out", str(tmp_path / method), *settings])
    assert sample_tables.trained_table(tmp_path / "full").shape[1] == 4
    assert next(approximation_bounds.regimes(tmp_path / "full", 0))["n"] % 4 == 0
    with pytest.raises(ConfigError, match="not a run with full tables"):
        sample_tables.trained_table(tmp_path / "robe")


# memory_fetches


@pytest.mark.parametrize(
    ("width", "block", "lines"), [(128, 1, 128), (128, 16, 15.5), (128, 32, 11.75), (16, 4, 4.75)]
)
def test_lines_per_row(width, block, lines):
    assert memory_fetches.bound(width, block, 16) == lines


def test_wrong_numbers_of_lines_are_found(monkeypatch, analysis):
    rows = analysis[0]["memory_fetches"].rows
    monkeypatch.setattr(
        memory_fetches, "bound", lambda width, block, *_: memory_fetches.wrong(width, block or 1, 16)
    )
    counted = [*memory_fetches.enumeration(8), *(row for row in rows if row["part"] != "enumerated")]
    assert "enumeration equals the formula, mix" in failed(memory_fetches, counted)


def test_a_gather_that_reads_element_by_element_is_found(monkeypatch, analysis):
    monkeypatch.setattr(
        memory_fetches,
        "slot_map",
        lambda family, width, block, *rest, **signed: slot_map(family, width, 1, *rest, **signed),
    )
    kept = [row for row in analysis[0]["memory_fetches"].rows if row["part"] != "touched"]
    rows = kept + list(memory_fetches.addresses(True, 0))
    assert "lines that our gather touches, mix" in failed(memory_fetches, rows)


# hash_quality


@pytest.mark.parametrize(("instead", "of"), [("affine", "mix"), ("mix", "affine")])
def test_a_bad_hash_is_found_and_a_good_one_is_not_taken_for_bad(instead, of, monkeypatch):
    right = hash_quality.starts_of
    monkeypatch.setattr(
        hash_quality, "starts_of", lambda family, *rest: right(instead if family == of else family, *rest)
    )
    tokens, rows = np.arange(hash_quality.TOKENS, dtype=np.uint64), []
    for family in hash_quality.FAMILIES:
        rows += hash_quality.spread(family, "consecutive", tokens, sketch.trials(0, 60, 1))
    bad = failed(hash_quality, rows)
    assert bad
    assert all(what.startswith((of, "no row")) for what in bad)


def test_rows_that_repeat_are_counted():
    assert hash_quality.repeated("mix", 0, rows=1000)["repeated"] == 0
    # Four positions for each of four blocks: at most 256 rows differ.
    assert hash_quality.repeated("mix", 0, rows=1000, memory=4)["repeated"] >= 744


def test_real_ids_from_a_raw_log_and_from_a_folder(tmp_path):
    command_line.main(["synth", "--out", str(tmp_path / "raw"), "--rows", "3000", "--days", "2"])
    command_line.main(["prepare", str(tmp_path / "raw"), "--out", str(tmp_path / "prepared")])
    rng = np.random.default_rng(0)
    raw = next(path for path in sorted((tmp_path / "raw").iterdir()) if path.suffix != ".json")
    for data in (raw, tmp_path / "prepared"):
        tokens = hash_quality.id_patterns(rng, data)["real"]
        assert len(np.unique(tokens)) == len(tokens) > 1000
        assert len(np.unique(tokens >> np.uint64(32))) == 26


# convergence


@pytest.mark.parametrize(
    ("name", "wrong", "part", "measure"),
    [
        ("floor", lambda least, rate: least, "floor", "one_pass"),
        ("spike", lambda n, f, m: n * f / m + f, "conditioning", "conditioning"),
        ("bound", lambda n, f, m: (f, 1.5, 3.0), "conditioning", "conditioning"),
        ("curvature_range", lambda r, m: (2000 / m, 2000 / m), "curvature", "curvature"),
        # No signs where the formulas are those with signs.
        ("draw", lambda *a: (RIGHT_DRAW(*a)[0], np.ones_like(RIGHT_DRAW(*a)[1])), "gradient", "gradients"),
        (
            "draw",
            lambda *a: (RIGHT_DRAW(*a)[0], np.ones_like(RIGHT_DRAW(*a)[1])),
            "conditioning",
            "conditioning",
        ),
    ],
)
def test_a_wrong_claim_of_convergence_is_found(name, wrong, part, measure, analysis, monkeypatch):
    monkeypatch.setattr(convergence, name, wrong)
    assert failed(convergence, again(analysis, convergence, part, measure))


def test_the_least_error_is_that_of_the_normal_equations():
    """Against a dense matrix of second moments, on tables small enough for one."""
    rng, vocabulary, memory = np.random.default_rng(0), 6, 9
    n = convergence.FIELDS * vocabulary
    law = sample_tables.zipf_rows(vocabulary) / sample_tables.zipf_rows(vocabulary).sum()
    p = np.tile(law, convergence.FIELDS)
    moment = np.outer(p, p)
    for f in range(convergence.FIELDS):
        own = slice(f * vocabulary, (f + 1) * vocabulary)
        moment[own, own] = np.diag(law)
    slots, signs, truth = rng.integers(0, memory, n), rng.choice([-1, 1], n), rng.normal(size=n)
    shared = np.zeros((n, memory))
    shared[np.arange(n), slots] = signs
    theta = np.linalg.lstsq(shared.T @ moment @ shared, shared.T @ moment @ truth)[0]
    left = truth - shared @ theta
    found = convergence.least_error(slots, signs, truth, law, memory)
    assert found == pytest.approx(left @ moment @ left, rel=1e-6)


# stochastic_rounding


def without(rows, kind):
    return [row for row in rows if row["kind"] != kind]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda n, s, h: (n * s, n * h**2 / 12), "bits at random"),
        # Off by one part in a hundred.
        (lambda n, s, h: (n * s * 1.01, n * s * (h - s)), "bits at random"),
        (lambda n, s, h: (0.0, 0.0), "bits to the nearest"),
    ],
)
def test_a_wrong_formula_of_rounding_is_found(wrong, told, analysis, monkeypatch):
    right = stochastic_rounding.bound
    random = told == "bits at random"
    monkeypatch.setattr(
        stochastic_rounding,
        "bound",
        lambda *moved: wrong(*moved[:3]) if (moved[3] == "stochastic") == random else right(*moved),
    )
    rows = without(analysis[0]["stochastic_rounding"].rows, "moved")
    bad = failed(stochastic_rounding, [*rows, *stochastic_rounding.moves(2**10, 0)])
    assert len(bad) == 3
    assert all(told in what for what in bad)


def test_a_wrong_formula_that_is_right_is_not_rejected(analysis, monkeypatch):
    wrong = stochastic_rounding.WRONG_FORMULAS
    for name, (_, case) in list(wrong.items()):
        monkeypatch.setitem(
            wrong, name, (lambda *moved, r=case["rounding"]: stochastic_rounding.bound(*moved, r), case)
        )
    rows = without(analysis[0]["stochastic_rounding"].rows, "moved")
    bad = failed(stochastic_rounding, [*rows, *stochastic_rounding.moves(2**10, 0)])
    assert bad == [f"rejected: {name}" for name in wrong]


def test_rounding_that_is_not_as_random_as_it_says_is_found(analysis, monkeypatch):
    """To the nearest after all, and with the same draws at each step, whose mean is right."""
    rows = without(analysis[0]["stochastic_rounding"].rows, "moved")
    form, key = stochastic_rounding.Form, stochastic_rounding.rounding_key
    for name, faulty in (
        ("Form", lambda bits, random, width: form(bits, False, width)),
        ("rounding_key", lambda seed, step: key(seed, 0)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(stochastic_rounding, name, faulty)
            bad = failed(stochastic_rounding, [*rows, *stochastic_rounding.moves(2**10, 0)])
        assert sum("at random" in what for what in bad) == 3


def test_trainings_whose_names_are_mixed_up_are_found(analysis):
    rows = analysis[0]["stochastic_rounding"].rows
    names = [f"INT4 {rounding}" for rounding in stochastic_rounding.ROUNDINGS]
    swapped = dict(zip(names, names[::-1], strict=True))
    for seeds in ({1}, {1, 2, 3, 4}):
        mixed = [
            row | {"point": swapped.get(row["point"], row["point"])} if row.get("seed") in seeds else row
            for row in rows
        ]
        assert any(
            what.startswith("INT4 rounded at random beats") for what in failed(stochastic_rounding, mixed)
        )


def test_without_ids_that_count_the_rows_are_synthetic(tmp_path):
    command_line.main(["synth", "--out", str(tmp_path / "raw"), "--rows", "2000", "--days", "2"])
    folders = {ids: tmp_path / ids for ids in ("hash", "dictionary")}
    for ids, folder in folders.items():
        command_line.main(["prepare", str(tmp_path / "raw"), "--out", str(folder), "--ids", ids])
    said = []
    for ids, rows in (("dictionary", 2000), ("hash", 900)):
        tiny = dataclasses.replace(stochastic_rounding.QUICK, rows=900, data=folders[ids])
        manifest = trainings.rows_of(tiny, tmp_path, said.append)
        assert (manifest.ids.dialect, sum(day.rows for day in manifest.days)) == ("dictionary", rows)
    assert [text.split(":")[0] for text in said] == [str(folders["hash"])]


def test_what_arrays_of_codes_lose_is_told():
    level = np.array([0.75, 0.76, 0.74, 0.75])
    noise = np.array([0.0001, -0.0001, 0.0001, -0.0001])
    auc = {
        "array": level + 0.002,
        "array, a sum for a group": level,
        "array, INT8 stochastic": level + noise,
        "array, INT8 nearest": level - 0.002,
        "array, INT4 stochastic": (level - noise - 0.02)[:3],  # which has fewer seeds
        "array, INT4 nearest": level[:3] - 0.02,
    }
    assert stochastic_rounding.points((8, 4)).keys() > auc.keys()
    assert all(check.holds for check in stochastic_rounding.checks_of_arrays(auc))
    for point, change, told in (
        ("array", -0.004, "an array whose Adagrad"),
        ("array, INT8 stochastic", -0.001, "an array in INT8 alone loses"),
        ("array, INT8 nearest", 0.003, "an array in INT8 alone that is rounded at random"),
        ("array, INT4 stochastic", 0.03, "rejected: an array in INT4"),
    ):
        changed = auc | {point: auc[point] + change}
        (fails,) = (check for check in stochastic_rounding.checks_of_arrays(changed) if not check.holds)
        assert fails.what.startswith(told)


# dqrm


@pytest.mark.parametrize(
    ("point", "change", "told"),
    [
        ("INT4", {"auc": 0.5}, "INT4 loses less"),
        ("INT4, gradients in INT8", {"auc": 0.5}, "INT4, gradients in INT8 loses less"),
        ("INT1", {"auc": 0.9}, "rejected: one bit"),
        ("INT4", {"bytes": 1000}, "tables are"),
    ],
)
def test_a_loss_in_few_bits_is_found(point, change, told, analysis):
    rows = [row | change if row["point"] == point else row for row in analysis[0]["dqrm"].rows]
    assert any(what.startswith(told) for what in failed(dqrm, rows))


def test_gradients_are_sent_in_255_levels():
    gradients = np.random.default_rng(0).standard_normal((50, 3, 8)).astype(np.float32)
    sent = dqrm.in_int8(gradients)
    scale = abs(gradients).max() / 127
    assert abs(sent - gradients).max() <= scale / 2 * 1.001
    assert 100 < np.unique(sent).size <= 255
    np.testing.assert_array_equal(dqrm.in_int8(0 * gradients), 0 * gradients)


# cache_hits


def test_rates_of_lru_are_those_of_its_stationary_law():
    """King's (1971): the rows used last are r1, r2, ... with p1 * p2 / (1 - p1) * p3 / (1 - p1 - p2) ..."""
    p = cache_hits.law_of(7, 0.9) * 0.4  # a set that sees 40% of all look-ups
    for ways in (1, 2, 3, 4):  # Che's is off by 0.0004 at least
        hits = 0.0
        for rows in permutations(range(len(p)), ways):
            q, left, chance = p / p.sum(), 1.0, 1.0
            for row in rows:
                chance, left = chance * q[row] / left, left - q[row]
            hits += chance * p[list(rows)].sum()
        assert cache_hits.lru(p, ways) == pytest.approx(hits, abs=1e-6)
    assert cache_hits.lru(p, 1) == pytest.approx(cache_hits.lfu(p, 1), abs=1e-6)
    assert cache_hits.lru(p, 7) == cache_hits.lfu(p, 8) == cache_hits.che(p, 7) == pytest.approx(0.4)


def test_lfu_keeps_all_but_the_last_line():
    """By hand: of 4 rows in 3 lines 2 stay, and the last passes between the others."""
    p = np.array([0.4, 0.3, 0.2, 0.1])
    assert cache_hits.lfu(p, 3) == pytest.approx(0.7 + (0.04 + 0.01) / 0.3)


@pytest.mark.parametrize(
    ("theory", "wrong"),
    [("LFU", "one way"), ("LFU", "LRU"), ("LRU", "LFU"), ("LRU", "top lines"), ("Che", "LRU, one set")],
)
def test_a_wrong_theory_of_hits_is_found(theory, wrong, analysis):
    rows = [row | {theory: row[wrong]} for row in analysis[0]["cache_hits"].rows]
    assert any(what.startswith(theory) for what in failed(cache_hits, rows))


def test_policies_that_are_mistaken_for_each_other_are_found(analysis):
    other = {"LFU": "LRU", "LRU": "LFU"}
    rows = [row | {"policy": other[row["policy"]]} for row in analysis[0]["cache_hits"].rows]
    bad = failed(cache_hits, rows)
    assert any(what.startswith("LFU look-up by") for what in bad)
    assert any(what.startswith("LRU look-up by") for what in bad)


def test_a_cache_that_lost_half_of_its_ways_is_found(monkeypatch):
    """They hold rows that are never looked up and never leave."""

    class Halved(cache_hits.Cache):
        def __init__(self, sets, policy):
            super().__init__(sets, policy)
            self.tags[:, ::2], self.used[:, ::2] = 10_000 + np.arange(16), 2**31

    p, sets = cache_hits.law_of(500, 1.0), 2
    right = cache_hits.bound(p, sets)["LRU"]
    half = sum(cache_hits.lru(p[rows], 16) for rows in cache_hits.sets_of(500, sets))
    for cache, rate, other in ((cache_hits.Cache, right, half), (Halved, half, right)):
        monkeypatch.setattr(cache_hits, "Cache", cache)
        parts = cache_hits.hit_rates(p, sets, "LRU", 1, 8000, "warm", np.random.default_rng(0))
        assert abs(claim.z_mean(parts, rate)) < claim.RIGHT
        assert abs(claim.z_mean(parts, other)) > claim.WRONG


# hot_drift


def test_the_best_that_rows_can_serve_is_counted_by_sets():
    """By hand: of ids that all have one set, HOT are served, whatever the number of rows."""
    ids = np.arange(4000, dtype=np.uint32)
    same = ids[hot_drift.set_of(hot_drift.hash_token(ids.astype(np.uint64)), 2) == 1][:100]
    p = np.arange(100.0, 0, -1) / 5050
    limit, in_sets = hot_drift.best(p, same, 2)
    assert limit == pytest.approx(p[:16].sum())
    assert in_sets == pytest.approx(p[:8].sum())


@pytest.mark.parametrize("other", [hot_drift.NEVER, hot_drift.FIRST])
def test_rows_that_do_not_follow_a_drift_are_found(other, analysis):
    """What the sketch served, and what the others did, change places."""
    names = {hot_drift.SKETCH: other, other: hot_drift.SKETCH}
    rows = [row | {"of": names.get(row["of"], row["of"])} for row in analysis[0]["hot_drift"].rows]
    bad = failed(hot_drift, rows)
    assert any(what.startswith(f"rejected: {other} would do (abrupt)") for what in bad)
    assert any("half-lives later as before" in what for what in bad)


# The command


def test_a_claim_that_fails_ends_the_command_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convergence, "floor", lambda least, rate: least)
    with pytest.raises(SystemExit) as exit:
        command_line.main(["analyze", "convergence", "--quick", "--out", str(tmp_path)])
    assert exit.value.code == 1
    assert "FAILS convergence: not so: one pass ends" in capsys.readouterr().out
    assert "0 of 1 claims hold" in (tmp_path / "report.html").read_text()


def test_an_unknown_analysis_is_refused_by_name(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        command_line.main(["analyze", "nonsense", "--out", str(tmp_path)])
    assert exit.value.code == 2
    assert "no analysis nonsense; there are" in capsys.readouterr().err


def test_scripts_are_found_by_their_file_alone(tmp_path, monkeypatch):
    by_ci = "pruned_rows", "staleness", "tried"
    by_their_tests = "equal_bytes", "recipes", "scale", "tradeoff"
    assert {*NAMES, *by_ci, *by_their_tests} == set(claim.scripts())
    (tmp_path / "mine.py").write_text("\ndef verdict(rows):\n    return True, ''\n")
    (tmp_path / "helper.py").write_text("def mean(rows):\n    pass\n")
    monkeypatch.setattr(claim, "FOLDER", tmp_path)
    assert claim.scripts() == ["mine"]


def test_a_script_runs_by_itself(tmp_path):
    command = [sys.executable, str(ROOT / "analysis" / "convergence.py"), "--quick", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("holds convergence: ")
    assert (tmp_path / "convergence.png").exists()


def test_the_command_line_does_not_load_the_analysis():
    heavy = "{'analysis.claim', 'matplotlib'}"
    code = f"import sys, run; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# Intervals


def test_intervals():
    assert claim.share_interval(0, 10)[0] == 0
    assert claim.share_interval(10, 10)[1] == 1
    # Clopper and Pearson's table: 3 of 10.
    assert claim.share_interval(3, 10) == pytest.approx((0.0667, 0.6525), abs=1e-4)
    mean, half = claim.mean_interval([1, 2, 3, 4, 5])
    assert (mean, half) == pytest.approx((3, 1.9632), abs=1e-4)
    assert claim.z_mean(np.array([1.0, 1.0]), 1.0) == 0
    assert abs(claim.z_mean(np.array([1.0, 1.0]), 2.0)) > 1e6
    assert claim.conclude([]).holds is False


def test_pieces_of_a_row():
    for width, block in product(range(1, 12), repeat=2):
        for first in range(block):
            cut = memory_fetches.pieces(width, block, first)
            assert sum(cut) == width
            assert all(0 < length <= block for length in cut)


def test_the_best_shared_table_of_two_blocks():
    """By hand: two blocks of 2 in 4 slots leave a slot empty with probability (1/2)^2."""
    assert approximation_bounds.best_residual(4, 2, 4) == pytest.approx(0.25)


@pytest.mark.parametrize("holds", [True, False])
def test_a_script_has_a_command_line_of_its_own(monkeypatch, holds):
    """It hands on what was given, and ends as the verdict says."""
    asked = {}

    def carry_out(script, **options):
        asked.update(options, script=script)
        return mock.Mock(verdict=claim.Verdict(holds, "", ()))

    monkeypatch.setattr(claim, "carry_out", carry_out)
    monkeypatch.setitem(sys.modules, "__main__", hash_variance)
    monkeypatch.setattr(sys, "argv", ["hash_variance.py", "--quick", "--seed", "3", "--run", "runs/full"])
    with pytest.raises(SystemExit) as ended:
        claim.main(claim.RunOptions)
    assert ended.value.code == (not holds)
    given = {"quick": True, "seed": 3, "run": Path("runs/full"), "out": claim.OUT}
    assert asked == given | {"script": hash_variance}
