"""What share of look-ups hits a cache of 32 ways to a set, for LFU and for LRU.

Claim. Rows are looked up independently, each with its own chance p_r, and hashed to sets of W = 32 lines
(robe/kernels/parts/cache.py). In a set whose chances sum to P, the share of look-ups that hit is

    LFU    (sum of the W - 1 largest p + sum of p^2 over the others / sum of p over the others) / P
    LRU    sum over r of p_r^2 / P * integral of exp(-p_r t) Prob(fewer than W others are seen in t) dt

LFU, once it has settled: the most frequent rows have been counted so often that they stay, and the last line
passes from one of the others to the next, since who leaves is forgotten and comes back with a count of one.
The other formula is that of Flajolet, Gardy and Thimonier (1992): a row is there if fewer than W others came
since its last look-up. Each is seen in the time t with 1 - exp(-p t), so their number is a sum of independent
yes and no. Both are exact. Che's approximation (2002) replaces that number by its mean: r is there with
1 - exp(-p_r T), T such that these sum to W. With W = 32 lines the number strays by some sqrt(W) from its
mean, to both sides alike, and what this does to a hit rate is of second order. Here Che's is off by less than
TOLERANCE, 0.0005, which the exact formula tells.

The hit rate is the mean over sets, weighed by P. Sets have a price: one set of as many lines would have more
hits, since some sets get more of the frequent rows than others. (Under LFU each also leaves one line to
whoever comes.)

Conditions: independent look-ups from a law that does not change. LFU from an empty cache need not settle as
said: the row used least leaves at once, whoever it is, so a frequent row may come back for long. Batches: a
hit is told by what was there before the batch, which is the same in the mean; those of LRU are judged here
too. Of LFU they must be small against the sets: where two rows that a set lacks come in one batch, the second
displaces a frequent row that the batch did not touch.

Measured: the counters of `sort_rows` and `admit`, the kernels that models run, on Zipf-distributed rows.

    python analysis/cache_hits.py [--quick] [--seed N] [--out DIR]
"""

from collections.abc import Iterator

import numpy as np
from numba import njit
from scipy.optimize import brentq

from analysis import claim
from analysis.claim import RIGHT, WRONG, Check, where
from analysis.sample_tables import zipf_rows
from robe.backend import select
from robe.kernels.admit import COUNTED
from robe.kernels.parts.cache import EMPTY, WAYS, hash_row, set_of

MOST = 4_000_000  # look-ups of a trace
PARTS = 40  # of a trace, whose means give the interval
SETTLED = 2**31  # look-ups of a row that stays
TOLERANCE = 0.0005
# What each policy must not be taken for.
WRONG_THEORIES = (
    ("LFU", "LRU"),
    ("LFU", "one way"),
    ("LRU", "LFU"),
    ("LRU", "top lines"),
    ("LRU", "one way"),
)


def law_of(rows: int, alpha: float) -> np.ndarray:
    """Chances (R,) of the rows, the most frequent first."""
    law = zipf_rows(rows, alpha)
    return law / law.sum()


def sets_of(rows: int, sets: int) -> list[np.ndarray]:
    """The rows of each set, in rising order."""
    of = set_of_rows(rows, sets)
    return [np.flatnonzero(of == s) for s in range(sets)]


def set_of_rows(rows: int, sets: int) -> np.ndarray:
    return set_of(hash_row(np.arange(rows, dtype=np.uint64)), sets)


def lfu(p: np.ndarray, ways: int) -> float:
    """Hits per look-up of anything, in a set of rows with the chances p (n,), falling."""
    kept, others = p[: ways - 1], p[ways - 1 :]
    return float(kept.sum() + (others @ others / others.sum() if others.size else 0))


def lru(p: np.ndarray, ways: int) -> float:
    """The same, to 1e-6: the integral by the trapezoidal rule in log t, in which it is smooth and vanishes at
    both ends."""
    if len(p) <= ways:
        return float(p.sum())
    rate = p / p.sum()
    t = np.exp(np.arange(np.log(1e-5), np.log(100 * characteristic_time(rate, ways)), 0.1))
    return float(p.sum() * 0.1 * (t * fewer_seen(rate, t, ways)).sum())


def che(p: np.ndarray, ways: int) -> float:
    if len(p) <= ways:
        return float(p.sum())
    return float(-p @ np.expm1(-p * characteristic_time(p, ways)))


def characteristic_time(p: np.ndarray, ways: int) -> float:
    """Until so many different rows have been seen, on average."""
    return brentq(lambda t: -np.expm1(-p * t).sum() - ways, 0, 1e3 * len(p) / p.min(), xtol=1e-9)


@njit(cache=True)
def fewer_seen(rate, times, ways):
    """For each t: the sum over r of rate_r^2 exp(-rate_r t) Prob(fewer than `ways` others are seen in t)."""
    n, found = len(rate), np.zeros(len(times))
    before = np.zeros((n + 1, ways))  # chances of 0, 1, ... seen among the first r
    for k, t in enumerate(times):
        before[0, 0] = 1
        for r in range(n):
            seen = -np.expm1(-rate[r] * t)
            before[r + 1, 0] = before[r, 0] * (1 - seen)
            for c in range(1, ways):
                before[r + 1, c] = before[r, c] * (1 - seen) + before[r, c - 1] * seen
        at_most = np.ones(ways)  # chances of at most 0, 1, ... among those behind r
        for r in range(n - 1, -1, -1):
            chance = 0.0
            for c in range(ways):
                chance += before[r, c] * at_most[ways - 1 - c]
            seen = -np.expm1(-rate[r] * t)
            found[k] += rate[r] ** 2 * (1 - seen) * chance
            for c in range(ways - 1, 0, -1):
                at_most[c] = at_most[c] * (1 - seen) + at_most[c - 1] * seen
            at_most[0] *= 1 - seen
    return found


def bound(p: np.ndarray, sets: int) -> dict[str, float]:
    """Hit rates by theory: of both policies, of what they must not be taken for, and without sets."""
    members = sets_of(len(p), sets)
    lines = sets * WAYS

    def by_set(rate):
        return sum(rate(p[rows], WAYS) for rows in members)

    return {
        "LFU": by_set(lfu),
        "LRU": by_set(lru),
        "Che": by_set(che),
        "top lines": float(p[:lines].sum()),
        "one way": sum(lfu(p[rows], 1) for rows in sets_of(len(p), lines) if len(rows)),
        "LFU, one set": lfu(p, lines),
        "LRU, one set": che(p, lines),
    }


class Cache:
    """A cache of rows without their values: the kernels that models run, look-up by look-up or in batches."""

    def __init__(self, sets: int, policy: str):
        self.kernels, self.policy, self.step = select("cpu").kernels, policy, 0
        self.tags, self.used = np.full((sets, WAYS), EMPTY), np.zeros((sets, WAYS), np.uint32)

    def settle(self, p: np.ndarray, rng: np.random.Generator) -> None:
        """Where LFU ends: the most frequent rows, and some other in the last line."""
        for s, rows in enumerate(sets_of(len(p), len(self.tags))):
            stay, others = rows[: WAYS - 1], rows[WAYS - 1 :]
            self.tags[s, : len(stay)], self.used[s, : len(stay)] = stay, SETTLED
            if len(others):
                self.tags[s, -1], self.used[s, -1] = rng.choice(others, p=p[others] / p[others].sum()), 1

    def hits(self, batches: np.ndarray) -> int:
        """Of all look-ups; batches (N, B) of rows, each brought into the cache."""
        base, counters = np.zeros(1, np.uint64), np.zeros((1, len(COUNTED)), np.int64)
        keys, order = np.empty((2, batches.shape[1]), np.uint32)
        line, before = np.empty((2, batches.shape[1]), np.int64)
        state = (self.tags, self.used, counters, line, before)
        for ids in batches.astype(np.uint32)[:, :, None]:
            self.step += 1
            self.kernels.sort_rows(ids, base, keys, order)
            self.kernels.admit(keys, order, ids, base, self.policy == "LFU", self.step, *state)
        return int(counters[0, COUNTED.index("hits")])


def measure(quick: bool = False, seed: int = 0) -> claim.Rows:
    """A row is a trace: what was measured, and what theory says (columns as in `bound`)."""
    rows, alphas = (2000, (0.8, 1.2)) if quick else (20_000, (0.8, 1.05, 1.2))
    sizes, look_ups, steps = ((2, 16), 15_000, 24_000) if quick else ((4, 16, 64, 256), 100_000, 25_000)
    found = []
    for alpha in alphas:
        p = law_of(rows, alpha)
        for sets in sizes:
            theory = bound(p, sets)
            traces = [("LFU", 1, look_ups, "settled"), ("LRU", 1, look_ups, "warm")]
            batches = [("LRU", 4 * sets, "warm")]
            if sets == sizes[len(sizes) // 2]:
                traces.append(("LFU", 1, look_ups, "empty"))
                several = (4, 4 * sets) if quick else (4, 16, 64, 4 * sets)
                batches += [("LFU", batch, "settled") for batch in several]
                batches += [("LRU", batch, "warm") for batch in several]
            traces += [
                (policy, batch, min(steps * batch, MOST), start)
                for policy, batch, start in dict.fromkeys(batches)
            ]
            for policy, batch, count, start in traces:
                rng = np.random.default_rng([seed, len(found)])
                parts = hit_rates(p, sets, policy, batch, count, start, rng)
                row = {"alpha": alpha, "rows": rows, "sets": sets, "share": sets * WAYS / rows}
                row |= {"policy": policy, "batch": batch, "start": start, "look_ups": count}
                row["measured"], row["half_interval"] = claim.mean_interval(parts)
                row["error"] = float(parts.std() / np.sqrt(PARTS))
                found.append(row | theory)
    return found


def hit_rates(p, sets: int, policy: str, batch: int, look_ups: int, start: str, rng) -> np.ndarray:
    """Of each part (PARTS,) of so many look-ups, after those that the cache starts with.

    start: settled; warm, after five times what LRU remembers; or empty, after as many look-ups again.
    """
    cache, law = Cache(sets, policy), np.cumsum(p)

    def draw(count: int, batch: int) -> np.ndarray:
        # Above the last sum, which is 1 but for rounding, comes the last row.
        return np.minimum(np.searchsorted(law, rng.random((count // batch, batch)), "right"), len(p) - 1)

    if start == "settled":
        cache.settle(p, rng)
    elif start == "warm":
        cache.hits(draw(int(5 * characteristic_time(p, sets * WAYS)), sets))
    else:
        cache.hits(draw(look_ups, batch))
    each = look_ups // PARTS // batch * batch
    return np.array([cache.hits(draw(each, batch)) for _ in range(PARTS)]) / each


def z_of(row: dict, theory: str) -> float:
    return (row["measured"] - row[theory]) / row["error"]


def verdict(rows: claim.Rows) -> claim.Verdict:
    return claim.conclude(checks(rows))


def checks(rows: claim.Rows) -> Iterator[Check]:
    singly = [row for row in where(rows, batch=1) if row["start"] != "empty"]
    together = [row for row in where(rows, policy="LRU") if row["batch"] > 1]
    for name, chosen in (("look-up by look-up", singly), ("in batches", together)):
        for policy in dict.fromkeys(row["policy"] for row in chosen):
            some = where(chosen, policy=policy)
            worst = max(abs(z_of(row, policy)) for row in some)
            what = f"{policy} {name}, {len(some)} traces, |z| < {RIGHT:g}"
            yield Check(what, worst < RIGHT, f"worst {worst:.2f}")
    worst = max(abs(row["Che"] - row["LRU"]) for row in rows)
    yield Check(f"Che's approximation is off by less than {TOLERANCE:g}", worst < TOLERANCE, f"{worst:.2g}")
    for policy, wrong in WRONG_THEORIES:
        least = min(abs(z_of(row, wrong)) for row in where(singly, policy=policy))
        yield Check(f"rejected: {policy} hits as {wrong}", least > WRONG, f"|z| at least {least:.0f}")
    # The price is a few thousandths; all traces together know it well enough.
    weights = np.array([row["error"] ** -2 for row in together])
    z = weights @ [row["measured"] - row["LRU, one set"] for row in together] / np.sqrt(weights.sum())
    yield Check("rejected: 32 lines a set cost LRU nothing", z < -WRONG, f"z of all traces {z:.1f}")
    empty = where(rows, start="empty")
    z = max(z_of(row, "LFU") for row in empty)
    yield Check("LFU from an empty cache has not settled", z < -WRONG, f"z at most {z:.0f}")
    crowded = [row for row in where(rows, policy="LFU") if row["batch"] == 4 * row["sets"]]
    z = max(z_of(row, "LFU") for row in crowded)
    yield Check("LFU in batches of 4 look-ups a set does not stay so", z < -WRONG, f"z at most {z:.0f}")


def plot(rows: claim.Rows):
    figure, (by_size, by_batch) = claim.figure(1, 2, "Hit rates of a cache of 32 ways, Zipf-distributed rows")
    alphas = list(dict.fromkeys(row["alpha"] for row in rows))
    for i, alpha in enumerate(alphas):
        here = [row for row in where(rows, alpha=alpha, batch=1) if row["start"] != "empty"]
        by_size.plot([], [], f"C{i}", label=f"alpha = {alpha:g}")
        for policy, style in (("LFU", "-"), ("LRU", ":")):
            some = where(here, policy=policy)
            share = [row["share"] for row in some]
            by_size.plot(share, [row[policy] for row in some], f"C{i}{style}")
            draw_points(by_size, share, some, f"C{i}", "o" if policy == "LFU" else "s")
        by_size.plot(share, [row["top lines"] for row in some], "k--", linewidth=0.8)
    for style, label in (("ko-", "LFU"), ("ks:", "LRU"), ("k--", "the most frequent rows")):
        by_size.plot([], [], style, markersize=4, linewidth=0.8, label=label)
    by_size.set(xscale="log", xlabel="lines, as a share of all rows", ylabel="share of look-ups that hit")
    by_size.set(title="lines: theory; points: the kernels, 95%", ylim=(0, 1))
    by_size.legend(fontsize="small", ncols=2, loc="lower right")
    claim.ticks(by_size, share)
    by_size.set_xticklabels([f"{value:.1%}" for value in sorted(share)])

    alpha = alphas[len(alphas) // 2]
    here = where(rows, alpha=alpha, sets=where(rows, start="empty")[0]["sets"])
    for policy, color, marker in (("LFU", "C0", "o"), ("LRU", "C1", "s")):
        some = sorted(
            (row for row in where(here, policy=policy) if row["start"] != "empty"), key=lambda r: r["batch"]
        )
        by_batch.axhline(some[0][policy], color=color, label=f"{policy}, theory")
        draw_points(by_batch, [row["batch"] for row in some], some, color, marker)
    empty = where(here, start="empty")
    by_batch.errorbar(
        [1],
        [empty[0]["measured"]],
        [empty[0]["half_interval"]],
        color="C0",
        fmt="o",
        mfc="white",
        capsize=3,
        label=f"LFU from empty, after {empty[0]['look_ups']:,}",
    )
    by_batch.set(xscale="log", xlabel="look-ups of a batch", ylabel="share of look-ups that hit")
    by_batch.set_title(f"batches, alpha = {alpha:g}, {here[0]['sets']} sets")
    claim.ticks(by_batch, [row["batch"] for row in here])
    by_batch.legend(fontsize="small")
    return figure


def draw_points(axes, x, rows: claim.Rows, color: str, marker: str) -> None:
    values, half = ([row[name] for row in rows] for name in ("measured", "half_interval"))
    axes.errorbar(x, values, half, color=color, fmt=marker, markersize=4, capsize=3)


if __name__ == "__main__":
    claim.main()
