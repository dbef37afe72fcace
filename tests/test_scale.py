"""The study of CriteoTB's size: what is kept and goes on, what does not fit, and verdicts that can fail."""

import dataclasses
import json
import re
from functools import cache
from unittest import mock

import numpy as np
import pytest

from analysis import claim, planted, scale
from analysis.planted import HELD_OUT
from analysis.scale import HASHING, TABLE, TEN_THOUSAND, THOUSAND
from data_pipeline import synthetic
from robe.config import ConfigError

TINY = dataclasses.replace(scale.QUICK, rows=20 * 64, held_out=2000, batch=64, ways=(TABLE, THOUSAND))


@pytest.fixture(scope="module", autouse=True)
def made_once():
    """The law, whose sample takes a second; and few steps are timed."""
    with mock.patch.multiple(scale, law_of=cache(planted.law_of), TURNS=1, BURST=2):
        yield


def quietly(folder, study=TINY, **options):
    return scale.measure(study=study, cache=folder, say=lambda text: None, **options)


def lasting(rows):
    return [row for row in rows if row["kind"] != "step_ms"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the trainings of the tiny study, and what it found."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, quietly(folder)


def test_what_is_there_is_not_trained_again(whole, monkeypatch):
    folder, rows = whole
    monkeypatch.setattr(scale, "train", None)
    assert lasting(quietly(folder)) == lasting(rows)
    assert not list(folder.glob("*/checkpoints"))


def test_a_killed_study_goes_on_to_the_same_numbers(whole, tmp_path):
    drawn = planted.Drawn.drawn

    def killed(rows, batch_size, start_step=0):
        for step, batch in enumerate(drawn(rows, batch_size, start_step), start_step):
            if step == 13 and not rows.judged:
                raise KeyboardInterrupt
            yield batch

    with mock.patch.object(planted.Drawn, "drawn", killed), pytest.raises(KeyboardInterrupt):
        quietly(tmp_path)
    (checkpoint, *_) = tmp_path.glob("*/checkpoints/step_*")
    begun = []

    def noted(rows, batch_size, start_step=0):
        begun.append(start_step)
        yield from drawn(rows, batch_size, start_step)

    with mock.patch.object(planted.Drawn, "drawn", noted):
        assert lasting(quietly(tmp_path)) == lasting(whole[1])
    assert max(begun) == 12
    assert checkpoint.parent.parent.parent == tmp_path


def test_a_study_out_of_time_goes_on_and_one_with_none_says_so(whole, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="give it more minutes"):
        quietly(tmp_path, minutes=0)
    # By this clock a batch takes a second.
    clock = iter(range(10**6))
    monkeypatch.setattr(planted.time, "monotonic", lambda: next(clock))
    rows = quietly(tmp_path, minutes=30 / 60)
    assert 0 < scale.common(rows) < scale.common(whole[1])
    monkeypatch.undo()
    assert lasting(quietly(tmp_path)) == lasting(whole[1])


def test_seeds_train_on_other_rows_and_none_is_judged_on(tmp_path, monkeypatch):
    given = []

    def noted(model, config, spec, rows, *rest):
        given.append(rows)
        raise planted.Enough("that is all")

    monkeypatch.setattr(scale, "train", noted)
    with pytest.raises(ConfigError, match="no training came"):
        quietly(tmp_path, seeds=2)
    rows = TINY.steps * TINY.batch
    assert [each["train"].first for each in given] == [0, 0, rows, rows]
    assert {each["train"].count for each in given} == {rows + 1}
    assert {(each[half].first, each[half].count) for each in given for half in ("validation", "test")} == {
        (HELD_OUT, TINY.held_out)
    }


def test_the_law_is_fitted_to_a_log_that_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "SAMPLE_CHUNKS", 2)
    synthetic.write(synthetic.SyntheticConfig(tmp_path / "log", rows=3000, days=1, base_rate=0.4))
    log, lines, seen = tmp_path / "log" / "day_0", [], mock.Mock(side_effect=ConfigError("that is all"))
    monkeypatch.setattr(scale, "law_of", seen)
    with pytest.raises(ConfigError, match="that is all"):
        scale.measure(study=TINY, fit=log, cache=tmp_path, say=lines.append)
    ((config,), _) = seen.call_args
    assert config.base_rate == pytest.approx(0.4, abs=0.05)
    assert (config.scale, len(config.exponents)) == (TINY.scale, 26)
    assert config.exponents != scale.EXPONENTS
    assert re.fullmatch(
        rf"{log}: 3,000 rows, base rate 0\.\d+, decay [\d.]+ \(0 to .*\), exponents .*", lines[0]
    )


def test_a_table_that_does_not_fit_is_left_out_and_said_so(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(scale, "free_bytes", lambda backend: 30e6)
    rows = scale.measure(study=TINY, cache=tmp_path, say=lines.append)
    assert any("full table: left out" in line for line in lines)
    assert scale.ways(rows) == [THOUSAND]
    summary = json.loads(json.dumps(scale.summarise(rows)))
    assert "full table is left out" in scale.table(summary)
    assert summary["papers"] == []


def test_the_study_holds_and_is_told(tmp_path, monkeypatch):
    result = claim.carry_out(scale, tmp_path, quick=True, cache=tmp_path / "cache", say=lambda text: None)
    assert [check.what for check in result.verdict.checks if not check.holds] == []
    assert len(result.verdict.checks) == 4
    assert result.figure.stat().st_size > 10_000
    summary = json.loads(json.dumps(scale.summarise(result.rows)))
    lines = scale.table(summary).splitlines()
    assert [line.split(" | ")[0] for line in lines[4:8]] == [f"| {way}" for way in scale.WAYS]
    assert sum("2207.10731" in line or "2108.02191" in line for line in lines) == 3


def planted_rows(size=1.0, **changes):
    """What a study could have found, if the papers' claims hold."""
    final = {TABLE: 0.80, THOUSAND: 0.8, TEN_THOUSAND: 0.799, HASHING: 0.79} | changes.pop("auc", {})
    ms = {TABLE: 4.4, THOUSAND: 1.0, TEN_THOUSAND: 1.0, HASHING: 1.0} | changes.pop("ms", {})
    slow = {TEN_THOUSAND: 4.0} | changes.pop("slow", {})
    facts = {"best_auc": 0.81, "best_log_loss": 0.1, "counts_auc": 0.58, "click_rate": 0.03, "decay": 0.0}
    facts |= {"scale": size, "base_rate": 0.03, "backend": "cpu", "batch": 100} | changes
    rows = [{"kind": kind, "value": value} for kind, value in facts.items()]
    for way, auc in final.items():
        about = {"way": way, "seed": 0}
        rows += [{"kind": "bytes", **about, "value": 1000}, {"kind": "step_ms", **about, "value": ms[way]}]
        for part in np.arange(1, 21) / 20:
            # Below what it ends with by what it has not seen yet.
            known = auc - 0.1 * (1 - min(1, part * 5 / slow.get(way, 1))) - 0.002 * (1 - part)
            rows.append({"kind": "auc", **about, "rows": int(100_000 * part), "value": known})
            rows.append({"kind": "log_loss", **about, "rows": int(100_000 * part), "value": 0.12})
    return rows


def failed(rows):
    return [check.what.split(" ")[0] for check in scale.verdict(rows).checks if not check.holds]


def test_the_verdict_accepts_what_the_claim_says():
    assert failed(planted_rows()) == []
    assert len(scale.verdict(planted_rows()).checks) == 7


@pytest.mark.parametrize(
    ("told", "wrong"),
    [
        (["truth:"], {"best_auc": 0.79}),
        (["ids:"], {"counts_auc": 0.8}),
        (["quality"], {"auc": {THOUSAND: 0.7985}}),
        (["equal", "quality"], {"auc": {HASHING: 0.7999, THOUSAND: 0.7985}}),
        (["size:"], {"auc": {TEN_THOUSAND: 0.803}}),
        (["rows"], {"slow": {TEN_THOUSAND: 4.9}}),
        (["rows"], {"auc": {TEN_THOUSAND: 0.78}}),
        (["time"], {"ms": {TABLE: 4.2}}),
    ],
)
def test_the_verdict_refuses_a_planted_wrong_result(told, wrong):
    assert sorted(failed(planted_rows(**wrong))) == told


def test_papers_are_judged_at_their_size_alone():
    wrong = {"auc": {TEN_THOUSAND: 0.7}}
    assert failed(planted_rows(**wrong)) == ["rows"]
    assert failed(planted_rows(size=0.001, **wrong)) == []
    lines = scale.table(json.loads(json.dumps(scale.summarise(planted_rows(size=0.001, **wrong)))))
    assert "| no | never |" in lines
