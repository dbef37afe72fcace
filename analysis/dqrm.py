"""INT4 with quantisation-aware training loses nothing, and is eight times smaller: the claim of DQRM.

Claims (Zhou and others, "DQRM: Deep Quantized Recommendation Models", arXiv 2410.20046), for full tables:

1. Tables that are trained as they will be stored, in INT4, have no less AUC than in float32.
2. They are eight times smaller. (Not here, see below: 4 D / (D / 2 + 4) times, in rows of D weights.)
3. The gradients of the rows can be rounded to INT8, as workers would send them to one another, without loss.

Conditions: `--method full --memory int4` for what DQRM does: look-ups read codes in training too, and
gradients go straight through to float32 weights behind them, which are not kept. But here a row has a scale
and a bias, of 2 bytes each, where DQRM has one scale for a table; so a row of D weights takes D / 2 + 4
bytes, and tables are eight times smaller only as D grows. The MLPs stay in float32. Gradients in INT8: those
of the vectors of a batch, all on one grid of 255 levels that ends at the largest, to the nearest. (DQRM also
leaves out those that are 0, which changes nothing, and sends those of the MLPs in INT8 too.)

Preset `small`, its own optimizer, SYNTHETIC rows of the default law, or those given by --data; paired seeds,
which draw the first weights and the order of the rows. "No less" is read as: by less than MARGIN, with the
whole interval of Student's, 95%, over the seeds. A claim like that also holds where nothing could be told, so
what is known to lose must be found to: the same tables in one bit.

    python analysis/dqrm.py [--quick] [--data PREPARED] [--seeds N] [--passes N] [--batch N]
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from analysis import claim
from analysis.claim import Check, mean_interval, where
from analysis.stochastic_rounding import RATES
from analysis.trainings import WIDTH, Study, StudyOptions, Trainings
from robe.config import EmbeddingConfig, OptimizerConfig, TrainConfig, resolve
from robe.model import DLRM

CACHE = claim.OUT / "dqrm"
STUDY = Study(rows=1_000_000, scale=0.02, zipf=1.2, decay=0.5, seeds=5, passes=1)
QUICK = dataclasses.replace(STUDY, rows=40_000, scale=0.0003, seeds=4, batch=128)
MARGIN, QUICK_MARGIN = 0.0005, 0.015  # of AUC
SMALLER = 8

FULL, INT4, SENT, INT1 = "fp32", "INT4", "INT4, gradients in INT8", "INT1"
POINTS = {FULL: "fp32", INT4: "int4", SENT: "int4", INT1: "int1"}


def bound(width: int, bits: int) -> float:
    """How many times smaller a row of float32 is in codes with a scale and a bias of 2 bytes each."""
    return 4 * width / ((width * bits + 7) // 8 + 4)


def measure(
    quick: bool = False,
    data: Path | None = None,
    seeds: int | None = None,
    passes: int | None = None,
    batch: int | None = None,
    study: Study | None = None,
    cache: Path = CACHE,
    say: Callable[[str], None] = print,
) -> claim.Rows:
    """A row for each training: its AUC on the test half, and the bytes of its tables."""
    study = (study or (QUICK if quick else STUDY)).given(data=data, seeds=seeds, passes=passes, batch=batch)
    return list(trainings(study, QUICK_MARGIN if quick else MARGIN, cache, say))


def trainings(study: Study, margin: float, cache: Path, say: Callable[[str], None]) -> Iterator[dict]:
    made = SentTrainings.of(study, cache, say)
    for seed in range(1, study.seeds + 1):
        for point, memory in POINTS.items():
            config = TrainConfig(
                embedding=EmbeddingConfig("full", memory=memory),
                optimizer=OptimizerConfig("adagrad", RATES["adagrad"]),
                batch=study.batch,
                epochs=study.passes,
                seed=seed,
                eval_every=made.steps_per_pass,
                checkpoint_every=made.steps_per_pass,
            )
            also = {"gradients": 8} if point == SENT else {}
            summary, log = made.trained(resolve(config), f"{point}, seed {seed}", **also)
            row = {"point": point, "seed": seed, "auc": log[-1]["auc"], "bytes": summary["embedding_bytes"]}
            yield row | {"margin": margin, "synthetic": bool(made.manifest.synthetic)}


class SentTrainings(Trainings):
    """With `gradients` the embedding takes its steps by gradients in INT8."""

    def made(self, config: TrainConfig, **also: Any) -> DLRM:
        model = super().made(config)
        update = model.embedding.update

        def sent(ids, d_vectors, rate):
            update(ids, in_int8(d_vectors), rate)

        if also:
            vars(model.embedding)["update"] = sent
        return model


def in_int8(gradients: np.ndarray) -> np.ndarray:
    """On a grid from the largest downwards to its negative, to the nearest of 255 levels."""
    scale = np.float32(abs(gradients).max() / 127)
    return np.rint(gradients / scale) * scale if scale > 0 else gradients


def final(rows: claim.Rows) -> dict[str, np.ndarray]:
    """Point -> AUC of its seeds (seeds,)."""
    return {point: np.array([row["auc"] for row in where(rows, point=point)]) for point in POINTS}


def no_less(differences: np.ndarray, margin: float) -> bool:
    mean, half = mean_interval(differences)
    return bool(mean - half > -margin)


def verdict(rows: claim.Rows) -> claim.Verdict:
    return claim.conclude(checks(rows))


def checks(rows: claim.Rows) -> Iterator[Check]:
    auc, margin = final(rows), rows[0]["margin"]
    for point in (INT4, SENT):
        differences = auc[point] - auc[FULL]
        found = "AUC {:+.4f} ± {:.4f}".format(*mean_interval(differences))
        yield Check(f"{point} loses less than {margin:g}", no_less(differences, margin), found)
    differences = auc[INT1] - auc[FULL]
    found = "AUC {:+.4f} ± {:.4f}".format(*mean_interval(differences))
    yield Check("rejected: one bit loses as little", not no_less(differences, margin), found)
    smaller = where(rows, point=FULL)[0]["bytes"] / where(rows, point=INT4)[0]["bytes"]
    theory, found = bound(WIDTH, 4), f"{smaller:.3f} times, of width {WIDTH}"
    yield Check(
        f"tables are 4 D / (D / 2 + 4) = {theory:.3f} times smaller", abs(smaller - theory) < 1e-9, found
    )
    yield Check(f"rejected: {SMALLER} times, whatever the width", abs(smaller - SMALLER) > 1, found)
    yield Check(
        f"{SMALLER} times, to 5%, from a width of 256 on",
        bound(256, 4) > 0.95 * SMALLER,
        f"{bound(256, 4):.2f}",
    )


def plot(rows: claim.Rows):
    figure, (quality, size) = claim.figure(1, 2, "Full tables in INT4, trained as they are stored (DQRM)")
    auc, margin = final(rows), rows[0]["margin"]
    points = [point for point in POINTS if point != FULL]
    for at, point in enumerate(points):
        differences = auc[point] - auc[FULL]
        mean, half = mean_interval(differences)
        quality.plot(np.full(differences.size, at), differences, ".", color="C7")
        quality.errorbar([at], [mean], [half], fmt="o", color="C0", capsize=4)
    quality.axhline(-margin, color="C3", linestyle="--", label=f"{margin:g} less")
    quality.set_xticks(range(len(points)), points)
    quality.legend(fontsize="small")
    source = "SYNTHETIC data" if rows[0]["synthetic"] else "real data"
    quality.set(ylabel="test AUC less that of fp32", title=f"{source}, {auc[FULL].size} seeds, 95%")
    widths = 2 ** np.arange(2, 11)
    size.plot(widths, [bound(int(width), 4) for width in widths], "C0", label="a scale and a bias a row")
    size.axhline(SMALLER, color="C3", linestyle="--", label="codes alone")
    smaller = where(rows, point=FULL)[0]["bytes"] / where(rows, point=INT4)[0]["bytes"]
    size.plot([WIDTH], [smaller], "ko", label="measured")
    size.set_xscale("log", base=2)
    size.set(xlabel="width D of a row", ylabel="times smaller than in float32", title="bytes")
    size.legend(fontsize="small")
    return figure


if __name__ == "__main__":
    claim.main(StudyOptions)
