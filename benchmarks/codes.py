"""Training steps on arrays and tables of codes, with weights behind them and without, beside float32.

A model of a preset takes whole steps on one batch after the other, in each of MEMORIES, with SGD and with
Adagrad. All models are of the same sizes and see the same batches in the same rounds. As everywhere, a
ratio tells how many times as fast the first is: a step that takes 1.5 times that of float32, the most that is
asked for, is 0.67 times as fast. Models train as they are measured, since what
a step of codes takes depends on how often scales change.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.measure import Effort, figure, ratio, rounds, table_limit
from benchmarks.step import RATE, VERBS, verbs
from benchmarks.workload import Workload
from robe.backend import Backend
from robe.config import EmbeddingConfig, ModelConfig, OptimizerConfig, TrainConfig, resolve
from robe.model import build

FLOATS = "fp32"
AWARE = {f"INT{bits}": {"memory": f"int{bits}"} for bits in (8, 4, 3, 2, 1)}
LEAN = {f"INT{bits} alone": {"memory": f"int{bits}", "master": "none"} for bits in (8, 4)}
MEMORIES = {FLOATS: {}} | AWARE | LEAN


class Case(NamedTuple):
    """The model and batch of a preset, and how its embedding is stored: an array of weights, or tables."""

    preset: str
    batch: int
    weights: int | None

    def __str__(self) -> str:
        stored = f"ROBE of {self.weights:,} weights" if self.weights else "full table"
        return f"{self.preset}, batch {self.batch}, {stored}"

    def embedding(self) -> EmbeddingConfig:
        return EmbeddingConfig(weights=self.weights) if self.weights else EmbeddingConfig("full")


CASES = (
    Case("kaggle", 128, 500_000),
    Case("kaggle", 2048, 500_000),
    Case("kaggle", 2048, None),
    Case("tb10m", 2048, 25_000_000),
)
LARGEST_TABLE = 100e6  # bytes in float32; training takes several times as much


def run(backend: Backend, effort: Effort, cases: tuple[Case, ...] = CASES) -> Iterator[dict]:
    for case in cases:
        if effort.quick:
            case = case._replace(batch=8, weights=case.weights and 1000)
        for optimizer in ("sgd", "adagrad"):
            yield from run_case(case, optimizer, backend, effort)


def run_case(case: Case, optimizer: str, backend: Backend, effort: Effort) -> Iterator[dict]:
    work = Workload(case.preset, min(LARGEST_TABLE, table_limit(effort)))
    batches = [tuple(map(backend.to_device, drawn)) for drawn in work.draw(case.batch)]
    jobs, settings = {}, OptimizerConfig(optimizer, RATE)
    for name, changes in MEMORIES.items():
        embedding = dataclasses.replace(case.embedding(), **changes)
        config = resolve(TrainConfig(ModelConfig(case.preset), embedding, settings, batch=case.batch))
        step = verbs(build(config, work.data(), backend), batches)[VERBS[0]]
        jobs[name] = effort.job(step, backend.synchronize)
    times = rounds(f"codes, {case}, {optimizer}", jobs, effort.rounds)
    for name, values in times.items():
        yield figure(str(case), f"{name}: training step, {optimizer}", values, batch=case.batch)
    for name in AWARE | LEAN:
        what = f"training in codes: {case}, {optimizer}, {name}"
        yield ratio(what, FLOATS, times[name], times[FLOATS])
