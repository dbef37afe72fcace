"""Training step and inference of the presets: ours, with ROBE and full tables, against the PyTorch DLRM.

The floor is the model's matrix products alone, each layer's weight lying as is fastest. Two full tables may
not fit into memory at a time, so there are two passes: ROBE beside PyTorch, then ROBE beside our full table.
The full tables are compared by way of ROBE.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from benchmarks.limits import Products, best_orientation, preset_shapes
from benchmarks.measure import Effort, agree, figure, ratio, rotate, rounds, table_limit
from benchmarks.peer import peer
from benchmarks.workload import Workload
from robe.backend import Backend, select
from robe.config import EmbeddingConfig, ModelConfig, TrainConfig, resolve
from robe.model import DLRM, build

# Keeps the weights finite with labels that mean nothing.
RATE = 0.01
VERBS = ("training step", "inference", "embedding part")


class Case(NamedTuple):
    """What is measured of a preset.

    arrays: sizes of the ROBE array in MB. full_batches: those on which our full table is measured too.
    variants: of the peer, how (see torch_dlrm.py) and in which precision.
    """

    preset: str
    arrays: tuple[float, ...]
    batches: tuple[int, ...]
    full_batches: tuple[int, ...]
    variants: tuple[tuple[str, str], ...] = (("eager", "fp32"),)


CASES = (
    Case("kaggle", (2,), (128, 2048, 16384), (128, 2048)),
    Case("tb10m", (100,), (128, 2048, 16384), (2048,)),
    Case("mlperf", (100, 10), (128, 2048, 16384), (2048,)),
)


def config(preset: str, embedding: EmbeddingConfig, batch: int) -> TrainConfig:
    return resolve(TrainConfig(model=ModelConfig(preset), embedding=embedding, batch=batch))


def gate(preset: str, embedding: EmbeddingConfig, rows: int, backend: Backend) -> None:
    """Raise BenchmarkError unless logits, losses and weights after a step are the reference's."""
    work = Workload(preset, 1e6)
    batch = work.draw(rows)[0]
    results = []
    for here in (backend, select("reference")):
        model = build(config(preset, embedding, rows), work.data(), here)
        label, dense, ids = map(here.to_device, batch)
        logits = here.to_host(model.predict(dense, ids)).copy()
        losses = here.to_host(model.step(label, dense, ids, RATE)).copy()
        results.append([logits, losses, *(here.to_host(array) for array in model.state().values())])
    for found, expected in zip(*results, strict=True):
        agree(f"{preset}, {embedding.method}: training step", found, expected)


def verbs(model: DLRM, batches: list) -> dict[str, Callable]:
    """Verb -> a call on one batch after the other."""
    label, dense, ids = (list(part) for part in zip(*batches, strict=True))
    shape = len(label[0]), model.embedding.features, model.embedding.width
    out = model.backend.empty(shape, "float32")
    calls = (
        rotate(lambda label, dense, ids: model.step(label, dense, ids, RATE), label, dense, ids),
        rotate(model.predict, dense, ids),
        rotate(lambda ids: model.embedding.lookup(ids, out), ids),
    )
    return dict(zip(VERBS, calls, strict=True))


def floor(preset: str, batch: int, backend: Backend, effort: Effort) -> dict[str, Callable]:
    """Verb -> the matrix products of both MLPs."""
    parts = []
    for part, shapes in preset_shapes(preset).items():
        inner = [part == "top" or i > 0 for i in range(len(shapes))]
        turned = [best_orientation(s, batch, backend, i, effort) for s, i in zip(shapes, inner, strict=True)]
        parts.append(Products(shapes, batch, backend, inner[0], turned))
    return {
        "training step": lambda: [part.train() for part in parts],
        "inference": lambda: [part.infer() for part in parts],
    }


def run(backend: Backend, effort: Effort, cases: tuple[Case, ...] = CASES) -> Iterator[dict]:
    for case in cases:
        if effort.quick:
            case = case._replace(arrays=(0.1,), batches=(8,), full_batches=(8,))
        yield from run_case(case, backend, effort)


def run_case(case: Case, backend: Backend, effort: Effort) -> Iterator[dict]:
    work = Workload(case.preset, table_limit(effort))
    settings = {"tables": case.preset, "table_bytes": work.table_bytes, "batches": case.batches}
    arrays = {f"ROBE {size:g} MB": EmbeddingConfig(megabytes=size, block=32) for size in case.arrays}
    full = {f"full table {work.full_bytes / 1e9:.3g} GB": EmbeddingConfig("full")}
    for embedding in (EmbeddingConfig(megabytes=1), *full.values()):
        for batch in case.batches:
            gate(case.preset, embedding, min(batch, 2048), backend)

    def measure(what: str, embeddings: dict[str, EmbeddingConfig], batch: int, others: dict) -> dict:
        """(subject, verb) -> times, of our models with these embeddings and of others, in the same rounds."""
        batches = [tuple(map(backend.to_device, drawn)) for drawn in work.draw(batch)]
        jobs = {}
        for name, embedding in embeddings.items():
            model = build(config(case.preset, embedding, batch), work.data(), backend)
            jobs |= {(name, verb): call for verb, call in verbs(model, batches).items()}
        jobs |= {("GEMMs", v): call for v, call in floor(case.preset, batch, backend, effort).items()}
        jobs = {name: effort.job(call, backend.synchronize) for name, call in jobs.items()}
        count = effort.rounds if batch < 10000 else effort.pick(3, 2)  # seconds each
        return rounds(f"{what}, {case.preset} {batch}", jobs | others, count)

    beside_peer = {}
    with peer("torch_dlrm", backend, effort.seconds, **settings, variants=case.variants) as jobs:
        for batch in case.batches:
            mine = {
                tuple(name.split(": ")[1:]): job
                for name, job in jobs.items()
                if name.startswith(f"{batch}: ")
            }
            times = beside_peer[batch] = measure("ROBE and PyTorch", arrays, batch, mine)
            yield from rows(case, batch, times)
            for subject in arrays:
                yield from ratios(
                    case.preset, batch, subject, times, f"full table {work.full_bytes / 1e9:.3g} GB"
                )
    for batch in case.full_batches:
        first, (name,) = next(iter(arrays)), full
        times = measure("full table", {first: arrays[first]} | full, batch, {})
        yield from rows(case, batch, times)
        there = beside_peer[batch]
        for verb in VERBS:
            there[name, verb] = (
                times[name, verb] * np.median(there[first, verb]) / np.median(times[first, verb])
            )
        yield from ratios(case.preset, batch, name, there, name)


def rows(case: Case, batch: int, times: dict) -> Iterator[dict]:
    for (subject, verb), values in times.items():
        yield figure(f"{case.preset}, batch {batch}", f"{subject}: {verb}", values, batch=batch)


def ratios(preset: str, batch: int, subject: str, times: dict, table: str) -> Iterator[dict]:
    """A model of ours against every variant of the peer; and against the floor where there is none."""
    peers = sorted({s for s, _ in times if s.startswith("PyTorch")})
    for verb in VERBS:
        ours, limit = times[subject, verb], times.get(("GEMMs", verb))
        for name in peers:
            if (name, verb) in times:
                what = f"{preset}, batch {batch}: {verb}, {subject}"
                yield ratio(what, f"{name}, {table}", ours, times[name, verb], limit) | {
                    "model": [preset, batch]
                }
