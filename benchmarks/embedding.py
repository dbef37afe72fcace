"""Look-up and update: ROBE arrays against a plain copy, PyTorch's EmbeddingBags and the published ROBE.

Vectors go to (B, F, D), B = 2048, F = 26, D = 128, with ids of two laws: `uniform` over 26 equal tables,
where nearly every row of a 10 GB table misses the caches, and `mlperf`, Zipf's over tables of mlperf's sizes.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.limits import copier
from benchmarks.measure import Effort, agree, figure, ratio, rotate, rounds, table_limit
from benchmarks.peer import peer
from benchmarks.workload import Workload
from robe.backend import Backend, select
from robe.config import EmbeddingConfig, ModelConfig, TrainConfig, resolve
from robe.embeddings import ArrayEmbedding, create
from robe.interaction import Interaction
from robe.kernels.interaction import out_width

BLOCKS = (8, 32, 128)
LAWS = ("uniform", "mlperf")
RATE = 0.01


def gate(what: str, embedding: ArrayEmbedding, ids: np.ndarray) -> None:
    """Raise BenchmarkError unless its verbs do to some rows, ids (B, F), what the reference does."""
    here, width = embedding.backend, embedding.width
    twin = dataclasses.replace(
        embedding,
        memory=here.to_host(embedding.memory).copy(),
        base=here.to_host(embedding.base),
        backend=select("reference"),
    )
    ids = np.ascontiguousarray(ids[:64])
    rng = np.random.default_rng(0)
    gradient = rng.standard_normal((*ids.shape, width), np.float32)
    first = rng.standard_normal((len(ids), width), np.float32)

    def results(subject: ArrayEmbedding, to_device: Callable, to_host: Callable) -> Iterator[np.ndarray]:
        rows, d_vectors = to_device(ids), to_device(gradient)
        vectors = to_device(np.full_like(gradient, np.nan))
        subject.lookup(rows, vectors)
        layer = Interaction(subject, len(ids), subject.backend)
        interacted = layer.predict(to_device(first), rows)[:, layer.columns]
        subject.update(rows, d_vectors, RATE)
        yield from map(to_host, (vectors, interacted, subject.memory))

    found = results(embedding, here.to_device, here.to_host)
    expected = results(twin, np.copy, np.asarray)
    for verb, a, b in zip(("look-up", "fused interaction", "update"), found, expected, strict=True):
        agree(f"{what}: {verb}", a, b)


def robe(work: Workload, megabytes: float, block: int, backend: Backend) -> ArrayEmbedding:
    settings = EmbeddingConfig(megabytes=megabytes, block=block)
    config = resolve(TrainConfig(model=ModelConfig(work.preset), embedding=settings))
    return create(config, work.data(), backend)


def ours(work: Workload, sizes, rows: int, backend: Backend, blocks=BLOCKS) -> dict[str, Callable]:
    """Name -> call, of all arrays, after the gate."""
    xp, calls = backend.xp, {}
    drawn = [batch.ids for batch in work.draw(rows)]
    batches = [backend.to_device(ids) for ids in drawn]
    n, width = 1 + drawn[0].shape[1], work.width
    gradient = backend.to_device(np.random.default_rng(0).standard_normal((rows, n - 1, width), np.float32))
    out, vectors = xp.empty_like(gradient), xp.ones((rows, n, width), np.float32)
    first, interacted = vectors[:, 0].copy(), xp.empty((rows, out_width(n, width)), np.float32)
    copy = copier(backend)
    calls["copy"] = lambda: copy(gradient.reshape(-1), out.reshape(-1))

    def apart(embedding, ids):
        embedding.lookup(ids, vectors[:, 1:])
        backend.kernels.interaction(vectors, interacted)

    for megabytes in sizes:
        for block in blocks:
            name, array = f"ROBE {megabytes:g} MB Z={block}", robe(work, megabytes, block, backend)
            gate(name, array, drawn[0])
            calls[f"{name} lookup"] = rotate(lambda ids, a=array: a.lookup(ids, out), batches)
            calls[f"{name} update"] = rotate(lambda ids, a=array: a.update(ids, gradient, RATE), batches)
            layer = Interaction(array, rows, backend)
            fused = rotate(lambda ids, la=layer: la.predict(first, ids), batches)
            calls[f"{name} fused interaction"] = fused
            calls[f"{name} lookup, interaction"] = rotate(lambda ids, a=array: apart(a, ids), batches)
    return calls


def run(
    backend: Backend, effort: Effort, rows: int = 2048, blocks=BLOCKS, until: float = math.inf
) -> Iterator[dict]:
    """until: of `time.monotonic()`, for which the rounds are cut short."""
    sizes, rows = effort.pick((10, 100), (0.1, 0.2)), effort.pick(rows, 2)
    table_bytes = table_limit(effort)
    for law in LAWS:
        work = Workload(law, table_bytes)
        jobs = {
            name: effort.job(call, backend.synchronize)
            for name, call in ours(work, sizes, rows, backend, blocks).items()
        }
        arrays = [(size, block) for size in sizes for block in blocks]
        settings = {"tables": law, "table_bytes": table_bytes, "rows": rows, "arrays": arrays}
        with peer("torch_embedding", backend, effort.seconds, **settings) as peer_jobs:
            times = rounds(f"embedding, {law}", jobs | peer_jobs, effort.rounds, until=until)
        for name, values in times.items():
            yield figure(f"embedding, {law}", name, values, rows=rows, table_bytes=work.full_bytes)
        yield from ratios(law, times, sizes, f"{work.full_bytes / 1e9:.3g} GB")


def ratios(law: str, times: dict[str, np.ndarray], sizes, table: str) -> Iterator[dict]:
    """The comparisons that tell most; those with peers only where there are any."""
    small, large = (f"ROBE {size:g} MB" for size in sizes)
    # Ours, verb, peer, its verb, and the limit where there is one.
    compared = []
    for array in (f"{small} Z=32", f"{large} Z=32"):
        compared += [(array, "lookup", "26 EmbeddingBags", "lookup", "copy")]
        compared += [(array, "update", "26 EmbeddingBags", "update", None)]
        compared += [(array, verb, "FBGEMM TBE", verb, None) for verb in ("lookup", "update")]
    if law == "uniform":  # for the rest, the law of the ids makes little difference
        compared += [(f"{small} Z={block}", "lookup", "copy", "", "copy") for block in BLOCKS]
        compared += [(f"{large} Z={block}", "lookup", "copy", "", "copy") for block in BLOCKS]
        compared += [(f"{large} Z=128", "lookup", "one EmbeddingBag", "lookup", "copy")]
        compared += [(f"{small} Z=32", "update", f"{small} Z=32", "lookup", None)]
        for array in (f"{small} Z=32", f"{large} Z=128"):
            for verb in ("lookup", "update", "lookup + update"):
                compared += [(array, verb, f"published {array}", verb, None)]
            compared += [(array, "fused interaction", array, "lookup, interaction", None)]
    for subject, verb, other, other_verb, limit in compared:
        ours, theirs = _sum(times, subject, verb), _sum(times, other, other_verb)
        if ours is not None and theirs is not None:
            peer_name = f"{other} {other_verb}".strip()
            peer_name += f", {table}" if "Bag" in other or "TBE" in other else ""
            yield ratio(f"{law} ids: {subject} {verb}", peer_name, ours, theirs, times.get(limit))


def _sum(times: dict[str, np.ndarray], subject: str, verbs: str) -> np.ndarray | None:
    """The time of all verbs, `a + b`, of a subject; None if it was not measured."""
    parts = [times.get(f"{subject} {verb}".strip()) for verb in verbs.split(" + ")]
    return None if any(part is None for part in parts) else sum(parts)
