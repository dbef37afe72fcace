"""What (1 +- eps) statements hold for a hashed table, and what they do not say.

Claims (our derivation; L = ln(2n / delta), rho = sum of |x_b|^4 / |x|^4 over blocks, nu = max |x_i| / |x|),
for one hash with element signs and circular blocks unless said otherwise:

1. Norms. |phi(x)|^2 is off by more than eps |x|^2 with probability 2 (1 - rho) / (M eps^2) at most
   (Chebyshev). M = 2 / (eps^2 delta) therefore suffices for any x, and half of it does not: the largest k
   below 2 / eps equal elements in different blocks fail as often as k people share one of M birthdays, about
   1 - exp(-k (k - 1) / 2M). Blocks do not help them.
2. Flat vectors need only M = 2 z^2 / eps^2, z the normal quantile of 1 - delta / 2: logarithmic in 1 / delta.
   This is the central limit theorem, not a bound.
3. k averaged copies of M / k slots leave the variance as it is and thin the tail, but few copies can make it
   worse: for two equal elements the failures follow a binomial law. N basis vectors in the M of the dense
   random projection (Achlioptas) fail with one hash as birthdays do; 16 copies, and the dense projection, do
   not.
4. Recovery. Each element read back is right on average, with variance (|x|^2 - |x_b|^2) / M, b its own block.
   With probability 1 - delta all of them are within L nu / 3 + sqrt((L nu / 3)^2 + 2 L / M) of the truth,
   times |x| (Bernstein): flat tables of n elements are recovered within eps |x| in M = 4 L / eps^2 slots if
   nu is at most 3 eps / 4 L. That is what "exponentially fewer parameters" can mean here. A heavy element
   breaks it.
5. Recovered rows. Inner products of different rows are right but for a factor 1 + 1/M at most; squared norms
   carry the sum of their elements' variances, and distances that of both rows.

What they do not say. Such errors are relative to |x|, the whole table: for an error of eta times a typical
element, M = n / eta^2, which is no compression. Measured beside the bounds:

6. The table read back has the squared error (n - Z) / M relative to |x|^2, worse than all zeros where that is
   more than 1.
7. The best table that sharing can represent still misses 1 - M occ / n of the energy of independent elements,
   occ = 1 - (1 - Z / M)^(n / Z).
8. A sketched random linear model keeps its sign with probability 1 - arctan(sqrt(n / M)) / pi, to leading
   order.

So sharing by a thousand must rest on training in the shared space, or on tables that are far from flat; it
does not follow from approximating a given table. The last rows tell how far a trained table is from these
regimes; they are a description, without a verdict.

    python analysis/approximation_bounds.py [--quick] [--seed N] [--out DIR] [--run RUN]
"""

from collections.abc import Iterator
from itertools import combinations
from math import ceil, log, pi, sqrt
from pathlib import Path

import numpy as np
from scipy import stats

from analysis import claim
from analysis.claim import RIGHT, WRONG, Check, where
from analysis.hash_variance import bound as variance_bound
from analysis.sample_tables import WIDTH, trained_table, zipf_rows
from analysis.sketch import as_blocks, chunks, draw, project, recover, trials
from robe.kernels.parts.hashing import slot_map, slots_reference

LEVEL = 0.999  # of the intervals that verdicts rest on; those drawn are of 95%
DELTA = 0.05


def bound(eps: float, memory: float, rho: float = 0.0) -> float:
    """Chebyshev: how often the norm may be off by more than eps."""
    return min(1.0, 2 * (1 - rho) / (memory * eps**2))


def enough_for_any(eps: float, delta: float) -> int:
    return ceil(2 / (eps**2 * delta))


def enough_for_flat(eps: float, delta: float) -> int:
    return ceil(2 * stats.norm.ppf(1 - delta / 2) ** 2 / eps**2)


def enough_for_dense(points: int, eps: float, delta: float) -> int:
    """Achlioptas: all pairs of points, by a dense matrix of random signs."""
    return ceil(2 * log(points * (points - 1) / delta) / (eps**2 / 2 - eps**3 / 3))


def birthday(people: int, days: float) -> float:
    return 1 - float(np.prod(1 - np.arange(people) / days))


def copies_failure(copies: int, memory: int, eps: float) -> float:
    """Two equal elements, averaged copies: the copies where they meet add signs, and few meet."""
    met = np.arange(copies + 1)
    # With c meetings the sum of signs exceeds s in size with probability P(|2 Bin(c, 1/2) - c| > s).
    most = eps * copies
    beyond = [
        sum(stats.binom.pmf(up, c, 0.5) for up in range(c + 1) if abs(2 * up - c) > most * (1 + 1e-12))
        for c in met
    ]
    return float(stats.binom.pmf(met, copies, copies / memory) @ beyond)


def recovery_error(n: int, memory: int, flatness: float, delta: float = DELTA) -> float:
    """What the largest error of n recovered elements stays below, relative to |x|."""
    logarithm = log(2 * n / delta)
    linear = logarithm * flatness / 3
    return linear + sqrt(linear**2 + 2 * logarithm / memory)


def recovery_variance(x: np.ndarray, block: int, memory: int) -> np.ndarray:
    """Variance (n,) of each recovered element."""
    energy = (as_blocks(x, block) ** 2).sum(axis=1)
    return (energy.sum() - energy[np.arange(x.size) // block]) / memory


def best_residual(n: int, block: int, memory: int) -> float:
    occupied = 1 - (1 - block / memory) ** (n / block)
    return 1 - memory * occupied / n


def sign_kept(n: int, memory: int) -> float:
    return 1 - np.arctan(sqrt(n / memory)) / pi


def measure(quick: bool = False, seed: int = 0, run: Path | None = None) -> claim.Rows:
    """Rows by `part`; what is a probability has its `hits` and `trials`, what is a mean its z."""
    return [
        *worst_vector(quick, seed),
        *flat_vector(quick, seed),
        *averaged_copies(quick, seed),
        *many_points(quick, seed),
        *largest_error(quick, seed),
        *recovered_elements(quick, seed),
        *no_approximation(quick, seed),
        *regimes(run, seed),
    ]


def share(part: str, hits, **columns) -> dict:
    """A row for a measured probability, of the hits (trials,)."""
    low, high = claim.share_interval(int(hits.sum()), hits.size)
    found = {
        "measured": float(hits.mean()),
        "low": low,
        "high": high,
        "hits": int(hits.sum()),
        "trials": hits.size,
    }
    return {"part": part, **columns, **found}


def average(part: str, samples, formula: float, **columns) -> dict:
    """A row for a measured mean."""
    mean, half = claim.mean_interval(samples)
    found = {"measured": mean, "low": mean - half, "high": mean + half, "z": claim.z_mean(samples, formula)}
    return {"part": part, "formula": formula, **columns, **found}


def slots_apart(
    count: int, elements: int, block: int, memory: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Slots and signs (count, elements) of elements in blocks of their own, other ones in every trial."""
    tokens = block * np.arange(count * elements, dtype=np.uint64).reshape(count, elements)
    slots, signs = slots_reference(slot_map("mix", 1, block, memory, seed), tokens)
    return slots[..., 0], signs[..., 0]


def worst_vector(quick: bool, seed: int) -> Iterator[dict]:
    count = 200_000
    for eps in (0.2,) if quick else (0.2, 0.1):
        k = ceil(2 / eps) - 1
        for delta in (0.05, 0.01):
            for factor in (0.25, 0.5, 1, 2):
                memory = round(factor * enough_for_any(eps, delta))
                for block in (1, 16):
                    slots, signs = slots_apart(count, k, block, memory, seed)
                    off = np.zeros(count)
                    for i, j in combinations(range(k), 2):
                        off += (slots[:, i] == slots[:, j]) * signs[:, i] * signs[:, j] * (2 / k)
                    columns = {"eps": eps, "delta": delta, "factor": factor, "memory": memory, "block": block}
                    columns |= {"bound": bound(eps, memory, 1 / k), "formula": birthday(k, memory)}
                    yield share("worst vector", np.abs(off) > eps * (1 + 1e-12), **columns)


def flat_vector(quick: bool, seed: int) -> Iterator[dict]:
    n, count, eps = (2000, 3000, 0.2) if quick else (4000, 20_000, 0.2)
    for delta in (0.05,) if quick else (0.05, 0.01):
        for factor in (0.5, 1):
            memory = round(factor * enough_for_flat(eps, delta))
            for block in (16,) if quick else (1, 16, 64):
                off = []
                for seeds in chunks(trials(seed, count, 2, block, memory), n):
                    slots, signs = draw(seeds, n, block, memory)
                    off.append((project(signs, slots, memory) ** 2).sum(axis=1) / n - 1)
                columns = {"eps": eps, "delta": delta, "factor": factor, "memory": memory, "block": block}
                hits = np.abs(np.concatenate(off)) > eps
                yield share("flat vector", hits, **columns, bound=bound(eps, memory, block / n))


def averaged_copies(quick: bool, seed: int) -> Iterator[dict]:
    count, memory, eps = 50_000 if quick else 400_000, 416, 0.2
    for copies in (1, 2, 4, 8, 16, 32):
        slots, signs = slots_apart(count, 2 * copies, 1, memory // copies, seed)
        met = (slots[:, ::2] == slots[:, 1::2]) * signs[:, ::2] * signs[:, 1::2]
        hits = np.abs(met.sum(axis=1)) > eps * copies * (1 + 1e-12)
        columns = {"copies": copies, "memory": memory, "eps": eps}
        yield share("averaged copies", hits, **columns, formula=copies_failure(copies, memory, eps))


def many_points(quick: bool, seed: int) -> Iterator[dict]:
    """All distances of N basis vectors: |phi(e_i) - phi(e_j)|^2 = 2 - 2 <phi(e_i), phi(e_j)>."""
    rng, count, eps, delta = np.random.default_rng([seed, 4]), 400, 0.5, 0.1
    for points in (8, 32) if quick else (8, 32, 128):
        memory, upper = enough_for_dense(points, eps, delta), np.triu_indices(points, 1)
        columns = {"points": points, "memory": memory, "eps": eps, "delta": delta}
        for copies in (1, 16):
            slots, signs = slots_apart(count, points * copies, 1, memory // copies, seed)
            slots, signs = (a.reshape(count, copies, points) for a in (slots, signs))
            inner = np.zeros((count, upper[0].size))
            for c in range(copies):
                one, other = ((slots[:, c, k], signs[:, c, k]) for k in upper)
                inner += (one[0] == other[0]) * one[1] * other[1] / copies
            formula = birthday(points, memory) if copies == 1 else None
            hits = (np.abs(inner) > eps).any(axis=1)
            yield share("many points", hits, **columns, method=f"hash, {copies} copies", formula=formula)
        hits = []
        for _ in range(count):
            dense = rng.choice((-1.0, 1.0), (points, memory))
            hits.append((np.abs((dense @ dense.T)[upper]) > eps * memory).any())
        yield share("many points", np.array(hits), **columns, method="dense", formula=None)


def largest_error(quick: bool, seed: int) -> Iterator[dict]:
    n, count, block = (4096, 100, 16) if quick else (20_000, 300, 16)
    rng = np.random.default_rng([seed, 5])
    flat = np.ones(n)
    heavy = flat.copy()
    heavy[n // 2] = 0.5 * sqrt(n)
    for vector, x in (("flat", flat), ("gauss", rng.normal(size=n)), ("one heavy element", heavy)):
        x = x / np.linalg.norm(x)
        for memory in (500, 1000, 2000, 4000):
            worst = []
            for seeds in chunks(trials(seed, count, 5, memory), n):
                slots, signs = draw(seeds, n, block, memory)
                read = recover(project(signs * x, slots, memory), slots, signs)
                worst.append(np.abs(read - x).max(axis=1))
            worst = np.concatenate(worst)
            flatness, if_flat = float(np.abs(x).max()), 2 * sqrt(log(2 * n / DELTA) / memory)
            yield {
                "part": "largest error",
                "vector": vector,
                "n": n,
                "memory": memory,
                "block": block,
                "flatness": flatness,
                "delta": DELTA,
                "bound": recovery_error(n, memory, flatness),
                "bound_if_flat": if_flat,
                "flat_enough": flatness <= 3 * if_flat / (4 * log(2 * n / DELTA)),
                "measured": float(np.median(worst)),
                "low": float(np.quantile(worst, 0.05)),
                "high": float(np.quantile(worst, 1 - DELTA)),
                "trials": worst.size,
            }


def recovered_elements(quick: bool, seed: int) -> Iterator[dict]:
    """Elements, and rows of WIDTH, of a gaussian table and one of Zipf-distributed rows."""
    n, memory, count = 1024, 256, 2500 if quick else 20_000
    rng = np.random.default_rng([seed, 6])
    gauss = rng.normal(0.5, 1, n)
    tables = {"gauss": gauss, "zipf": gauss * np.repeat(zipf_rows(n // WIDTH), WIDTH)}
    for vector, x in tables.items():
        for block in (1, 16) if quick else (1, 7, 16, 64):
            kept: dict[str, list] = {}
            rows = x.reshape(-1, WIDTH)
            u, v = 0, len(rows) - 1
            for seeds in chunks(trials(seed, count, 6, block), n):
                slots, signs = draw(seeds, n, block, memory)
                read = recover(project(signs * x, slots, memory), slots, signs)
                table = read.reshape(-1, *rows.shape)
                samples = {
                    "element": read[:, 0],
                    "norm": (table[:, u] ** 2).sum(axis=1),
                    "inner product": (table[:, u] * table[:, v]).sum(axis=1),
                    "distance": ((table[:, u] - table[:, v]) ** 2).sum(axis=1),
                }
                for name, values in samples.items():
                    kept.setdefault(name, []).append(values)
            kept = {name: np.concatenate(values) for name, values in kept.items()}
            noise = recovery_variance(x, block, memory)
            noise_u, noise_v = (noise.reshape(rows.shape)[row].sum() for row in (u, v))
            inner = rows[u] @ rows[v]
            formulas = {
                "element": x[0],
                "norm": rows[u] @ rows[u] + noise_u,
                "inner product": inner * (1 + 1 / memory),
                "distance": ((rows[u] - rows[v]) ** 2).sum() + noise_u + noise_v - 2 / memory * inner,
            }
            columns = {"vector": vector, "block": block, "memory": memory, "n": n}
            for name, formula in formulas.items():
                yield average("recovered", kept[name], formula, what=f"{name}, mean", right=True, **columns)
            squares = (kept["element"] - x[0]) ** 2
            columns |= {"what": "element, variance"}
            yield average("recovered", squares, noise[0], right=True, **columns)
            if vector == "zipf" and block == 16:
                whole = x @ x / memory
                yield average("recovered", squares, whole, right=False, wrong="own block counted", **columns)
                columns |= {"what": "norm, mean", "wrong": "noise of rows forgotten"}
                yield average("recovered", kept["norm"], rows[u] @ rows[u], right=False, **columns)


def no_approximation(quick: bool, seed: int) -> Iterator[dict]:
    n, block, count = 4096, 16, 200 if quick else 2000
    rng = np.random.default_rng([seed, 7])
    few = ceil(4 * log(2 * n / DELTA) / 0.5**2)  # what recovers this table within |x| / 2
    for memory in (40, 128, few, 410, 1024, 4096, 40_960):
        found: dict[str, list] = {}
        for seeds in chunks(trials(seed, count, 7, memory), max(n, memory)):
            slots, signs = draw(seeds, n, block, memory)
            x, data = rng.normal(size=(2, len(seeds), n))
            phi = project(signs * x, slots, memory)
            energy = (x**2).sum(axis=1)
            loads = project(np.ones(slots.shape), slots, memory)
            # The slots' means are the best table, and explain this much of it.
            explained = (phi**2 / loads.clip(1)).sum(axis=1)
            function = (phi * project(signs * data, slots, memory)).sum(axis=1)
            samples = {
                "table read back": ((recover(phi, slots, signs) - x) ** 2).sum(axis=1) / energy,
                "best shared table": 1 - explained / energy,
                "sign of a linear model": function * (x * data).sum(axis=1) > 0,
            }
            for name, values in samples.items():
                found.setdefault(name, []).append(values)
        found = {name: np.concatenate(values) for name, values in found.items()}
        columns = {"n": n, "memory": memory, "block": block, "few": memory == few}
        for name, formula in (
            ("table read back", (n - block) / memory),
            ("best shared table", best_residual(n, block, memory)),
        ):
            yield average("no approximation", found[name], formula, what=name, **columns)
        name = "sign of a linear model"
        yield share("no approximation", found[name], what=name, formula=sign_kept(n, memory), **columns)


def regimes(run: Path | None, seed: int) -> Iterator[dict]:
    """Where a trained table stands, beside a gaussian one of its size, at a hundred times less memory."""
    table = trained_table(run, seed).astype(float)
    gauss = np.random.default_rng([seed, 8]).normal(size=table.shape)
    eps = 0.1
    for vector, rows in (("trained", table), ("gauss", gauss)):
        x, norms = rows.ravel(), (rows**2).sum(axis=1)
        memory, logarithm = max(WIDTH, x.size // 100), log(2 * x.size / DELTA)
        # Of the variance of the norm, blocks as long as a row take away:
        variances = [variance_bound(x, x, block, memory)[1] for block in (1, rows.shape[1])]
        yield {
            "part": "regime",
            "vector": vector,
            "n": x.size,
            "memory": memory,
            "flatness": float(np.abs(x).max() / np.linalg.norm(x)),
            "flatness_needed": 3 * eps / (4 * logarithm),
            "memory_needed": ceil(4 * logarithm / eps**2),
            "eps": eps,
            "variance_of_blocks": variances[1] / variances[0],
            "heaviest_hundredth_of_rows": float(
                np.sort(norms)[-max(1, norms.size // 100) :].sum() / norms.sum()
            ),
        }


def verdict(rows: claim.Rows) -> claim.Verdict:
    return claim.conclude(checks(rows))


def interval(row: dict) -> tuple[float, float]:
    return claim.share_interval(row["hits"], row["trials"], LEVEL)


def within(row: dict, formula: float, slack: float = 0.0) -> bool:
    low, high = interval(row)
    return low * (1 - slack) <= formula <= high * (1 + slack)


def every(rows: claim.Rows, what: str, holds, tell) -> Check:
    """A check of each of the rows, of which there must be some; tells the one that fails, or the last."""
    bad = [row for row in rows if not holds(row)]
    return Check(what, bool(rows) and not bad, tell((bad or rows)[-1]) if rows else "nothing measured")


def checks(rows: claim.Rows) -> Iterator[Check]:
    def rate(row):
        return f"{row['measured']:.4f} at M = {row['memory']}"

    worst = where(rows, part="worst vector")
    whole, half = where(worst, factor=1), where(worst, factor=0.5)
    yield every(worst, "Chebyshev is never exceeded", lambda r: interval(r)[0] <= r["bound"], rate)
    yield every(
        whole, "worst vector, M = 2 / (eps^2 delta)", lambda r: interval(r)[1] <= 1.05 * r["delta"], rate
    )
    yield every(half, "rejected: half of that suffices", lambda r: interval(r)[0] > r["delta"], rate)
    yield every(worst, "worst vector fails like birthdays", lambda r: within(r, r["formula"], 0.05), rate)

    flat = where(rows, part="flat vector")

    def near(row):
        low, high = interval(row)
        return low <= 1.25 * row["delta"] and high >= 0.8 * row["delta"]

    yield every(where(flat, factor=1), "flat vector, M = 2 z^2 / eps^2: about delta", near, rate)
    what = "rejected: half of that suffices a flat vector"
    yield every(where(flat, factor=0.5), what, lambda r: interval(r)[0] > 1.25 * r["delta"], rate)

    copies = where(rows, part="averaged copies")
    yield every(
        copies, "averaged copies fail as the binomial law says", lambda r: within(r, r["formula"]), rate
    )
    one, four = where(copies, copies=1)[0], where(copies, copies=4)[0]
    what = "rejected: averaging 4 copies lowers the failures of two equal elements"
    yield Check(
        what, interval(four)[0] > interval(one)[1], f"{one['measured']:.4f} to {four['measured']:.4f}"
    )

    points = where(rows, part="many points")
    single = where(points, method="hash, 1 copies")
    yield every(single, "N basis vectors, one hash: birthdays", lambda r: within(r, r["formula"]), rate)
    largest = [row for row in single if row["points"] == max(r["points"] for r in single)]
    what = "rejected: one hash does in the M of a dense projection"
    yield every(largest, what, lambda r: interval(r)[0] > r["delta"], rate)
    others = [row for row in points if row not in single]
    what = "16 copies, and a dense projection, fail less than delta"
    yield every(others, what, lambda r: interval(r)[1] < r["delta"], rate)

    errors = where(rows, part="largest error")

    def error(row):
        return f"{row['high']:.3f} of {row['bound']:.3f} at M = {row['memory']}"

    yield every(
        errors, "largest error of recovery below Bernstein's bound", lambda r: r["high"] <= r["bound"], error
    )
    enough, heavy = where(errors, flat_enough=True), where(errors, vector="one heavy element")
    what = "flat enough a table: within 2 sqrt(L / M)"
    yield every(enough, what, lambda r: r["high"] <= r["bound_if_flat"], error)
    what = "rejected: so with a heavy element"
    yield every(
        heavy, what, lambda r: r["measured"] > r["bound_if_flat"], lambda r: f"median {r['measured']:.3f}"
    )

    recovered = where(rows, part="recovered")

    def z(row):
        return f"{row['what']}, {row['vector']}, Z = {row['block']}: z = {row['z']:.1f}"

    what = f"recovered elements and rows, |z| < {RIGHT:g}"
    yield every(where(recovered, right=True), what, lambda r: abs(r["z"]) < RIGHT, z)
    for wrong in ("own block counted", "noise of rows forgotten"):
        yield every(where(recovered, wrong=wrong), f"rejected: {wrong}", lambda r: abs(r["z"]) > WRONG, z)

    caveats = where(rows, part="no approximation")
    for what in ("table read back", "best shared table"):
        told = where(caveats, what=what)
        yield every(
            told, f"squared error, {what}, |z| < {RIGHT:g}", lambda r: abs(r["z"]) < RIGHT, z_of_memory
        )
    # The formula is of leading order.
    what, told = "sign of a linear model", where(caveats, what="sign of a linear model")

    def close(row):
        low, high = interval(row)
        return low - 0.02 <= row["formula"] <= high + 0.02

    yield every(told, f"{what}, within 0.02", close, rate)
    few = where(caveats, what="table read back", few=True)
    what = "rejected: M = 4 L / eps^2 makes the relative error of a flat table small"
    yield every(
        few, what, lambda r: r["low"] > 1, lambda r: f"{r['measured']:.2f} of |x|^2 at M = {r['memory']}"
    )


def z_of_memory(row: dict) -> str:
    return f"z = {row['z']:.1f} at M = {row['memory']}"


def errorbar(axes, x, rows: claim.Rows, **style) -> None:
    """Measured values with their intervals."""
    y = np.array([row["measured"] for row in rows])
    spread = np.array([[row["measured"] - row["low"], row["high"] - row["measured"]] for row in rows]).T
    axes.errorbar(x, y, spread, **{"fmt": "o", "markersize": 4, "capsize": 3, **style})


def plot(rows: claim.Rows):
    figure, axes = claim.figure(2, 3, "What (1 ± eps) holds, and what it does not say")
    tail, copied, points, largest, caveat, function = axes

    worst, delta = where(rows, part="worst vector", eps=0.2, block=16), 0.05
    chosen = where(worst, delta=delta)
    m = np.geomspace(60, 2.2 * chosen[-1]["memory"])
    tail.plot(m, [bound(0.2, each) for each in m], "k--", label="Chebyshev, any vector")
    tail.plot(m, [birthday(9, each) for each in m], "C0", label="birthdays of 9 elements")
    errorbar(tail, [row["memory"] for row in chosen], chosen, color="C0", label="9 equal elements, Z = 16")
    flat = where(rows, part="flat vector", block=16)
    law = 2 * stats.norm.sf(0.2 * np.sqrt(m / 2))
    tail.plot(m, law, "C1", label="normal law of flat vectors")
    errorbar(tail, [row["memory"] for row in flat], flat, color="C1", label="flat vector, Z = 16")
    tail.set(
        xscale="log", yscale="log", ylim=(3e-4, 1.5), xlabel="slots M", ylabel="P(norm² off by more than 20%)"
    )
    tail.set_title("norms: heavy against flat")

    chosen = where(rows, part="averaged copies")
    x = [row["copies"] for row in chosen]
    copied.plot(x, [row["formula"] for row in chosen], "C0", label="binomial law")
    errorbar(copied, x, chosen, color="C0", label="measured")
    copied.axhline(chosen[0]["formula"], color="k", linestyle=":", label="one copy")
    copied.set(xscale="log", yscale="log", xlabel="averaged copies (416 slots in all)")
    copied.set(ylabel="P(norm² off by more than 20%)", title="two equal elements")
    claim.ticks(copied, x)

    for i, method in enumerate(("hash, 1 copies", "hash, 16 copies", "dense")):
        chosen = where(rows, part="many points", method=method)
        x = np.array([row["points"] for row in chosen]) * 1.08 ** (i - 1)
        errorbar(points, x, chosen, color=f"C{i}", label=method.replace("1 copies", "one copy"))
    chosen = where(rows, part="many points", method="hash, 1 copies")
    x = [row["points"] for row in chosen]
    points.plot(x, [row["formula"] for row in chosen], "C0", label="birthdays")
    points.axhline(chosen[0]["delta"], color="k", linestyle="--", label="delta, promised for dense")
    points.set(xscale="log", xlabel="N basis vectors, M of the dense projection", ylim=(-0.03, 1.05))
    points.set(ylabel="P(some distance off by 50%)", title="all distances of N points")
    claim.ticks(points, x)

    for i, vector in enumerate(("flat", "gauss", "one heavy element")):
        chosen = where(rows, part="largest error", vector=vector)
        x = [row["memory"] for row in chosen]
        largest.plot(x, [row["bound"] for row in chosen], f"C{i}--", label=f"{vector}: Bernstein's bound")
        errorbar(largest, x, chosen, color=f"C{i}", label="median, 5 to 95%" if i == 0 else None)
    largest.plot(x, [row["bound_if_flat"] for row in chosen], "k:", label="2 sqrt(L / M), if flat enough")
    largest.set(xscale="log", yscale="log", xlabel="slots M", ylabel="largest error / |x|", ylim=(0.04, 300))
    largest.set_title(f"recovery of {chosen[0]['n']:,} elements")
    claim.ticks(largest, x)

    for i, what in enumerate(("table read back", "best shared table")):
        chosen = where(rows, part="no approximation", what=what)
        x = [row["n"] / row["memory"] for row in chosen]
        caveat.plot(x, [row["formula"] for row in chosen], f"C{i}", label=what)
        errorbar(caveat, x, chosen, color=f"C{i}")
    caveat.axhline(1, color="k", linestyle=":", label="all zeros")
    caveat.set(xscale="log", yscale="log", xlabel="compression n / M", ylabel="squared error / |x|²")
    caveat.set_title("a flat table is not approximated")
    chosen = where(rows, part="no approximation", what="sign of a linear model")
    x = [row["n"] / row["memory"] for row in chosen]
    function.plot(x, [row["formula"] for row in chosen], "C0", label="1 - arctan(sqrt(n / M)) / pi")
    errorbar(function, x, chosen, color="C0", label="measured")
    function.set(xscale="log", xlabel="compression n / M", ylabel="P(sign kept)", ylim=(0.45, 1))
    function.set_title("a sketched random linear model")
    for ax in axes:
        ax.legend(fontsize="small")
    return figure


if __name__ == "__main__":
    claim.main(claim.RunOptions)
