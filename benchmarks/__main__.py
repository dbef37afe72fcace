"""Measure everything on the CPU and write benchmarks/results/cpu.json; for a GPU see gpu.py.

    python -m benchmarks [--only limits|embedding|mixed|codes|step] [--quick]

`python -m benchmarks.readme` then writes the tables of docs/speed.md from the results.
"""

from robe.threads import share_cores

share_cores()  # before anything that loads NumPy

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import tyro

from benchmarks import codes, embedding, limits, mixed, step
from benchmarks.measure import QUICK, Effort, cpu_seconds_of_others, machine
from benchmarks.peer import torch_here
from data_pipeline.whole_files import write_json
from robe.backend import Backend, select
from robe.errors import RobeError
from robe.packages import extra

RESULTS = Path(__file__).parent / "results"


def sections(backend: Backend, effort: Effort) -> dict[str, Callable[[], Iterator[dict]]]:
    return {
        "limits": lambda: limits.run(backend, effort),
        "embedding": lambda: embedding.run(backend, effort),
        "mixed": lambda: mixed.run(backend, effort),
        "codes": lambda: codes.run(backend, effort),
        "step": lambda: step.run(backend, effort),
    }


def measure(
    only: Literal["limits", "embedding", "mixed", "codes", "step"] | None = None,
    quick: bool = False,
    out: Path | None = None,
) -> None:
    """Measure our kernels and models against the machine's limits and against PyTorch.

    Args:
        only: One part; the others keep what the file says of them.
        quick: Tiny sizes and few repeats, to see that everything runs; the figures mean nothing.
        out: The file to write; default: cpu.json or quick.json in benchmarks/results.
    """
    backend, effort = select("cpu"), QUICK if quick else Effort()
    out = out or RESULTS / f"{'quick' if quick else 'cpu'}.json"
    if not torch_here():
        print(f"PyTorch is not installed ({extra('torch')}): no peers are measured")
    results = json.loads(out.read_text()) if only and out.exists() else {}
    for name, section in sections(backend, effort).items():
        if only in (None, name):
            start, others, rows = time.monotonic(), cpu_seconds_of_others(), []
            for row in section():
                rows.append(row)
                print(line(row), flush=True)
            seconds = time.monotonic() - start
            # They stand beside each part, as parts may be measured apart.
            where = machine(backend.description) | {
                "minutes": round(seconds / 60, 1),
                "cores_used_by_others": max(0.0, round((cpu_seconds_of_others() - others) / seconds, 2)),
            }
            results[name] = {"machine": where, "rows": rows}
            write_json(out, results)
    print(f"{out}: written")


def line(row: dict) -> str:
    """A row of the results as a line of text."""
    if "ratio" in row:
        low, high = row["ratio"]["quartiles"]
        of_limit = f", {row['of_limit']:.0%} of the limit" if "of_limit" in row else ""
        return (
            f"{row['ratio']['median']:>9.2f}x ({low:.2f}-{high:.2f})  {row['what']} | {row['peer']}{of_limit}"
        )
    scale, unit = {
        "s": (1e3, "ms"),
        "B/s": (1e-9, "GB/s"),
        "flop/s": (1e-9, "GF/s"),
        "rows/s": (1e-6, "Mrows/s"),
    }[row["unit"]]
    low, median, high = (scale * value for value in (row["quartiles"][0], row["median"], row["quartiles"][1]))
    return f"{median:>10.3f} {unit} ({low:.3f}-{high:.3f})  {row['group']}: {row['name']}"


def main(arguments: list[str] | None = None) -> None:
    try:
        tyro.cli(measure, prog="python -m benchmarks", args=arguments)
    except RobeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
