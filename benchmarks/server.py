"""A server of a run under load: latencies, memory, and whether each answer is what `predict_table` gives.

    python -m benchmarks.server RUN [--seconds N] [--connections N]

Starts `run.py serve RUN` on loopback and asks it random rows, first from one connection and then from several
at a time, each of which sends its next question once it has its answer. So the clients take a share of the
cores, as other programs on a machine do. An answer that is refused, lost or wrong ends the benchmark. It
needs the extra `serve`.

Writes benchmarks/results/server.json; `python -m benchmarks.readme` then writes the table of docs/serving.md.
"""

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

import robe
from benchmarks.measure import BenchmarkError, machine
from data_pipeline.schema import Schema
from data_pipeline.whole_files import write_json
from robe.run_folder import TrainedModel

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "server.json"
SIZES = 1, 100  # rows of a question
QUESTIONS = 64  # different ones, of each size
ALONE = 0.1  # of that time one connection asks alone, and so long all ask before
CLOSE = 1e-6  # where a row stands in a batch may move the last digits of float32


class Question(NamedTuple):
    body: bytes
    probabilities: np.ndarray  # the right answer


def random_rows(schema: Schema, count: int, rng: np.random.Generator) -> list[dict[str, float | int | str]]:
    """Rows as a log has them; most of their values training never saw. Without bags."""
    if schema.bags:
        raise BenchmarkError("this benchmark asks for single ids; name a run of data without [bags]")
    drawn: dict[str, list] = {name: rng.integers(0, 100, count).tolist() for name in schema.dense}
    for name, kind in zip(schema.categorical, schema.kinds or ["hex"] * len(schema.categorical), strict=True):
        ids = rng.integers(0, 2**20, count).tolist()
        drawn[name] = ids if kind == "integer" else [f"{value:08x}" for value in ids]
    return [dict(zip(drawn, row, strict=True)) for row in zip(*drawn.values(), strict=True)]


def questions(model: TrainedModel, size: int, count: int = QUESTIONS) -> list[Question]:
    """Bodies of `size` rows each, and their answers."""
    rows = random_rows(model.schema, size * count, np.random.default_rng(size))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns |= {name: np.array(columns[name], np.float64) for name in model.schema.dense}
    expected = model.predict_table(columns).reshape(count, size)
    return [
        Question(json.dumps({"rows": rows[size * i : size * (i + 1)]}).encode(), expected[i])
        for i in range(count)
    ]


class Served(NamedTuple):
    process: subprocess.Popen
    port: int

    def memory(self) -> int:
        """Bytes of main memory that the server holds."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", text)[1])

    def counter(self, name: str) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            return int(re.search(rf"^robe_{name}_total (\d+)$", answer.read().decode(), re.M)[1])


@contextmanager
def served(run: Path) -> Iterator[Served]:
    """A server of a run, which has to end with code 0, and nothing on standard error, on SIGTERM."""
    command = [sys.executable, str(ROOT / "run.py"), "serve", str(run), "--port", "0", "--backend", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        try:
            if (found := re.search(r"http://127.0.0.1:(\d+)/predict", process.stdout.readline())) is None:
                raise BenchmarkError(f"{run}: no server: {process.stderr.read().strip()}")
            yield Served(process, int(found[1]))
        finally:
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=60)[1]
        if process.returncode or said:
            raise BenchmarkError(f"the server ended with code {process.returncode} and said {said!r}")


def ask(port: int, asked: list[Question], until: float) -> list[float]:
    """Seconds that each answer to one connection took; it asks until `time.perf_counter()` is `until`."""
    times = []
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        while (start := time.perf_counter()) < until:
            body, expected = asked[len(times) % len(asked)]
            connection.request("POST", "/predict", body)
            answer = connection.getresponse()
            found = json.loads(answer.read())
            times.append(time.perf_counter() - start)
            if answer.status != 200:
                raise BenchmarkError(f"status {answer.status}: {found['error']}")
            if not np.allclose(found["probabilities"], expected, rtol=0, atol=CLOSE):
                raise BenchmarkError(f"wrong by {np.abs(found['probabilities'] - expected).max():.2g}")
    return times


def ask_together(port: int, asked: list[Question], connections: int, until: float) -> list[float]:
    """What `ask` gives, from several connections at a time, each of which begins with another question."""
    times: list[float] = []
    failed: list[Exception] = []

    def one(first: int) -> None:
        try:
            times.extend(ask(port, asked[first:] + asked[:first], until))
        except Exception as error:
            failed.append(error)

    firsts = [i * len(asked) // connections for i in range(connections)]
    threads = [threading.Thread(target=one, args=(first,)) for first in firsts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return times


def figures(server: Served, asked: list[Question], connections: int, seconds: float) -> dict:
    """What so many connections find in so many seconds."""
    calls, memory = server.counter("batches"), server.memory()
    times = np.array(ask_together(server.port, asked, connections, time.perf_counter() + seconds))
    median, late = np.quantile(times, [0.5, 0.99])
    size = len(asked[0].probabilities)
    return {
        "size": size,
        "connections": connections,
        "seconds": seconds,
        "requests": len(times),
        "rows_per_second": size * len(times) / seconds,
        "median": median,
        "p99": late,
        "requests_per_call": len(times) / (server.counter("batches") - calls),
        "memory": memory,
        "grown": server.memory() - memory,
    }


def measure(run: Path, seconds: float, connections: int) -> dict:
    """What results/server.json holds, after `seconds` of load for each size of a question."""
    model, rows = robe.load(run, "cpu"), []
    for size in SIZES:
        asked = questions(model, size)
        with served(run) as server:
            ask_together(server.port, asked, connections, time.perf_counter() + ALONE * seconds)  # warm
            rows.append(figures(server, asked, 1, ALONE * seconds))
            rows.append(figures(server, asked, connections, seconds))
    summary = json.loads((run / "summary.json").read_text())
    return {"machine": machine("cpu"), "embedding_bytes": summary["embedding_bytes"], "rows": rows}


def table(results: dict) -> str:
    """The figures as a table in Markdown."""
    lines = [
        "| rows a question | connections | questions | rows/s | median | 99% within | questions a call "
        "| memory, grown by |",
        "| --- " * 8 + "|",
    ]
    for row in results["rows"]:
        cells = [row["size"], row["connections"], f"{row['requests']:,}", f"{row['rows_per_second']:,.0f}"]
        cells += [f"{1e3 * row[name]:.2f} ms" for name in ("median", "p99")]
        cells.append(f"{row['requests_per_call']:.1f}")
        cells.append(f"{row['memory'] / 1e6:.0f} MB, {row['grown'] / 1e6:.1f} MB")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(
    run: tyro.conf.Positional[Path], seconds: float = 60.0, connections: int = 8, out: Path = RESULTS
) -> None:
    """Ask a server of a run for a while, and write what docs/serving.md tells of it.

    Args:
        run: The folder of a run.
        seconds: Of load, for questions of one row and again for those of 100.
        connections: That ask at a time.
        out: The file to write.
    """
    results = measure(run, seconds, connections)
    write_json(out, results)
    print(table(results))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.server")
