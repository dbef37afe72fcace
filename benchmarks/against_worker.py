"""The work that benchmarks/against.py times, in a process of one revision; speaks the protocol of peer.py.

Started by its path, with the packages of that revision in front: so it may only use what all of the revisions
that are compared have, and nothing of benchmarks/.

    python -P benchmarks/against_worker.py kernels,steps SECONDS [quick]
"""

import dataclasses
import json
import sys
import time

import numba
import numpy as np

from robe.backend import select
from robe.config import DataSpec, EmbeddingConfig, ModelConfig, OptimizerConfig, TrainConfig, resolve
from robe.kernels.operations import OPERATIONS, version
from robe.model import build

try:
    from robe.kernels.workbench.cases import calls
    from robe.kernels.workbench.inspection import BENCH
except ImportError:  # before there was a workbench
    from robe.kernels.cases import calls
    from robe.kernels.inspection import BENCH

RATE = 0.01  # keeps the weights finite with labels that mean nothing
FEATURES, ROWS = 26, 20_000  # of each table
ROTATION = 4  # batches, so that a batch does not find all of its rows in the cache

BIG, LARGE = EmbeddingConfig(megabytes=10, block=32), EmbeddingConfig(megabytes=100, block=32)
CODES = EmbeddingConfig("mixed_precision", bits=8)
# Name -> preset, embedding, optimizer.
EMBEDDINGS = {
    "ROBE 10 MB, SGD": ("mlperf", BIG, "sgd"),
    "ROBE 10 MB, Adagrad": ("mlperf", BIG, "adagrad"),
    "ROBE 10 MB, D = 16, Z = 16, Adagrad": ("kaggle", dataclasses.replace(BIG, block=16), "adagrad"),
    "ROBE 10 MB of halves, SGD": ("mlperf", dataclasses.replace(BIG, memory="fp16"), "sgd"),
    "ROBE 100 MB, SGD": ("mlperf", LARGE, "sgd"),
    "full table, Adagrad": ("mlperf", EmbeddingConfig("full"), "adagrad"),
    "mixed precision, INT8": ("mlperf", CODES, "sgd"),
}
MODELS = {
    "small, ROBE, Adagrad": ("small", EmbeddingConfig(megabytes=0.022), "adagrad"),
    "small, full table, Adagrad": ("small", EmbeddingConfig("full"), "adagrad"),
    "kaggle, ROBE 2 MB": ("kaggle", EmbeddingConfig(megabytes=2, block=32), "sgd"),
    "mlperf, ROBE 100 MB": ("mlperf", LARGE, "sgd"),
    "mlperf, mixed precision INT8": ("mlperf", CODES, "sgd"),
}


def model(preset: str, embedding: EmbeddingConfig, optimizer: str, batch: int | None = None):
    """(a model, batches for it)."""
    data = DataSpec(13, (ROWS,) * FEATURES, "dictionary", "", "for measurements")
    settings = {"embedding": embedding, "optimizer": OptimizerConfig(optimizer), "batch": batch}
    config = resolve(TrainConfig(ModelConfig(preset), **settings))
    rng, rows = np.random.default_rng(0), config.batch
    batches = [
        (
            (rng.random(rows) < 0.25).astype(np.float32),
            rng.random((rows, data.dense), np.float32),
            rng.integers(0, ROWS, (rows, FEATURES)).astype(np.uint32),
        )
        for _ in range(ROTATION)
    ]
    return build(config, data, select("cpu")), batches


def in_turn(call, arguments: list[tuple]):
    """A call that takes the next of the arguments, over and over."""
    done = iter(range(sys.maxsize))
    return lambda: call(*arguments[next(done) % len(arguments)])


def kernels(quick: bool):
    """(name, call): every CPU kernel, then look-ups and updates, whatever kernels they are made of."""
    empty = select("cpu").empty

    def aligned(value):
        """Where an array happens to begin must not decide which revision is faster."""
        if not isinstance(value, np.ndarray):
            return value
        copy = empty(value.shape, value.dtype)
        copy[...] = value
        return copy

    for memory_type in ("float32", "float16", "int8", "int4"):
        case = BENCH._replace(memory_type=memory_type, **({"rows": 8, "memory": 100_000} if quick else {}))
        for operation, call in calls(case).items():
            # Of the types only look-ups of an array know.
            if operation in OPERATIONS and (memory_type == "float32" or operation.startswith("gather")):
                arguments = [aligned(value) for value in call.copy().values()]
                name = operation if memory_type == "float32" else f"{operation}, {memory_type}"
                yield name, in_turn(version(operation, "cpu"), [tuple(arguments)])
    for name, settings in EMBEDDINGS.items():
        subject, batches = model(*settings, batch=8 if quick else 2048)
        gradient = empty((*batches[0][2].shape, subject.embedding.width), np.float32)
        gradient[...] = np.random.default_rng(0).standard_normal(gradient.shape)
        out, embedding = empty(gradient.shape, np.float32), subject.embedding
        yield f"look-up: {name}", in_turn(embedding.lookup, [(ids, out) for *_, ids in batches])
        update = [(ids, gradient, RATE) for *_, ids in batches]
        yield f"update: {name}", in_turn(embedding.update, update)


def steps(quick: bool):
    for name, settings in MODELS.items():
        subject, batches = model(*settings, batch=8 if quick else None)
        yield f"training step: {name}", in_turn(subject.step, [(*batch, RATE) for batch in batches])
        yield f"inference: {name}", in_turn(subject.predict, [batch[1:] for batch in batches])


def turn(call, seconds: float) -> float:
    """Seconds per call: one call unmeasured, then calls for a while, one at least."""
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)  # a small model's step sets it to 1
    call()
    count, start = 0, time.perf_counter()
    while not count or time.perf_counter() - start < seconds:
        call()
        count += 1
    return (time.perf_counter() - start) / count


def main(parts: str, seconds: str, *quick: str) -> None:
    made = {"kernels": kernels, "steps": steps}
    jobs = dict(job for part in parts.split(",") for job in made[part](bool(quick)))
    print(json.dumps(list(jobs)), flush=True)
    for line in sys.stdin:
        print(turn(jobs[line.strip()], float(seconds)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
