"""What share of look-ups the rows of hot ids serve, while the hot ids change.

Claim. A sketch of few buckets, HOT of WAYS in each set with a row (robe/kernels/space_saving.py), finds the
ids that are looked up most and goes with them when they change:

1. settled: rows serve at least SETTLED of the look-ups that they could, were they given to the ids that are
   most frequent at the moment.
2. abrupt: when the most frequent ids become others, all at once, the share falls, and LIVES - 1 half-lives
   later rows serve as much as before.
3. gradual: while some frequent ids are replaced in each batch, rows serve DRIFTING of what they could.
4. Rows of the ids that were most frequent at first do not (as a dictionary would give them), and nor does,
   after the abrupt change, a sketch that never halves: new ids must first be seen as often as the old ones.

Theory: the best that R rows can serve is the sum of the R largest chances. Sets have a price: each has HOT
rows, though some sets get more of the frequent ids; `best in sets` tells it. An importance that space saving
notes is too high by at most what its set has seen, halved with time, over the number of its candidates; so an
id whose chance is well above that is not mistaken.

Conditions: look-ups are independent, from a Zipf law over ids; importance is a count. Measured: the share of
the look-ups of each batch that have a row before the batch, by the kernels that models run.

    python analysis/hot_drift.py [--quick] [--seed N] [--out DIR]
"""

from collections.abc import Iterator

import numpy as np

from analysis import claim
from analysis.claim import Check, where
from analysis.sample_tables import zipf_rows
from robe.backend import select
from robe.kernels.parts.cache import hash_token, set_of
from robe.kernels.parts.codes import NO_ROW
from robe.kernels.space_saving import EMPTY, HOT, WAYS

BATCH, ALPHA, HALF_LIFE = 1024, 1.05, 40  # look-ups; of the law; batches
LIVES, WINDOW = 5, 5  # half-lives until all has settled; batches of a point
SETTLED, DRIFTING, FALLEN = 0.9, 0.85, 0.75
SKETCH, NEVER, FIRST = "sketch", "never halved", "ids of the beginning"


class Sketch:
    """Which ids have a row, by the kernels that models run."""

    def __init__(self, sets: int, half_life: int):
        self.kernels, self.half_life, self.batches = select("cpu").kernels, half_life, 0
        self.tags, self.importance = np.full((sets, WAYS), EMPTY), np.zeros((sets, WAYS), np.float32)
        self.halved, self.base = np.zeros(sets, np.uint32), np.zeros(1, np.uint64)
        self.scale = np.ones(1, np.float32)

    def served(self, ids: np.ndarray) -> float:
        """The share of the look-ups (B, 1) of a batch that have a row; the sketch takes note of them."""
        rows, (keys, order) = np.empty_like(ids), np.empty((2, ids.size), np.uint32)
        self.kernels.hot_rows(ids, self.base, self.tags, rows)
        self.kernels.sort_rows(ids, self.base, keys, order)
        moved = np.empty(ids.size, np.int64)
        nothing, period = np.zeros((*ids.shape, 1), np.float32), np.uint32(self.batches // self.half_life)
        batch = keys, order, ids, self.base, nothing, self.scale, True, period
        self.kernels.space_saving(*batch, self.tags, self.importance, self.halved, moved)
        self.batches += 1
        return float((rows != NO_ROW).mean())


def best(p: np.ndarray, ids: np.ndarray, sets: int) -> tuple[float, float]:
    """What sets * HOT rows can serve at most, of ids (N,) with falling chances p (N,): in all, in sets."""
    of = set_of(hash_token(ids.astype(np.uint64)), sets)
    order = np.argsort(of, kind="stable")
    rank = np.empty(len(p), np.int64)  # of an id in its set
    rank[order] = np.arange(len(p)) - np.searchsorted(of[order], of[order])
    return float(p[: sets * HOT].sum()), float(p[rank < HOT].sum())


def change(ids: np.ndarray, ranks: np.ndarray, rng) -> None:
    """Have ids of other ranks take these ranks."""
    others = rng.choice(np.arange(len(ids) // 2, len(ids)), len(ranks), replace=False)
    ids[ranks], ids[others] = ids[others], ids[ranks]


def measure(quick: bool = False, seed: int = 0) -> claim.Rows:
    """A row is a window of batches of a stream: what was served, and the best that could be."""
    sets, number = (16, 20_000) if quick else (128, 200_000)
    p = zipf_rows(number, ALPHA)
    p, rows, settled = p / p.sum(), sets * HOT, LIVES * HALF_LIFE
    law, found = np.cumsum(p), []
    for drift in ("abrupt", "gradual"):
        rng = np.random.default_rng([seed, len(found)])
        ids = np.unique(rng.integers(0, 2**32, 2 * number, dtype=np.uint32))
        ids = rng.permutation(ids)[:number]
        sketches = {SKETCH: Sketch(sets, HALF_LIFE), NEVER: Sketch(sets, 2**31)}
        first = ids[:rows].copy()
        for window in range(3 * settled // WINDOW):
            shares = dict.fromkeys((*sketches, FIRST), 0.0)
            for _ in range(WINDOW):
                drawn = ids[np.minimum(np.searchsorted(law, rng.random(BATCH)), number - 1)][:, None]
                for name, sketch in sketches.items():
                    shares[name] += sketch.served(drawn) / WINDOW
                shares[FIRST] += float(np.isin(drawn, first).mean()) / WINDOW
                if drift == "gradual":
                    change(ids, rng.choice(2 * rows, max(1, rows // 200), replace=False), rng)
            limit, in_sets = best(p, ids, sets)
            if drift == "abrupt" and (window + 1) * WINDOW == 2 * settled:
                change(ids, np.arange(2 * rows), rng)
            at = {"drift": drift, "half_lives": (window + 1) * WINDOW / HALF_LIFE}
            found += [
                at | {"of": name, "served": share, "best": limit, "best in sets": in_sets}
                for name, share in shares.items()
            ]
    return found


def of_best(rows: claim.Rows, first: float, last: float, **which) -> float:
    """Of the best, what was served from one half-life to another, on average."""
    some = [row for row in where(rows, **which) if first < row["half_lives"] <= last]
    return float(np.mean([row["served"] / row["best"] for row in some]))


def verdict(rows: claim.Rows) -> claim.Verdict:
    return claim.conclude(checks(rows))


def checks(rows: claim.Rows) -> Iterator[Check]:
    change, end = 2 * LIVES, 3 * LIVES
    abrupt, gradual = {"drift": "abrupt"}, {"drift": "gradual"}
    before = of_best(rows, LIVES, change, of=SKETCH, **abrupt)
    yield Check(f"settled: {SETTLED:.0%} of the best", before > SETTLED, f"{before:.1%}")
    fallen = of_best(rows, change, change + WINDOW / HALF_LIFE, of=SKETCH, **abrupt)
    yield Check(f"a change is felt: below {FALLEN:.0%}", fallen < FALLEN, f"{fallen:.1%}")
    after = of_best(rows, end - 1, end, of=SKETCH, **abrupt)
    yield Check(f"{LIVES - 1} half-lives later as before", after > before - 0.02, f"{after:.1%}")
    during = of_best(rows, LIVES, end, of=SKETCH, **gradual)
    yield Check(f"gradual: {DRIFTING:.0%} of the best", during > DRIFTING, f"{during:.1%}")
    least = min(row["best in sets"] / row["best"] for row in rows)
    yield Check("sets cost less than a tenth", least > 0.9, f"{least:.1%} of the best can be had")
    above = max(row["served"] - row["best"] for row in rows)
    yield Check("rows serve no more than the best", above < 0.05, f"{above:+.3f} at most")
    for name, how, first in ((FIRST, abrupt, end - 1), (FIRST, gradual, end - 1), (NEVER, abrupt, change)):
        other = of_best(rows, first, end, of=name, **how)
        own = of_best(rows, first, end, of=SKETCH, **how)
        what = f"rejected: {name} would do ({how['drift']})"
        yield Check(what, other < own - 0.05, f"{other:.1%} of the best, sketch {own:.1%}")


def plot(rows: claim.Rows):
    figure, axes = claim.figure(1, 2, f"Look-ups served by rows of hot ids, half-life {HALF_LIFE} batches")
    for axis, drift in zip(axes, ("abrupt", "gradual"), strict=True):
        for name, style in ((SKETCH, "C0-"), (NEVER, "C1--"), (FIRST, "C2:")):
            some = where(rows, drift=drift, of=name)
            axis.plot([row["half_lives"] for row in some], [row["served"] for row in some], style, label=name)
        for name, style in (("best", "k-"), ("best in sets", "k:")):
            axis.plot(
                [r["half_lives"] for r in some], [r[name] for r in some], style, linewidth=0.8, label=name
            )
        axis.set(xlabel="half-lives", ylabel="share of look-ups", ylim=(0, 1), title=f"{drift} change")
        axis.legend(fontsize="small", loc="lower left")
    return figure


if __name__ == "__main__":
    claim.main()
