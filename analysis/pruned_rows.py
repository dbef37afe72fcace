"""Rows whose width is pruned in training: 65% fewer bytes at equal quality?

Claim (FIITED, Luo et al., arXiv 2401.04408): the vectors of a table are not equally important. Cut into
chunks, of which those of little utility are pruned while it is trained, it keeps its quality in 65% fewer
bytes.

1. Bytes. What is stored of the table then takes 35% of its bytes at most: the weights of the chunks that are
   left, a bit for each chunk, and for every 32 ids where their weights begin.
2. Quality. Its AUC is within 0.001 of the whole table's.
3. Utility. Pruned as much at random it is worse than pruned by utility: it has no 65% that nobody misses.

Conditions: preset `small`, Adagrad at 0.03, one pass; SYNTHETIC rows of the default law, or those given by
--data. The utility of a chunk, a quarter of a vector, is the sum of the squares of its gradients, which
Adagrad keeps anyway: it grows with how often the id is seen and with how much it matters. All chunks of all
features compete, once, in the middle of the pass; one that is pruned is 0 from then on, and not trained.
FIITED prunes step by step on a stream of data, and so saves memory in training too; here this is not so.
Intervals are Student's, 95%, over the seeds, of differences between trainings with equal seeds.

Measured: the AUC on the test half, and the bytes of the arrays that `packed` makes of the trained table.

    python analysis/pruned_rows.py [--quick] [--data PREPARED] [--seeds N] [--passes N] [--batch N]
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from analysis import claim
from analysis.claim import Check, Rows, Verdict, conclude, mean_interval, where
from analysis.trainings import WIDTH, Study, StudyOptions, Trainings
from robe.backend import Backend
from robe.config import DataSpec, EmbeddingConfig, OptimizerConfig, TrainConfig, resolve
from robe.embeddings import ArrayEmbedding, create
from robe.model import DLRM

CACHE = claim.OUT / "pruned_rows"
STUDY = Study(seeds=5, passes=1)
QUICK = dataclasses.replace(STUDY, rows=16_000, scale=0.02, seeds=3, batch=320)
RATE = 0.03
CHUNKS = 4
BEGINS = 32  # ids from one number that says where weights begin to the next
SHARE, LESS = 0.35, 0.1  # of the bytes of the table, which are kept
WITHIN = 0.001
FULL, UTILITY, RANDOM = "full table", "by utility", "at random"


def packed(table: np.ndarray) -> dict[str, np.ndarray]:
    """What is stored of a table (n, D): the weights of all chunks that are not 0, and where they are."""
    chunks = table.reshape(-1, CHUNKS, WIDTH // CHUNKS)
    kept = chunks.any(axis=2)
    counts = np.cumsum(kept.sum(axis=1)) - kept.sum(axis=1)
    return {"weights": chunks[kept], "bits": np.packbits(kept), "begins": counts[::BEGINS].astype(np.uint32)}


def unpacked(stored: dict[str, np.ndarray], i: int) -> np.ndarray:
    """Row i of the table (D,)."""
    first = i // BEGINS * BEGINS
    bits = stored["bits"][first * CHUNKS // 8 : (i * CHUNKS + CHUNKS + 7) // 8]
    kept = np.unpackbits(bits)[: (i + 1 - first) * CHUNKS].reshape(-1, CHUNKS).astype(bool)
    start = int(stored["begins"][i // BEGINS]) + int(kept[:-1].sum())
    row = np.zeros((CHUNKS, WIDTH // CHUNKS), np.float32)
    row[kept[-1]] = stored["weights"][start : start + int(kept[-1].sum())]
    return row.reshape(-1)


def most_chunks(rows: int, share: float) -> int:
    """Chunks that are left where so much of the bytes of a table is kept."""
    return max(0, int((share * rows * WIDTH * 4 - stored_bytes(rows, 0)) // (WIDTH // CHUNKS * 4)))


def stored_bytes(rows: int, chunks: int) -> int:
    """Of a table of which so many chunks are left: those of the arrays of `packed`."""
    return -(-rows * CHUNKS // 8) + 4 * -(-rows // BEGINS) + chunks * (WIDTH // CHUNKS) * 4


@dataclass(kw_only=True)
class PrunedTable(ArrayEmbedding):
    """A full table of which chunks are pruned halfway; a chunk that is 0 is pruned, and stays 0."""

    by: str
    share: float

    summable = False  # all steps go through `update`

    def update(self, ids, d_vectors, rate: float) -> None:
        vectors = self.backend.empty(d_vectors.shape, self.dtype)
        self.lookup(ids, vectors)
        chunks = *vectors.shape[:2], CHUNKS, WIDTH // CHUNKS
        kept = (vectors.reshape(chunks) != 0).any(axis=3, keepdims=True)
        super().update(ids, (d_vectors.reshape(chunks) * kept).reshape(vectors.shape), rate)

    def halfway(self) -> None:
        chunks = self.memory.reshape(-1, WIDTH // CHUNKS)
        utility = self.backend.to_host(self.accumulator.reshape(chunks.shape).sum(axis=1))
        if self.by == RANDOM:
            utility = np.random.default_rng(self.seed).random(len(utility))
        pruned = np.argsort(-utility, kind="stable")[most_chunks(self.weights // WIDTH, self.share) :]
        chunks[self.backend.to_device(pruned)] = 0


def pruned_model(config: TrainConfig, spec: DataSpec, backend: Backend, by: str, share: float) -> DLRM:
    """The model of a full table, which is to be pruned to that share of its bytes."""
    table = create(config, spec, backend)
    given = {field.name: getattr(table, field.name) for field in fields(table) if field.init}
    given |= {"seed": config.seed, "by": by, "share": share}
    return DLRM(config, spec, PrunedTable(**given), backend)


class PrunedTrainings(Trainings):
    def made(self, config: TrainConfig, **also: Any) -> DLRM:
        if also["by"] == FULL:
            return super().made(config)
        return pruned_model(config, self.spec, self.backend, **also)

    def row(self, by: str, share: float, seed: int, passes: int) -> dict:
        config = TrainConfig(
            embedding=EmbeddingConfig("full"),
            optimizer=OptimizerConfig("adagrad", RATE),
            batch=self.batch,
            epochs=passes,
            seed=seed,
            eval_every=self.steps_per_pass,
        )

        def found(model: DLRM) -> dict:
            table = self.backend.to_host(model.embedding.memory).reshape(-1, WIDTH)
            stored = table.nbytes if by == FULL else sum(a.nbytes for a in packed(table).values())
            return {"stored_bytes": stored, "share_of_bytes": stored / table.nbytes}

        name = f"{by}, {share:.0%} of the bytes, seed {seed}"
        summary, log = self.trained(resolve(config), name, found, by=by, share=share)
        kept = {key: summary[key] for key in ("stored_bytes", "share_of_bytes")}
        return {"pruned": by, "share": share, "seed": seed, "auc": log[-1]["auc"], **kept}


def measure(
    quick: bool = False,
    data: Path | None = None,
    seeds: int | None = None,
    passes: int | None = None,
    batch: int | None = None,
    study: Study | None = None,
    cache: Path = CACHE,
    say: Callable[[str], None] = print,
) -> Rows:
    """A row for each training. quick: of one share; data, seeds, passes and batch replace the study's."""
    study = study or (QUICK if quick else STUDY)
    study = study.given(data=data, seeds=seeds, passes=passes, batch=batch)
    made = PrunedTrainings.of(study, cache, say)
    shares = (SHARE,) if quick else (SHARE, LESS)
    points = [(FULL, 1.0), *product((UTILITY, RANDOM), shares)]
    synthetic = {"synthetic": bool(made.manifest.synthetic)}
    return [
        made.row(by, share, seed, study.passes) | synthetic
        for seed in range(1, study.seeds + 1)
        for by, share in points
    ]


def auc_of(rows: Rows, by: str, share: float) -> np.ndarray:
    """Test AUC (seeds,)."""
    return np.array([row["auc"] for row in where(rows, pruned=by, share=share)])


def verdict(rows: Rows) -> Verdict:
    """Where the interval is too wide to tell equal quality, it must only not be refuted."""
    most = max(row["share_of_bytes"] for row in rows if row["share"] == SHARE)
    utility, random = (auc_of(rows, by, SHARE) for by in (UTILITY, RANDOM))
    lost, half = mean_interval(utility - auc_of(rows, FULL, 1.0))
    gained, beside = mean_interval(utility - random)
    return conclude(
        [
            Check(f"bytes: {SHARE:.0%} of the table's at most", most <= SHARE, f"{most:.4f}"),
            Check(
                f"quality: AUC within {WITHIN:g} of the whole table's",
                lost + half >= -WITHIN,
                f"{lost:+.4f} ± {half:.4f}",
            ),
            Check(
                "utility: better than pruned at random",
                gained > beside,
                f"AUC {gained:+.4f} ± {beside:.4f}",
            ),
        ]
    )


def plot(rows: Rows):
    source = "SYNTHETIC data" if rows[0]["synthetic"] else "real data"
    seeds = len({row["seed"] for row in rows})
    figure, (axes,) = claim.figure(1, 1, f"A pruned table, {source}, {seeds} seeds, 95%")
    for by, color in ((UTILITY, "C0"), (RANDOM, "C3")):
        shares = sorted({row["share"] for row in where(rows, pruned=by)})
        found = np.array([mean_interval(auc_of(rows, by, share)) for share in shares])
        axes.errorbar(
            100 * np.array(shares), *found.T, color=color, marker="o", capsize=3, label=f"pruned {by}"
        )
    middle, half = mean_interval(auc_of(rows, FULL, 1.0))
    axes.axhline(middle, color="k", linewidth=1, label=FULL)
    axes.axhspan(middle - half, middle + half, color="k", alpha=0.1)
    axes.set(xlabel="% of the bytes of the table", ylabel="test AUC", xlim=(0, 100))
    axes.legend(fontsize="small")
    return figure


if __name__ == "__main__":
    claim.main(StudyOptions)
