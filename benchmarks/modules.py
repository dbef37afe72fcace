"""Our modules for PyTorch beside 26 EmbeddingBags, and beside the published ROBE, in one process.

    python -m benchmarks.modules [--quick]

A look-up of (B, F, D) = (2048, 26, 128), and a whole step: look-up, backward pass and SGD. Ids are uniform
over 26 equal tables of 2 GB together, so that nearly every row of these misses the caches; arrays have blocks
of Z = 32, or of a whole vector. Threads wait as their libraries have it. Takes some two minutes. Writes
benchmarks/results/modules.json, unless --quick; `python -m benchmarks.readme` then writes the table of
docs/pytorch.md.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tyro

from benchmarks import embedding
from benchmarks.measure import (
    QUICK,
    Effort,
    agree,
    cpu_seconds_of_others,
    figure,
    machine,
    rotate,
    rounds,
    spread,
    table_limit,
)
from benchmarks.peer import torch_here
from benchmarks.workload import Workload
from data_pipeline.whole_files import write_json
from robe.backend import select
from robe.errors import RobeError
from robe.packages import extra

RESULTS = Path(__file__).parent / "results" / "modules.json"
SIZES, BLOCK, ROWS = (10, 100), 32, 2048
RATE = 0.01
TABLES = "26 EmbeddingBags"
# What stands in the table, beside TABLES.
SHOWN = {
    "RobeEmbedding": "`RobeEmbedding`",
    "RobeEmbedding, fused": '`RobeEmbedding`, `fused="sgd"`',
    "RobeEmbedding, fused, whole": '`RobeEmbedding`, `fused="sgd"`, Z = D',
    "26 RobeFeatures": "26 `RobeFeature` of `replace_embedding_bags`",
    "26 RobeFeatures, fused": '26 `RobeFeature`, `fused="sgd"`',
    "published ROBE": "the published ROBE in PyTorch's operations",
}


def jobs(effort: Effort) -> dict[str, Callable[[], object]]:
    """Name -> call, after the gate."""
    import torch

    from benchmarks.torch_embedding import Bags, PublishedRobe, tokens
    from robe.torch import RobeEmbedding, replace_embedding_bags

    work, calls = Workload("uniform", table_limit(effort)), {}
    batches = [batch.ids.astype(np.int64) for batch in work.draw(effort.pick(ROWS, 2))]
    whole = [(torch.from_numpy(ids),) for ids in batches]
    flat = [(torch.from_numpy(tokens(work, ids).ravel()),) for ids in batches]
    offsets = torch.arange(len(batches[0]))
    columns = [(list(ids.T.contiguous()), offsets) for (ids,) in whole]
    gradient = torch.randn(*batches[0].shape, work.width)

    def add(name: str, look_up: Callable, optimizer, rotation: list[tuple]) -> None:
        def step(arguments: tuple) -> None:
            looked_up = look_up(*arguments)
            looked_up.backward(gradient.reshape(looked_up.shape))
            if optimizer:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        without = torch.inference_mode()(look_up)
        calls[f"{name} lookup"] = rotate(lambda arguments: without(*arguments), rotation)
        calls[f"{name} step"] = rotate(step, rotation)

    table = torch.empty(sum(work.cardinalities), work.width).uniform_(-0.01, 0.01)
    pieces = table.split(work.cardinalities)
    bags = Bags(pieces, sparse=True)
    add(TABLES, bags.lookup, bags.optimizer, columns)
    for megabytes in effort.pick(SIZES, (0.1, 0.2)):
        size, where = f"{megabytes:g} MB", (work.cardinalities, work.width, int(megabytes * 1e6 / 4))
        made, fused = (
            RobeEmbedding(*where, block=BLOCK),
            RobeEmbedding(*where, block=BLOCK, fused="sgd", lr=RATE),
        )
        whole_blocks = RobeEmbedding(*where, block=work.width, fused="sgd", lr=RATE)
        features, fused_features = Bags(pieces, sparse=True), Bags(pieces, sparse=True)
        replace_embedding_bags(features.bags, weights=where[-1], block=BLOCK)
        replace_embedding_bags(fused_features.bags, weights=where[-1], block=BLOCK, fused="sgd", lr=RATE)
        some, expected = batches[0][:64], np.empty((*batches[0][:64].shape, work.width), np.float32)
        embedding.robe(work, megabytes, BLOCK, select("reference")).lookup(some.astype(np.uint32), expected)
        with torch.no_grad():
            agree("RobeEmbedding", made(whole[0][0][:64]).numpy(), expected)
            agree("RobeFeature", features.lookup(*columns[0])[:64].numpy(), expected)
        published = PublishedRobe(made.weight.detach().clone(), work.width, BLOCK)

        def sgd(module):
            return torch.optim.SGD(module.parameters(), RATE, fused=True)

        add(f"RobeEmbedding {size}", made, sgd(made), whole)
        add(f"RobeEmbedding, fused {size}", fused, None, whole)
        add(f"RobeEmbedding, fused, whole {size}", whole_blocks, None, whole)
        add(f"26 RobeFeatures {size}", features.lookup, sgd(features.bags), columns)
        add(f"26 RobeFeatures, fused {size}", fused_features.lookup, None, columns)
        add(f"published ROBE {size}", published.lookup, published.optimizer, flat)
    return calls


def run(effort: Effort) -> list[dict]:
    """A figure of each job, with its `ratio` to that of the tables in the same rounds."""
    turns = {name: effort.job(call, lambda: None) for name, call in jobs(effort).items()}
    times = rounds("modules", turns, effort.rounds)
    return [
        figure("modules", name, values) | {"faster": spread(times[f"{TABLES} {name.split()[-1]}"] / values)}
        for name, values in times.items()
    ]


def measure(quick: bool = False) -> None:
    """Measure our modules for PyTorch.

    Args:
        quick: Tiny sizes and few repeats, to see that everything runs; the figures mean nothing.
    """
    if not torch_here():
        raise RobeError(f"PyTorch is not installed: {extra('torch')}")
    start, others = time.monotonic(), cpu_seconds_of_others()
    rows = run(QUICK if quick else Effort(rounds=7, table_bytes=2e9))
    from benchmarks.__main__ import line  # which changes how threads wait

    for row in rows:
        print(line(row), flush=True)
    used = (cpu_seconds_of_others() - others) / (time.monotonic() - start)
    if not quick:
        where = machine("cpu") | {"cores_used_by_others": max(0.0, round(used, 2))}
        write_json(RESULTS, {"machine": where, "rows": rows})
        print(f"{RESULTS}: written")


def table(results: dict) -> str:
    """Times, and how many times as fast as the tables, for docs/pytorch.md."""
    found, where = {row["name"]: row for row in results["rows"]}, results["machine"]

    def cells(name: str) -> list[str]:
        told = []
        for verb in ("lookup", "step"):
            row = found[f"{name} {verb}"]
            low, high = (1e3 * time for time in row["quartiles"])
            told.append(f"{1e3 * row['median']:.3g} ms ({low:.3g}-{high:.3g})")
            told.append("" if name == TABLES else f"{row['faster']['median']:.2f}")
        return told

    versions = where["versions"]
    lines = [
        f"{where['cpu']}, {where['threads']} threads, torch {versions['torch']}, numba {versions['numba']}, "
        f"{where['date']}; medians and quartiles of {found[f'{TABLES} step']['repeats']} turns, while other "
        f"programs used {where['cores_used_by_others']:.2f} cores.",
        "",
        "| | look-up | times as fast | step of SGD | times as fast |",
        "| --- | --- | --- | --- | --- |",
        f"| 26 `nn.EmbeddingBag`, sparse gradients | {' | '.join(cells(TABLES))} |",
    ]
    for megabytes in SIZES:
        for name, title in SHOWN.items():
            lines.append(f"| {title}, {megabytes} MB | {' | '.join(cells(f'{name} {megabytes} MB'))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        tyro.cli(measure, prog="python -m benchmarks.modules")
    except RobeError as error:
        sys.exit(f"error: {error}")
