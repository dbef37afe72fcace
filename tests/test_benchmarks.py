"""The benchmarks run, refuse wrong kernels and wrong peers, and tell what they measured."""

import dataclasses
import json
import sys
from contextlib import contextmanager

import numpy as np
import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import (
    codes,
    embedding,
    gpu,
    limits,
    loader,
    measure,
    mixed,
    modules,
    prepare,
    ranks,
    rates,
    step,
)
from benchmarks.measure import QUICK, BenchmarkError
from benchmarks.peer import check, environment, torch_here
from benchmarks.readme import PAGES, fill, gpu_section, prepare_table, shown, speed_table
from benchmarks.workload import Workload
from robe import estimate
from robe.backend import select
from robe.config import ConfigError, DataSpec, EmbeddingConfig, ModelConfig, TrainConfig, resolve

needs_torch = pytest.mark.skipif(not torch_here(), reason="PyTorch, the peer, is not installed")


@pytest.fixture
def without_peers(monkeypatch):
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: None)
    monkeypatch.setattr("benchmarks.peer.torch_here", lambda: False)


def test_spread_and_ratio():
    values = np.array([4.0, 1.0, 2.0, 3.0, 5.0])
    found = measure.spread(values)
    assert found == {"median": 3, "quartiles": [2, 4], "range": [1, 5], "repeats": 5}
    # Round by round: 2, 8, 1, 1, 1; that of the medians would be 2 / 3.
    theirs = np.array([8.0, 8.0, 2.0, 3.0, 5.0])
    row = measure.ratio("ours", "theirs", values, theirs, limit=values / 2)
    assert row["ratio"]["median"] == 1
    assert row["ratio"]["range"] == [1, 8]
    assert row["fastest"] == 2
    assert row["of_limit"] == 0.5
    assert (row["seconds"], row["peer_seconds"]) == (3, 5)


def test_a_turn_is_seconds_per_call(monkeypatch):
    clock, waits = [0.0], []

    def call():
        clock[0] += 0.25

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(measure, "cpu_seconds_of_others", lambda: 0.0)
    assert measure.turn(call, 2.0, lambda: waits.append(clock[0])) == 0.25
    # After warming up, after one call, and after the 2 s of calls that then fit; not between those.
    assert waits == [0.25, 0.5, 2.5]
    assert measure.turn(call, 0.1, lambda: None) == 0.25


def test_the_least_disturbed_try_counts(monkeypatch):
    clock = [0.0]
    lengths, used_by_others = iter([1, 5, 3, 1]), iter([0.0, 5.0, 5.0, 5.6, 5.6, 7.6])

    def call():
        clock[0] += next(lengths)

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(measure, "cpu_seconds_of_others", lambda: next(used_by_others))
    monkeypatch.setattr(measure, "PATIENCE", 8)
    # After warming up: 5 s with a core taken, 3 s with a fifth of one, 1 s with two; then patience ends.
    assert measure.turn(call, 1.0, lambda: None) == 3


def test_processor_time_of_others_is_not_ours():
    before = measure.cpu_seconds_of_others()
    stop = measure.time.process_time() + 0.5
    while measure.time.process_time() < stop:
        pass
    assert measure.cpu_seconds_of_others() - before > -0.1


def test_rounds_interleave():
    order = []
    jobs = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    times = measure.rounds("test", jobs, 3, pause=0)
    assert "".join(order) == "ababab"
    assert {name: list(values) for name, values in times.items()} == {"a": [1, 3, 5], "b": [2, 4, 6]}


def test_rotation_takes_one_batch_after_the_other():
    seen = []
    call = measure.rotate(lambda a, b: seen.append((a, b)), [1, 2], ["x", "y"])
    for _ in range(3):
        call()
    assert seen == [(1, "x"), (2, "y"), (1, "x")]


def test_tables_are_cut_as_max_ind_range_does():
    whole = Workload("kaggle", 1e12)
    assert sum(whole.cardinalities) == 33_762_577
    cut = Workload("kaggle", 1e9)
    assert cut.full_bytes <= 1e9 < cut.full_bytes + 26 * 4 * 16
    largest = max(cut.cardinalities)
    assert cut.cardinalities == tuple(min(n, largest) for n in whole.cardinalities)
    assert len(set(Workload("uniform", 1e9).cardinalities)) == 1


@pytest.mark.parametrize("tables", ["kaggle", "uniform"])
def test_ids_are_rows_of_their_tables(tables):
    work = Workload(tables, 1e8)
    batches = work.draw(5000)
    for batch in batches:
        assert (batch.ids < np.array(work.cardinalities)).all()
    assert not np.array_equal(batches[0].ids, batches[1].ids)
    np.testing.assert_array_equal(batches[0].ids, work.draw(5000)[0].ids)
    column = np.argmax(work.cardinalities)
    most_frequent = np.bincount(batches[0].ids[:, column]).max() / 5000
    # By the law: 1 - 2^(1 - s) over the same for all ranks, which is 0.09 for some 250,000 rows.
    assert most_frequent < 0.002 if tables == "uniform" else 0.07 < most_frequent < 0.13


@pytest.mark.kernels
@pytest.mark.parametrize("verb", ["gather", "gather_interaction", "scatter_add"])
def test_no_figure_of_a_wrong_kernel(verb, backend):
    work = Workload("mlperf", 1e6)
    array = embedding.robe(work, 0.1, 32, backend)
    ids = work.draw(2)[0].ids
    embedding.gate("right", array, ids)
    right = getattr(backend.kernels, verb)

    def wrong(*arguments):
        right(*arguments)
        arguments[-1][..., -1] += 0.01

    setattr(backend.kernels, verb, wrong)
    with pytest.raises(BenchmarkError, match="no time is told"):
        embedding.gate("wrong", array, ids)


def test_no_figure_of_a_wrong_model():
    backend = select("cpu")
    step.gate("kaggle", EmbeddingConfig("full"), 8, backend)
    backend.kernels.interaction_backward = lambda d_out, vectors, d_vectors: d_vectors.fill(0)
    with pytest.raises(BenchmarkError, match="training step: wrong"):
        step.gate("kaggle", EmbeddingConfig("full"), 8, backend)


def test_not_a_number_is_wrong():
    with pytest.raises(BenchmarkError):
        measure.agree("x", np.array([np.nan]), np.array([1.0]))


@pytest.mark.parametrize("turned", [False, True])
def test_products_are_those_of_the_layers(turned):
    products = limits.Products([(3, 5), (5, 2)], 4, select("cpu"), inner=False, transposed=[turned] * 2)
    products.train()
    (x, w, y), (hidden, v, _) = products.forward
    assert hidden is y
    np.testing.assert_allclose(y, x @ w, rtol=1e-5)
    ((_, v_turned, _),) = products.input_gradients
    assert v_turned.shape == v.T.shape
    np.testing.assert_array_equal(v_turned, v.T)
    shapes = [out.shape for _, _, out in products.weight_gradients]
    assert shapes == ([(5, 3), (2, 5)] if turned else [(3, 5), (5, 2)])


@pytest.mark.kernels
def test_quick_run_on_every_backend(backend, without_peers):
    """What needs no PyTorch; in the simulator, the code for a GPU too."""
    once = QUICK._replace(rounds=1)  # a second round runs no other code, and the simulator is slow
    rows = [*embedding.run(backend, once)]
    if backend.name == "cpu":
        rows += [*limits.run(backend, QUICK), *mixed.run(backend, QUICK)]
        rows += step.run(backend, QUICK, step.CASES[:1])
        rows += codes.run(backend, once, codes.CASES[1:2])
    for row in rows:
        values = row["ratio"] if "ratio" in row else row
        assert 0 < values["range"][0] <= values["median"] <= values["range"][1]
        assert values["repeats"] >= 1
        assert benchmarks.line(row)
    assert any("ratio" in row for row in rows)


def test_one_part_keeps_the_others(tmp_path, without_peers, monkeypatch, capsys):
    out = tmp_path / "cpu.json"
    out.write_text(json.dumps({"step": "kept"}))
    row = measure.figure("group", "name", np.array([0.001, 0.002]))
    monkeypatch.setattr(benchmarks.limits, "run", lambda backend, effort: [row])
    benchmarks.main(["--only", "limits", "--quick", "--out", str(out)])
    results = json.loads(out.read_text())
    assert results["step"] == "kept"
    assert results["limits"]["rows"] == [row]
    where = results["limits"]["machine"]
    assert where["versions"]["numpy"] == np.__version__
    assert where["cores_used_by_others"] >= 0
    assert "1.500 ms" in capsys.readouterr().out


def test_without_a_device_one_line(monkeypatch):
    monkeypatch.setattr("robe.backend.cuda_trouble", lambda: "no CUDA device or driver was found")
    with pytest.raises(SystemExit, match=r"^error: no CUDA device or driver was found$"):
        gpu.main([])


class TestBorrowedCard:
    """The measurements of a GPU, on the backend of the CPU."""

    @pytest.fixture(autouse=True)
    def tiny(self, monkeypatch, without_peers):
        monkeypatch.setattr(gpu, "BACKEND", "cpu")
        monkeypatch.setattr(gpu, "STEPS", (("kaggle", 128),))
        self.run = gpu.Run(QUICK, measure.time.monotonic() + 600)

    def rows(self, part):
        rows = list(gpu.rows_of(part, self.run))
        assert not [row for row in rows if "left_out" in row]
        assert all(gpu.line(row) for row in rows)
        return rows

    def test_steps(self):
        rows = self.rows("steps")
        names = [f"ROBE 100 MB {how}: {v}" for how in gpu.OURS for v in gpu.VERBS]
        assert [row["name"] for row in rows] == names
        assert all(row["rows_per_second"] == pytest.approx(8 / row["median"]) for row in rows)

    def test_the_best_peer_counts(self, monkeypatch):
        @contextmanager
        def peer(module, backend, seconds, **settings):
            assert settings["variants"] == gpu.PLAIN
            times = {"graph tf32": 2.0, "eager tf32": 4.0}
            yield {f"8: PyTorch {n}: {v}": lambda s=s: s for n, s in times.items() for v in gpu.VERBS}

        monkeypatch.setattr(gpu, "peer", peer)
        ratios = [row for row in self.rows("steps") if "ratio" in row]
        assert len(ratios) == 8
        assert {(row["peer"], row["peer_seconds"]) for row in ratios} == {("PyTorch graph tf32", 2.0)}

    def test_look_ups(self):
        names = {row["name"] for row in self.rows("look-ups") if "name" in row}
        assert {"copy", "ROBE 0.1 MB Z=32 lookup", "ROBE 0.2 MB Z=32 update"} <= names
        assert not any("Z=8" in name for name in names)

    def test_updates(self):
        rows = self.rows("updates")
        assert sum("of_copy" in row for row in rows) == 2 * 2
        assert sum("vectors kept" in row.get("name", "") for row in rows) == 2
        assert {row["what"] for row in rows if "ratio" in row} == {
            f"{law} ids: ROBE 0.1 MB {verb}, fixed order"
            for law in embedding.LAWS
            for verb in ("update", "backward with update")
        }

    def test_the_second_start(self, monkeypatch):
        """Of a backend that has nothing to compile: four processes are started all the same."""
        monkeypatch.setattr(gpu, "BACKEND", "reference")
        first, second = self.rows("start")
        assert (first["repeats"], second["repeats"]) == (1, 3)

    def test_device_tests_are_told(self, monkeypatch):
        """Without a device all are skipped."""
        monkeypatch.setattr(gpu, "WORKERS", "1")
        (training, kernels) = self.rows("tests")
        assert training["code"] == kernels["code"] == 0
        assert " skipped in " in training["text"]

    def test_the_sanitizer_runs_over_all_kernels(self, monkeypatch, tmp_path):
        tool = tmp_path / "compute-sanitizer"
        tool.write_text("#!/bin/sh\necho $@\necho '========= ERROR SUMMARY: 0 errors'\nexit 3\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert [(row["check"], row["code"], row["text"]) for row in self.rows("sanitizer")] == [
            (search, 3, "ERROR SUMMARY: 0 errors") for search in ("memcheck", "racecheck")
        ]

    def test_a_program_is_interrupted_when_its_time_is_up(self):
        slow = "import time\nprint(1, flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print(2)"
        assert gpu.reported([sys.executable, "-c", slow], 2) == (0, ["1", "2"])

    def test_what_is_found_stands_in_the_file_at_once(self, monkeypatch, tmp_path, capsys):
        out = tmp_path / "gpu.json"

        def broken(run):
            yield {"check": "first", "code": 0, "text": "fine"}
            assert json.loads(out.read_text())["steps"]["rows"] == [
                {"check": "first", "code": 0, "text": "fine"}
            ]
            raise MemoryError("too\nlarge")

        monkeypatch.setattr(gpu, "MEASURES", {"steps": broken, "tests": lambda run: iter(())})
        gpu.write(self.run, ("tests", "steps"), out)
        assert json.loads(out.read_text())["steps"]["rows"][1] == {
            "left_out": "steps: MemoryError: too large"
        }
        gpu.write(gpu.Run(QUICK, measure.time.monotonic()), ("tests",), out)
        results = json.loads(out.read_text())
        assert results["tests"]["rows"] == [{"left_out": "tests: no time was left"}]
        assert len(results["steps"]["rows"]) == 2
        assert "left out: tests: no time was left" in capsys.readouterr().out

    def test_what_is_missing_is_said(self, monkeypatch):
        monkeypatch.setattr(gpu, "find_spec", lambda name: None)
        monkeypatch.setattr(gpu, "sanitizer_tool", lambda: None)
        text = "\n".join(gpu.lacking())
        for name in ("cupy", "nvmath", "pytest", "torch", "fbgemm_gpu", "compute-sanitizer"):
            assert f"{name} is not installed: " in text


def test_a_peer_that_fails_is_left_out(capsys):
    def fails():
        raise measure.PeerError("PyTorch: out of memory")

    times = measure.rounds("test", {"a": lambda: 1.0, "b": fails}, 3, pause=0)
    assert {name: list(values) for name, values in times.items()} == {"a": [1, 1, 1]}
    assert capsys.readouterr().err.count("not measured: PyTorch: out of memory\n") == 1
    assert len(measure.rounds("test", {"a": lambda: 1.0}, 3, pause=0, until=0)["a"]) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_of_the_pages_are_the_measured_ones(page):
    assert fill(page) == page.read_text()


def test_the_table_of_times():
    machine = {
        **{"device": "cpu (Numba, 2 threads)", "cpu": "Some CPU", "cores": 2, "memory_bytes": 2**34},
        **{"os": "Linux", "versions": {"numpy": "2.4"}, "date": "2026-01-01", "cores_used_by_others": 0.1},
    }
    times = np.array([0.001, 0.002, 0.003])
    kernel = measure.ratio("ROBE look-up", "26 EmbeddingBags", times, times / 2, times / 2)
    model = measure.ratio("step, ROBE", "PyTorch eager", times, 3 * times)
    part = {"machine": machine, "rows": [measure.figure("a", "b", times)]}
    codes = measure.ratio("codes: INT8", "floats", times, times)
    results = {
        "embedding": part | {"rows": [*part["rows"], kernel, kernel | {"peer": "copy"}]},
        "mixed": {"machine": machine | {"date": "2026-02-02", "cores_used_by_others": 0.3}, "rows": [codes]},
        "step": part | {"rows": [model | {"model": ["mlperf", 2048]}, model | {"model": ["mlperf", 99]}]},
    }
    text = speed_table(results, shown)
    assert text.startswith(
        "cpu (Numba, 2 threads): Some CPU, 2 cores, 16 GiB, Linux; numpy 2.4. Measured in parts (embedding: "
        "2026-01-01; mixed: 2026-02-02; step: 2026-01-01). "
    )
    assert text.splitlines()[0].endswith("while other programs used up to 0.30 cores.")
    assert text.splitlines()[4:] == [
        "| ROBE look-up | 2 ms | 26 EmbeddingBags | 1 ms | 0.50 (0.50-0.50) | 0.50 | 50% |",
        "| codes: INT8 | 2 ms | floats | 2 ms | 1.00 (1.00-1.00) | 1.00 |  |",
        "| step, ROBE | 2 ms | PyTorch eager | 6 ms | 3.00 (3.00-3.00) | 3.00 |  |",
    ]
    assert len(speed_table(results, lambda row: True).splitlines()) == 4 + 5


def test_nothing_is_told_of_a_card_that_was_not_measured(tmp_path):
    path, times = tmp_path / "gpu.json", np.array([0.001, 0.002, 0.003])
    assert gpu_section(path, ("steps",)) == ""
    machine = {"device": "cuda (Some GPU), fp32", "versions": {"numpy": "2.5"}, "date": "2026-01-01"}
    step = measure.ratio("mlperf, batch 10: step", "PyTorch graph", times, 3 * times)
    look_up = measure.ratio("uniform ids: ROBE lookup", "copy", times, times / 2, times / 2)
    tested = {"check": "tests/gpu/a.py", "code": 0, "seconds": 1.0, "text": "5 passed in 1.0s"}
    starts = [measure.figure("start to first step", "second start", 1000 * times)]
    parts = {
        "tests": [tested],
        "steps": [measure.figure("a", "b", times), step | {"batch": 10}, {"left_out": "c"}],
        "look-ups": [look_up],
        "updates": [measure.figure("updates", "forward", times, of_copy=0.4)],
        "start": starts,
    }
    path.write_text(json.dumps({n: {"machine": machine, "rows": rows} for n, rows in parts.items()}))
    short, whole = gpu_section(path, ("steps",)).splitlines(), gpu_section(path, gpu.PARTS).splitlines()
    assert short[0] == "## On a GPU"
    assert short[2].startswith("cuda (Some GPU); numpy 2.5; 2026-01-01. ")
    told = "| mlperf, batch 10: step | 2 ms | 0.005 M | PyTorch graph | 6 ms | 3.00 (3.00-3.00) |  |"
    assert short[6:] == [told]
    assert whole[6:] == [
        told,
        "| uniform ids: ROBE lookup | 2 ms |  | copy | 1 ms | 0.50 (0.50-0.50) | 50% |",
        "| updates: forward | 2 ms | | | | | 40% |",
        "| start to first step: second start | 2e+03 ms | | | | |  |",
        "",
        "- tests/gpu/a.py: 5 passed in 1.0s",
    ]


def test_the_loader_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: None)
    loader.measure(quick=True, out=tmp_path / "l.json")
    results = json.loads((tmp_path / "l.json").read_text())
    names = {row["name"] for row in results["rows"] if "name" in row}
    assert names == {"ours, shuffled", "ours, in order", "NumPy, shuffled", "TorchRec, within batches"}
    assert [row["rows"] for row in results["memory"]] == [2000, 8000]
    assert all(row["peak_mib"] >= row["before_mib"] > 10 for row in results["memory"])


def test_no_figure_of_batches_that_are_not_the_rows(tmp_path):
    manifest = loader.make(tmp_path, 100)
    for epoch in loader.jobs(manifest, 8).values():
        loader.check("batches", epoch(), manifest)
        batches = [[array.copy() for array in batch] for batch in epoch()]
        batches[3][1].ravel()[0] += 1
        with pytest.raises(BenchmarkError, match="not the rows of the shards"):
            loader.check("batches", batches, manifest)


def test_an_estimate_of_hours(tmp_path, monkeypatch):
    """4,373,472,329 rows of 160 B from 1.11 TB; 4,195,197,692 of them in training, 2048 in 0.2 s."""
    steps = [
        {"group": "mlperf, batch 2048", "name": f"{name}: {verb}", "batch": 2048, "median": seconds}
        for name, seconds in (("GEMMs", 0.1), ("ROBE 1 MB", 0.2), ("PyTorch eager fp32", 0.3))
        for verb in step.VERBS
    ]
    update = {"group": "embedding, uniform", "name": "ROBE 100 MB Z=32 update", "rows": 2048, "median": 0.01}
    cpu = {
        "step": {"machine": {"cores": 2}, "rows": [*steps, {"what": "a ratio"}]},
        "embedding": {"rows": [update]},
    }
    rows = [{"name": "ours, shuffled", "batch": 2048, "median": 1e7}]
    loaded = {"rows": rows, "memory": [{"peak_mib": 300, "before_mib": 100}]}
    prepared = {
        kind: {"readers": {"ours": {"rows_per_second": rate, "peak_mib": 200}}}
        for kind, rate in {"text": 1e6, "gzip": 5e5}.items()
    }
    for name, results in (("cpu", cpu), ("loader", loaded), ("prepare", prepared)):
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    monkeypatch.setattr(estimate, "RATES", tmp_path / "rates.json")
    estimate.RATES.write_text(json.dumps(rates.measured(tmp_path)))
    terabyte = estimate.DataSet("CriteoTB", 4_373_472_329, 4_195_197_692, 160, 1.11e12, 342 * 2**30)
    config = resolve(TrainConfig(ModelConfig("mlperf")))
    lines = [line.split() for line in estimate.estimate(config, 2**20, terabyte).splitlines()]
    for expected in (
        "prepare text 1.2 h 0.2 h 4,373,472,329 rows / 1,000,000 rows/s",
        "memory 200 MiB 1,600 MiB 8 days at a time",
        "disk 414 MB/s 3,310 MB/s reads 254, writes 160",
        "prepare gzip 2.4 h 0.3 h 4,373,472,329 rows / 500,000 rows/s",
        "disk 122 MB/s 976 MB/s reads 42, writes 80",
        "train an epoch 113.8 h 14.2 h 4,195,197,692 rows / (2,048 rows / 0.2000 s, mlperf, ROBE 1 MB)",
        "disk 1.6 MB/s 13.1 MB/s the loader can give 1,600 on 2 cores",
        "memory 201 MiB 201 MiB 1 as above, 200 for the loader",
        "disk 1,810 GB 1,810 GB 1,110 of text (or 367 of gzip), 700 of shards",
    ):
        assert expected.split() in lines
    for other in (ModelConfig("kaggle"), ModelConfig("mlperf", width=64)):
        text = estimate.estimate(resolve(TrainConfig(other)), 0, terabyte)
        assert "no step of these sizes and this batch was measured" in text


def test_an_estimate_of_several_processes(monkeypatch, tmp_path):
    """By the arithmetic of docs/cluster.md: a step of 0.1 s, 2,048 rows of 26 features, width 128; gradients
    are stepped at 5 GB/s and received at 2 GB/s."""
    step = {"preset": "mlperf", "batch": 2048, "embedding": "ROBE 100 MB", "seconds": 0.1}
    monkeypatch.setattr(estimate, "RATES", tmp_path / "rates.json")
    estimate.RATES.write_text(json.dumps({"cores": 2, "update": 5e9, "steps": [step]}))
    data, look_ups = DataSpec(13, (10**6,) * 26, "hash", "", ""), 2048 * 26
    bottom = 13 * 512 + 512 + 512 * 256 + 256 + 256 * 128 + 128
    interacted = 128 + 27 * 26 // 2
    top = interacted * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 512 + 512 + 512 * 256 + 256 + 256 + 1
    # All rows are 28 MB. Gradients and weights of an array of 10^6 are 8 MB, and of one four times as large
    # 32 MB, or 24 MB in halves.
    rows = look_ups * (8 + 4 * 128)
    by_rows = (0.1 - look_ups * 4 * 128 / 5e9) / 4 + rows / 5e9
    arrays = {
        (10**6, "fp32"): ((4 * 10**6, 8 * 10**6, "array"), (0.1 + 4e6 / 5e9) / 4),
        (4 * 10**6, "fp32"): ((rows, rows, "rows"), by_rows),
        (4 * 10**6, "fp16"): ((16 * 10**6, 24 * 10**6, "array"), (0.1 + 16e6 / 5e9) / 4),
    }
    for (weights, memory), (vectors, compute) in arrays.items():
        embedding = EmbeddingConfig(weights=weights, memory=memory)
        config = resolve(TrainConfig(ModelConfig("mlperf"), embedding=embedding))
        moved = estimate.exchanged(config, data)
        assert moved == (4 * (bottom + top), *vectors)
        exchange = 3 / 4 * (2 * moved.dense + moved.sent) / 2e9
        text = estimate.shared(config, data, 4, 2e9, estimate.of_cores())
        lines = [line.split() for line in text.splitlines()]
        told = f"4 512.0 {1e3 * compute:.1f} ms {1e3 * exchange:.1f} ms {0.1 / (compute + exchange):.2f}"
        assert told.split() in lines
        assert [line[0] for line in lines[2:4]] == ["2", "4"]
    codes = EmbeddingConfig("mixed_precision")
    data = dataclasses.replace(data, dialect="dictionary")
    config = resolve(TrainConfig(ModelConfig("mlperf"), embedding=codes))
    assert estimate.exchanged(config, data)[2:] == (look_ups * (4 + 4 * 128), "look-ups")


def test_an_estimate_of_cards(tmp_path):
    """By what gpu.py writes: steps without a graph where there are any, and updates in a fixed order."""
    file, group = tmp_path / "gpu.json", "mlperf, batch 65536"
    times = {f"{gpu.NAME} {how}: training step": 0.01 * (1 + i) for i, how in enumerate(gpu.OURS)}
    steps = [{"group": group, "name": name, "median": seconds} for name, seconds in times.items()]
    update = {"group": "updates, uniform", "name": f"{gpu.NAME} update, fixed order", "median": 0.002}
    rows = [{"what": "a ratio"}, update | {"rows": 1000}]
    parts = {"steps": steps, "updates": rows, "more steps": [{"left_out": "kaggle, batch 2048"}]}
    found = {part: {"machine": {"device": "cuda (X)"}, "rows": rows} for part, rows in parts.items()}
    file.write_text(json.dumps(found))
    assert embedding.LAWS[0] == "uniform"
    for precision, seconds in (("tf32", [0.04, 0.01]), ("bf16", [0.02])):
        card = estimate.of_card(file, precision)
        assert [step["seconds"] for step in card["steps"]] == pytest.approx(seconds)
        assert {(step["preset"], step["batch"]) for step in card["steps"]} == {("mlperf", 65536)}
        assert card["update"] == pytest.approx(1000 * 26 * 128 * 4 / 0.002)
    config = resolve(
        TrainConfig(ModelConfig("mlperf"), batch=65536, embedding=EmbeddingConfig(megabytes=100))
    )
    data = DataSpec(13, (10**6,) * 26, "hash", "", "")
    text = estimate.shared(config, data, 2, 2e9, estimate.of_card(file, "tf32"))
    assert "Each computes as the cuda (X) that was measured (mlperf, ROBE 100 MB, 0.0400 s)." in text
    for broken in (b"[]", b"{", b"\xff", json.dumps(found | {"updates": {"rows": []}}).encode()):
        file.write_bytes(broken)
        with pytest.raises(ConfigError, match=r"gpu\.json: has no steps and updates of a card"):
            estimate.of_card(file, "tf32")


def test_the_rates_of_the_package_are_the_measured_ones():
    """`python -m benchmarks.readme` writes them."""
    assert json.loads(estimate.RATES.read_text()) == rates.measured(benchmarks.RESULTS)


def test_a_peer_has_its_own_environment(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert "OMP_WAIT_POLICY" not in environment()


@needs_torch
def test_peers_compute_what_we_compute():
    check("cpu")


@needs_torch
def test_a_peer_answers(monkeypatch):
    monkeypatch.setattr("benchmarks.peer.check", lambda device: None)
    rows = list(step.run(select("cpu"), QUICK, step.CASES[:1]))
    ratios = {row["what"]: row for row in rows if "ratio" in row}
    assert "kaggle, batch 8: training step, ROBE 0.1 MB" in ratios
    assert "kaggle, batch 8: inference, full table 0.000999 GB" in ratios
    assert all(row["peer_seconds"] > 0 for row in ratios.values())


def test_the_table_of_processes():
    """Of ratios round by round: both processes that share nothing do the work of one, 100 rows."""
    seconds = {"alone": 1.0, "shared": 0.6, "shared, late": 0.625, "apart": 1.25}
    seconds |= {"tables 1": 2.0, "tables 2": 1.6, "published ROBE 1": 3.0, "published ROBE 2": 3.0}
    found = ranks.figures({name: np.array([value, value]) for name, value in seconds.items()}, 100)
    assert found["rows_per_second"]["apart"]["median"] == 160
    assert found["of_apart"]["median"] == pytest.approx(1.25 / 2 / 0.6)
    assert found["times_peer"]["tables"]["median"] == pytest.approx(1.6 / 0.6)
    turns = [{"phases": {"forward": 0.4}, "bytes": 2e6, "ways": {"rows": 9}, "link": 3e9}]
    shared = [turns[0] | {"phases": {"forward": 0.2, "exchange, rows": each}} for each in (0.1, 0.3)]
    told = ranks.of_steps({"alone": turns, "shared": shared})
    case = {"preset": "kaggle", "megabytes": 2.161, "rounds": 2, "planned": 1.8, **found, **told}
    machine = {"cpu": "Some CPU", "cores": 2, "date": "2026-01-01", "cores_used_by_others": 0.1}
    machine["versions"] = {"numba": "0.68", "mpi4py": "4.1", "torch": "2.13"}
    text = ranks.table({"machine": machine, "cases": [case]})
    for expected in (
        "| `kaggle`, ROBE 2.16 MB: two that share nothing | 100 | 160 | 1.60 (1.60-1.60) |",
        "| `kaggle`, ROBE 2.16 MB: **one model** | 100 | 167 | 1.67 (1.67-1.67) |",
        "| `kaggle`, PyTorch, tables | 50 | 62 | 1.25 (1.25-1.25) |",
        "| `kaggle`, PyTorch, published ROBE | 33 | 33 | 1.00 (1.00-1.00) |",
    ):
        assert expected in text.splitlines()
    assert "2.00 MB received a step and process, gradients of vectors as rows; 3 GB/s" in text
    assert "of which `plan` makes 1.80 times as fast" in text
    assert "forward 200 (alone 400); exchange, rows 200." in text


@needs_torch
def test_modules_are_compared(monkeypatch):
    monkeypatch.setattr(measure, "PAUSE", 0)
    rows = modules.run(QUICK._replace(rounds=1))
    assert len(rows) == 2 * (1 + 2 * len(modules.SHOWN))
    assert all(row["median"] > 0 for row in rows)
    assert [row["faster"]["median"] for row in rows[:2]] == [1, 1]


@needs_torch
def test_a_wrong_peer_is_refused(monkeypatch):
    """In this process: the gate's own runs where nothing can be changed."""
    from benchmarks import torch_gate
    from benchmarks.torch_dlrm import TorchDLRM

    forward = TorchDLRM.forward
    monkeypatch.setattr(TorchDLRM, "forward", lambda self, *batch: 1.001 * forward(self, *batch))
    with pytest.raises(BenchmarkError, match="PyTorch DLRM: logits: wrong"):
        torch_gate.whole_model(select("cpu"), "cpu", "eager")


@needs_torch
def test_a_peer_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(BenchmarkError):
        check("cpu")


def test_prepare_is_compared_with_bare_polars(tmp_path, monkeypatch):
    readers = {name: prepare.READERS[name] for name in ("polars", "ours")}
    monkeypatch.setattr(prepare, "READERS", readers)
    prepare.main(megabytes=4, rounds=1, only="gzip", out=tmp_path / "prepare.json")
    results = json.loads((tmp_path / "prepare.json").read_text())
    assert list(results) == ["gzip"]
    assert results["gzip"]["rows"] == 4 * 8192
    found = results["gzip"]["readers"]
    assert found["polars"]["of_polars"] == 1
    assert found["ours"]["of_polars"] == pytest.approx(
        found["ours"]["rows_per_second"] / found["polars"]["rows_per_second"], abs=0.01
    )
    assert 50 < found["ours"]["peak_mib"] < 1536
    table = prepare_table(results)
    assert f"| `prepare`, all written | {found['ours']['rows_per_second']:,} |" in table


def test_a_reader_that_fails_is_no_figure(tmp_path):
    with pytest.raises(RuntimeError, match=r"ours: .*DataError.*missing: No such file"):
        prepare.child("ours", [tmp_path / "missing"])
