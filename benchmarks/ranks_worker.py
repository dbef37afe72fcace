"""Our side of benchmarks/ranks.py: steps of a model, alone or as one of the ranks that mpiexec started.

    python -m benchmarks.ranks_worker SETTINGS

Rank 0 speaks the protocol of peer.py, but answers a line with what a turn found: the seconds and bytes of a
step, the seconds of its phases, and how the gradients of vectors travelled. SETTINGS are those of `steps`, in
JSON.
"""

from robe.threads import share_cores

share_cores()  # before anything that loads NumPy

import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from benchmarks.step import RATE, config
from benchmarks.workload import Workload
from data_pipeline.ranks import Ranks
from robe.backend import among, select
from robe.config import EmbeddingConfig
from robe.model import build
from robe.ranks import ALONE, Alone, Mpi
from robe.timeline import Phase, Timeline


class Late(Mpi):
    """Ranks that add dense gradients up when the backward pass is done."""

    def begin(self, array: Any) -> None:
        self.begun.append(array)

    def finish(self, phase: Phase) -> None:
        with phase("exchange, dense"):
            while self.begun:
                self.add(self.begun.pop(0))


def link_rate(ranks: Alone) -> float:
    """Bytes a second that a rank receives of an array of 16 MB; 0 alone."""
    sent, moved, times = np.zeros(4_000_000, np.float32), ranks.moved, []
    for _ in range(5):
        ranks.numbers(0)
        start = time.perf_counter()
        ranks.joined(sent)
        times.append(time.perf_counter() - start)
    return (ranks.moved - moved) / len(times) / median(times)


def steps(
    ranks: Alone, preset: str, table_bytes: float, batch: int, megabytes: float, block: int, count: int
) -> Callable[[], dict]:
    """A call that makes a step unmeasured and then `count`, by this rank's part of each batch."""
    work, backend = Workload(preset, table_bytes), among(select("cpu"), ranks)
    embedding = EmbeddingConfig(megabytes=megabytes, block=block)
    model = build(config(preset, embedding, batch), work.data(), backend)
    part, turns, link = ranks.part(batch), 0, link_rate(ranks)
    batches = [[array[part] for array in drawn] for drawn in work.draw(batch)]

    def turn() -> dict:
        nonlocal turns
        for number in range(1 + count):
            if number == 1:
                ranks.numbers(0)  # all begin together
                timeline, moved, start = Timeline(lambda: None), ranks.moved, time.perf_counter()
            phase = timeline if number else Timeline(lambda: None)
            model.step(*batches[turns % len(batches)], RATE, phase, whole=batch)
            turns += 1
        ranks.numbers(0)
        seconds = (time.perf_counter() - start) / count
        phases: dict[str, list[float]] = {}
        for event in timeline.events:
            phases.setdefault(event.name, []).append(event.own)
        exchange = model.interaction.exchange
        return {
            "seconds": seconds,
            "phases": {name: median(times) for name, times in phases.items()},
            "bytes": (ranks.moved - moved) / count,
            "ways": dict(exchange.ways) if exchange else {},
            "link": link,
        }

    return turn


def main(settings: str) -> None:
    told, comm = json.loads(settings), Ranks().comm
    kind = Late if told.pop("late", False) else Mpi
    ranks = ALONE if comm is None else kind(comm)
    turn = steps(ranks, **told)
    if isinstance(ranks, Mpi) and ranks.rank:
        while True:
            ranks.follow()
            turn()
    print(json.dumps(["step"]), flush=True)
    for _ in sys.stdin:
        ranks.lead("step")
        print(json.dumps(turn()), flush=True)
    if isinstance(ranks, Mpi):
        ranks.at_work = False
    ranks.end(SystemExit(0))


if __name__ == "__main__":
    main(sys.argv[1])
