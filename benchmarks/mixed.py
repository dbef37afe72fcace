"""Look-up in quantised rows and in their cache: against the float32 rows they stand for, and EmbeddingBag.

B = 2048, F = 26, D = 128, uniform ids over 26 equal tables that exceed the caches of the machine. All look up
the same rows. `hits` has a cache with twice as many lines as there are look-ups, and holds them all, which is
checked; INT8 and INT4 have none, as after a flush. `places known` gathers the cached rows without searching
for them: what `hits` takes beyond that is the search. `full INT8` is the table converted for inference;
`ROBE` is an array of 25 million weights (Z = 32), in float32 and converted. `inference` interacts the vectors
too.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.measure import BenchmarkError, Effort, agree, figure, ratio, rotate, rounds, table_limit
from benchmarks.peer import peer
from benchmarks.workload import Workload
from robe.backend import Backend, select
from robe.config import CODE_BITS, EmbeddingConfig, ModelConfig, TrainConfig, resolve
from robe.convert import convert_embedding, converted_config
from robe.embeddings import ArrayEmbedding, MixedPrecisionEmbedding, create
from robe.interaction import Interaction
from robe.kernels.parts.cache import WAYS, hash_row, set_of
from robe.kernels.parts.hashing import slot_map

FULL = "float32 rows"
KNOWN = "cached float32 rows, places known"
OURS = {"INT8, hits": 8, "INT8": 8, "INT4": 4}
CODES, ARRAY = "full INT8", "ROBE"
ARRAY_WEIGHTS, BLOCK = 25_000_000, 32  # 100 MB in float32
ARRAYS = {f"{ARRAY} INT8": "int8", f"{ARRAY} INT4": "int4"}
LEAST_HITS = 0.99


def cached(work: Workload, rows: int, backend: Backend, expected: np.ndarray) -> dict[str, Callable]:
    """Name -> call, of mixed precision, after its vectors were compared with those of the first batch."""
    batches = [backend.to_device(batch.ids) for batch in work.draw(rows)]
    out = backend.empty((rows, batches[0].shape[1], work.width), "float32")
    base = resolve(TrainConfig(ModelConfig(work.preset), batch=rows))
    calls = {}
    widest = 2 / min(work.cardinalities) ** 0.5  # from the least initial weight to the largest
    for name, bits in OURS.items():
        look_ups = sum(ids.size for ids in batches)
        cache = min(1.0, 2 * look_ups / sum(work.cardinalities)) if "hits" in name else 0.0
        settings = EmbeddingConfig("mixed_precision", bits=bits, cache=cache)
        embedding = create(dataclasses.replace(base, embedding=settings), work.data(), backend)
        if cache:
            for ids in batches * 2:  # rows that the first round pushed out come back in the second
                embedding.update(ids, backend.xp.zeros_like(out), 0.0)
            calls[f"{KNOWN} lookup"] = known(embedding, batches, out)
        embedding.lookup(batches[0], out)
        # A step of the codes, and what halves make of it; another where a round may have rounded anew.
        steps = 1 + 2 * (cache > 0)
        agree(name, backend.to_host(out), expected, 1.01 * steps * widest / (2**bits - 1))
        calls[f"{name} lookup"] = rotate(lambda ids, e=embedding: e.lookup(ids, out), batches)
    return calls


def converted(
    work: Workload, rows: int, backend: Backend, weights: int
) -> tuple[dict[str, Callable], np.ndarray]:
    """(name -> call, of tables and ROBE arrays of codes, beside the floats that they were made of; vectors of
    the first batch in the float32 tables)."""
    host = select("cpu")  # where runs are converted

    def moved(embedding: ArrayEmbedding) -> ArrayEmbedding:
        arrays = {name: backend.to_device(getattr(embedding, name)) for name in ("memory", "base")}
        return dataclasses.replace(embedding, **arrays, backend=backend)

    batches = [backend.to_device(batch.ids) for batch in work.draw(rows)]
    out = backend.empty((rows, batches[0].shape[1], work.width), "float32")
    first = backend.to_device(np.random.default_rng(0).standard_normal((rows, work.width), np.float32))
    base = resolve(TrainConfig(ModelConfig(work.preset), EmbeddingConfig("full"), batch=rows))
    array = EmbeddingConfig(weights=weights, block=BLOCK)
    calls, looked_up, data = {}, {}, work.data()
    for floats, settings, names in (
        (FULL, base.embedding, {CODES: "int8"}),
        (ARRAY, array, ARRAYS),
    ):
        config = dataclasses.replace(base, embedding=settings)
        source = create(config, data, host)
        made = {floats: moved(source)}
        made[floats].lookup(batches[0], out)
        expected = looked_up[floats] = backend.to_host(out).copy()
        for name, memory in names.items():
            target = create(converted_config(config, data, memory, None, None), data, host)
            lost = convert_embedding(source, target, data)
            made[name] = moved(target)
            made[name].lookup(batches[0], out)
            agree(name, backend.to_host(out), expected, lost["largest_error"])
            # Half of a step from the least to the largest weight of a group, and what halves make of it.
            widest = 2 * float(abs(expected).max()) / (2 ** CODE_BITS[memory] - 1)
            agree(f"{name}, weights", np.array(lost["largest_error"]), np.zeros(()), 1.01 * widest / 2)
        for name, embedding in made.items():
            calls[f"{name} lookup"] = rotate(lambda ids, e=embedding: e.lookup(ids, out), batches)
            layer = Interaction(embedding, rows, backend)
            calls[f"{name} inference"] = rotate(lambda ids, la=layer: la.predict(first, ids), batches)
    return calls, looked_up[FULL]


def known(embedding: MixedPrecisionEmbedding, batches: list, out) -> Callable:
    """A gather of the cached rows of batches; BenchmarkError unless nearly all are in the cache."""
    backend, tags = embedding.backend, embedding.backend.to_host(embedding.tags)
    lines, hits = [], []
    for ids in batches:
        rows = backend.to_host(embedding.base) + backend.to_host(ids).astype(np.uint64)
        s = set_of(hash_row(rows), len(tags))
        there = tags[s] == rows[..., None]
        hits.append(there.any(axis=-1).mean())
        lines.append(backend.to_device((s * WAYS + there.argmax(axis=-1)).astype(np.uint32)))
    if np.mean(hits) < LEAST_HITS:
        raise BenchmarkError(f"only {np.mean(hits):.1%} of the look-ups hit; no time is told of them")
    memory = embedding.values.reshape(-1)
    where = slot_map("table", embedding.width, 1, memory.size, signed=False)
    base = backend.xp.zeros(embedding.features, "uint64")
    return rotate(lambda ids: backend.kernels.gather(memory, ids, base, where, out), lines)


def run(backend: Backend, effort: Effort) -> Iterator[dict]:
    rows, table_bytes = effort.pick(2048, 2), min(2e9, table_limit(effort))
    work = Workload("uniform", table_bytes)
    calls, vectors = converted(work, rows, backend, effort.pick(ARRAY_WEIGHTS, 25_000))
    calls |= cached(work, rows, backend, vectors)
    jobs = {name: effort.job(call, backend.synchronize) for name, call in calls.items()}
    settings = {"tables": "uniform", "table_bytes": table_bytes, "rows": rows, "arrays": []}
    with peer("torch_embedding", backend, effort.seconds, **settings) as peer_jobs:
        peer_jobs = {name: job for name, job in peer_jobs.items() if name == "one EmbeddingBag lookup"}
        times = rounds("mixed precision", jobs | peer_jobs, effort.rounds)
    for name, values in times.items():
        yield figure("mixed precision", name, values, rows=rows, table_bytes=work.full_bytes)
    for name in OURS:
        for other in (FULL, "one EmbeddingBag", *([KNOWN] if "hits" in name else [])):
            if (theirs := times.get(f"{other} lookup")) is not None:
                yield ratio(
                    f"mixed precision: {name} lookup",
                    f"{other} lookup, {work.full_bytes / 1e9:.3g} GB",
                    times[f"{name} lookup"],
                    theirs,
                )
    for of, name in ((FULL, CODES), *((ARRAY, name) for name in ARRAYS)):
        for call in ("lookup", "inference"):
            codes, floats = f"{name} {call}", f"{of} {call}"
            yield ratio(f"codes: {codes}", floats, times[codes], times[floats])
