"""Mean and variance of inner products and norms after hashing in blocks.

Claim (our derivation). Let phi(x) be the array of M slots into which the elements of a vector x of blocks x_b
of Z <= M elements are added, and X = <phi(x), phi(y)>; with y = x it is the squared norm.

1. Element signs, circular blocks: the mean of X is <x, y>, and its variance

    (|x|^2 |y|^2 + <x, y>^2 - sum over blocks of (|x_b|^2 |y_b|^2 + <x_b, y_b>^2)) / M

so blocks never hurt, and help by what the blocks carry: much for a table with few heavy rows, and by no more
than the factor 1 - Z/n for a flat vector of n elements.

2. One sign per block: the mean is the same, the variance up to Z times as large, because elements of two
blocks that collide do so together. In full it is a sum over pairs of blocks and the lags at which they can
lie.

3. No signs: the mean is off by (sum x * sum y - sum over blocks of the same) / M, which for vectors of one
sign dwarfs everything else.

4. Blocks that may not cross the edge, M - Z + 1 starts: a pair of elements at positions p and q of different
blocks collides with probability (M - Z + 1 - |p - q|) / (M - Z + 1)^2, if that is positive, instead of 1/M.

Conditions: starts and signs are independent and random; element signs need only pairs of starts to be so, no
signs need fours. Z need not divide n, and 2Z may exceed M.

Measured: by enumeration of all starts and signs of small cases, which must agree to 1e-9; and under the hash
of kernels/parts/hashing.py with many seeds, on vectors of seven kinds. Seven wrong formulas must be rejected.

    python analysis/hash_variance.py [--quick] [--seed N] [--out DIR] [--run RUN]
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
from scipy import stats

from analysis import claim
from analysis.claim import RIGHT, WRONG, Check, where
from analysis.sample_tables import trained_table, vectors
from analysis.sketch import as_blocks, chunks, draw, project, trials

SIGNS = ("element", "block", "none")
KINDS = ("norm", "inner product")


def bound(
    x, y, block: int, memory: int, circular: bool = True, signs: str = "element"
) -> tuple[float, float]:
    """Mean and variance of <phi(x), phi(y)> over all hashes."""
    bx, by = as_blocks(x, block), as_blocks(y, block)
    mean = float(x @ y)
    if len(bx) == 1:  # elements of one block never meet
        return mean, 0.0
    if signs == "element" and circular:
        xx, yy, xy = (bx**2).sum(axis=1), (by**2).sum(axis=1), (bx * by).sum(axis=1)
        return mean, float((xx.sum() * yy.sum() + mean**2 - (xx * yy + xy**2).sum()) / memory)
    chance, sums, squares = pair_sums(bx, by, memory, circular)
    # Every pair of blocks stands in `sums` twice.
    if signs == "element":
        return mean, float(chance @ squares / 2)
    variance = chance @ (sums**2).sum(axis=(0, 1)) / 2
    if signs == "none":
        means = sums @ chance
        mean += means.sum() / 2
        variance -= (means**2).sum() / 2
        if not circular:
            variance += edge_covariance(sums, memory - block + 1)
    return mean, float(variance)


def pair_sums(bx, by, memory: int, circular: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By lag k = (position in the second block) - (position in the first), for elements i, j that far apart:

    chance (lags,)                 that the blocks lie so that i and j collide
    sums (blocks, blocks, lags)    of x_i y_j + y_i x_j
    squares (lags,)                of its square, over all pairs of blocks
    """
    count, block = bx.shape
    lags = np.arange(1 - block, block)
    if circular:  # lags that differ by M are the same
        lags, column = np.unique(lags % memory, return_inverse=True)
        chance = np.full(lags.size, 1 / memory)
    else:
        starts = memory - block + 1
        column, chance = np.arange(lags.size), (starts - np.abs(lags)).clip(0) / starts**2
    sums, squares = np.zeros((count, count, lags.size)), np.zeros(lags.size)
    for p, q in product(range(block), repeat=2):
        terms = np.outer(bx[:, p], by[:, q]) + np.outer(by[:, p], bx[:, q])
        np.fill_diagonal(terms, 0)
        k = column[q - p + block - 1]
        sums[:, :, k] += terms
        squares[k] += (terms**2).sum()
    return chance, sums, squares


def edge_covariance(sums: np.ndarray, starts: int) -> float:
    """What the variance gains without signs because two pairs that share a block both feel the edge.

    Given the start u of the shared block, the others meet it at the lags k for which u - k is a start.
    """
    block = (sums.shape[2] + 1) // 2
    other = np.arange(starts)[:, None] - np.arange(1 - block, block)
    within = ((other >= 0) & (other < starts)) / starts  # (starts, lags)
    total = np.var(sums.sum(axis=1) @ within.T, axis=1).sum()
    within = within - within.mean(axis=0)
    alone = ((sums @ (within.T @ within / starts)) * sums).sum()
    return float(total - alone)


# Name -> the wrong formula, and a case in which it must show: under hashes, or in the enumeration.
WRONG_FORMULAS = {
    "blocks ignored": (
        lambda x, y, block, memory, circular, signs: bound(x, y, 1, memory, circular, signs),
        {"vector": "zipf", "statistic": "norm", "block": 64, "circular": True, "signs": "element"},
    ),
    "element formula for block signs": (
        lambda x, y, block, memory, circular, signs: bound(x, y, block, memory, circular, "element"),
        {"vector": "positive", "statistic": "inner product", "block": 16, "circular": True, "signs": "block"},
    ),
    "circular formula for M - Z + 1 starts": (
        lambda x, y, block, memory, circular, signs: bound(x, y, block, memory, True, signs),
        {"vector": "gauss", "statistic": "norm", "block": 64, "circular": False, "signs": "element"},
    ),
    "1 / (M - Z + 1) instead of 1 / M": (
        lambda x, y, block, memory, circular, signs: (
            x @ y,
            bound(x, y, block, memory)[1] * memory / (memory - block + 1),
        ),
        {"vector": "gauss", "statistic": "norm", "block": 64, "circular": False, "signs": "element"},
    ),
    "no signs, squared means forgotten": (
        lambda x, y, block, memory, circular, signs: (
            bound(x, y, block, memory, circular, "none")[0],
            bound(x, y, block, memory, circular, "block")[1],
        ),
        {
            "vector": "positive",
            "statistic": "inner product",
            "block": 16,
            "memory": 100,
            "circular": True,
            "signs": "none",
        },
    ),
    "factor 2 of the norm forgotten": (
        lambda x, y, block, memory, circular, signs: (x @ x, bound(x, y, block, memory)[1] / 2),
        {"vector": "gauss", "statistic": "norm", "block": 16, "circular": True, "signs": "element"},
    ),
    "lags not taken modulo M": (
        # In a larger array no two lags are the same.
        lambda x, y, block, memory, circular, signs: (
            x @ y,
            8 * bound(x, y, block, 8 * memory, True, "block")[1],
        ),
        {"statistic": "enumeration", "circular": True, "signs": "block"},
    ),
}


def enumerated(x, y, block: int, memory: int, circular: bool, signs: str) -> tuple[float, float]:
    """Mean and variance of <phi(x), phi(y)> over all starts and all signs, one by one."""
    n, of = x.size, np.arange(x.size) // block
    count = of[-1] + 1
    starts = memory if circular else memory - block + 1
    start = np.array(list(product(range(starts), repeat=count)))
    slots = (start[:, of] + np.arange(n) % block) % memory
    sign = np.ones((1, n))
    if signs != "none":
        own = np.arange(n) if signs == "element" else of
        sign = np.array(list(product((-1, 1), repeat=own[-1] + 1)))[:, own]
    there = slots[:, :, None] == np.arange(memory)  # (starts, n, M)
    phi_x, phi_y = (np.einsum("sn,anm->asm", sign * v, there) for v in (x, y))
    samples = (phi_x * phi_y).sum(axis=2)
    return float(samples.mean()), float(samples.var())


def small_cases(quick: bool) -> Iterator[tuple[int, int, int, bool, str]]:
    """(n, Z, M, circular, signs) that can be enumerated: Z that do not divide n, 2Z > M, Z = M among them."""
    most = 2**15 if quick else 2**18
    for n, block, memory in product(range(3, 9), range(1, 5), range(1, 8)):
        if block <= memory and memory ** -(-n // block) * 2**n <= most:
            yield from ((n, block, memory, *rest) for rest in product((True, False), SIGNS))


def measure(quick: bool = False, seed: int = 0, run: Path | None = None) -> claim.Rows:
    """Rows by `statistic`: enumeration, norm and inner product; `formula` tells right from wrong ones.

    run: take the trained vectors from this run with full tables.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for case in small_cases(quick):
        n, block, memory, circular, signs = case
        x, y = rng.normal(1, 1, (2, n))
        exact = enumerated(x, y, *case[1:])
        columns = {"statistic": "enumeration", "n": n, "block": block, "memory": memory}
        rows += compare({**columns, "circular": circular, "signs": signs}, x, y, exact=exact)
    n, count = (500, 3000) if quick else (1000, 20_000)
    kinds = vectors(n, rng, trained_table(run, seed))
    layouts = [
        (block, memory, circular)
        for memory in ((100,) if quick else (100, 250))
        for block in ((1, 16, 64) if quick else (1, 7, 16, 64))
        for circular in (True, False)
    ]
    for layout in [*layouts, (n, 1024, True)]:
        block, memory, circular = layout
        samples = sketched(kinds, layout, trials(seed, count, *layout))
        for (signs, kind, statistic), values in samples.items():
            columns = {"statistic": statistic, "n": n, "block": block, "memory": memory, "circular": circular}
            x, y = kinds[kind] if statistic == "inner product" else (kinds[kind][0],) * 2
            rows += compare({**columns, "signs": signs, "vector": kind}, x, y, samples=values)
    return rows


def sketched(kinds, layout: tuple[int, int, bool], seeds) -> dict[tuple[str, str, str], np.ndarray]:
    """(signs, vector, statistic) -> <phi(x), phi(y)> for every seed; the hash is the project's."""
    block, memory, circular = layout
    n = kinds["gauss"][0].size
    element = np.arange(n)
    first = element // block * block
    found: dict = {}
    for some in chunks(seeds, n):
        slots, sign = draw(some, n, block, memory)
        if not circular:
            # The same hash, its starts spread over as many positions as do not cross the edge.
            starts = draw(some, n, 1, memory - block + 1)[0][:, first]
            slots = starts + element - first
        for signs, g in (("element", sign), ("block", sign[:, first]), ("none", 1)):
            for kind, (x, y) in kinds.items():
                phi_x, phi_y = (project(np.broadcast_to(g * v, slots.shape), slots, memory) for v in (x, y))
                for statistic, phi in (("norm", phi_x), ("inner product", phi_y)):
                    found.setdefault((signs, kind, statistic), []).append((phi_x * phi).sum(axis=1))
    return {key: np.concatenate(values) for key, values in found.items()}


def compare(columns: dict, x, y, samples=None, exact=None) -> Iterator[dict]:
    """A row for the right formula, and for each wrong one that must show here."""
    layout = [columns[name] for name in ("block", "memory", "circular", "signs")]
    formulas = {"right": bound} | {
        name: wrong
        for name, (wrong, case) in WRONG_FORMULAS.items()
        if case.items() <= columns.items() and not (exact and 2 * columns["block"] - 1 <= columns["memory"])
    }
    scale = float(x @ x * (y @ y))
    for name, formula in formulas.items():
        mean, variance = formula(x, y, *layout)
        row = {**columns, "formula": name, "scale": scale, "mean_formula": mean, "variance_formula": variance}
        if exact:
            error = max(abs(mean - exact[0]), abs(variance - exact[1]))
            yield row | {"mean": exact[0], "variance": exact[1], "error": error}
        else:
            squares = (samples - mean) ** 2
            yield row | {
                "mean": float(samples.mean()),
                "variance": float(squares.mean()),
                "half_interval": float(1.96 * squares.std() / np.sqrt(squares.size)),
                "z_mean": claim.z_mean(samples, mean),
                "z_variance": claim.z_mean(squares, variance),
            }


def worst_z(rows: claim.Rows) -> float:
    return max(max(abs(row["z_mean"]), abs(row["z_variance"])) for row in rows)


def verdict(rows: claim.Rows) -> claim.Verdict:
    return claim.conclude(checks(rows))


def checks(rows: claim.Rows) -> Iterator[Check]:
    enumeration = where(rows, statistic="enumeration", formula="right")
    worst = max(row["error"] for row in enumeration)
    edges = {
        "Z does not divide n": any(row["n"] % row["block"] for row in enumeration),
        "2Z > M": any(2 * row["block"] > row["memory"] for row in enumeration),
        "Z = M": any(row["block"] == row["memory"] for row in enumeration),
        "not circular": any(not row["circular"] for row in enumeration),
    }
    what = f"{len(enumeration)} cases enumerated agree to 1e-9, {', '.join(edges)} among them"
    yield Check(what, worst < 1e-9 and len(enumeration) >= 150 and all(edges.values()), f"worst {worst:.1e}")
    hashed = [row for row in rows if row["statistic"] in KINDS and row["formula"] == "right"]
    for signs in SIGNS:
        worst = worst_z(where(hashed, signs=signs))
        yield Check(
            f"mean and variance, signs: {signs}, |z| < {RIGHT:g}", worst < RIGHT, f"worst {worst:.2f}"
        )
    spread = np.std([row["z_variance"] for row in hashed if row["variance_formula"] > 0])
    yield Check("z of the variances has deviation 0.7 to 1.3", 0.7 < spread < 1.3, f"{spread:.2f}")
    for name, (_, case) in WRONG_FORMULAS.items():
        wrong = where(rows, formula=name)
        if case["statistic"] == "enumeration":
            off = max((row["error"] for row in wrong), default=0)
            yield Check(f"rejected: {name}", off > 1e-3, f"error {off:.2g}")
        else:
            off = min((max(abs(r["z_mean"]), abs(r["z_variance"])) for r in wrong), default=0)
            yield Check(f"rejected: {name}", off > WRONG, f"|z| {off:.0f}")


def plot(rows: claim.Rows):
    figure, (by_vector, by_signs, spread, wrong) = claim.figure(2, 2, "Variance of hashed inner products")
    memory = min(row["memory"] for row in rows if row["statistic"] in KINDS)
    hashed = [row for row in rows if row["statistic"] in KINDS and row["formula"] == "right"]
    here = where(hashed, memory=memory, circular=True)

    def draw_line(axes, chosen, color, label):
        z = [row["block"] for row in chosen]
        scale = [memory / row["scale"] for row in chosen]
        formula, measured, half = (
            [row[name] * s for row, s in zip(chosen, scale, strict=True)]
            for name in ("variance_formula", "variance", "half_interval")
        )
        axes.plot(z, formula, color=color, label=label)
        axes.errorbar(z, measured, half, color=color, fmt="o", markersize=3, capsize=3)

    for i, kind in enumerate(("flat", "gauss", "heavy", "zipf", "trained")):
        chosen = where(here, vector=kind, signs="element", statistic="norm")
        draw_line(by_vector, chosen, f"C{i}", kind)
    by_vector.set(title="squared norm, element signs", ylim=(0, None))
    for i, signs in enumerate(SIGNS):
        chosen = where(here, vector="positive", signs=signs, statistic="inner product")
        draw_line(by_signs, chosen, f"C{i}", f"signs: {signs}")
    by_signs.set(title="inner product of positive vectors", yscale="log")
    claim.plain(by_signs.yaxis)
    for axes in (by_vector, by_signs):
        axes.set(xscale="log", xlabel="block length Z", ylabel=f"variance * M / (|x| |y|)^2,  M = {memory}")
        claim.ticks(axes, [row["block"] for row in here])
        axes.plot([], [], "ko-", markersize=3, label="line: formula; dots: measured, 95%")
        axes.legend(fontsize="small")

    z = [row[name] for row in hashed for name in ("z_mean", "z_variance") if row["variance_formula"] > 0]
    bins = np.linspace(-RIGHT, RIGHT, 41)
    spread.hist(z, bins, density=True, alpha=0.5, label=f"{len(z)} right means and variances")
    spread.plot(bins, stats.norm.pdf(bins), "k", label="standard normal")
    spread.set(
        xlabel="z, measured against formula", ylabel="density", title="all cases", xlim=(-RIGHT, RIGHT)
    )
    spread.legend(fontsize="small", loc="upper left")
    names = [name for name, (_, case) in WRONG_FORMULAS.items() if case["statistic"] in KINDS]
    wrong.barh(names, [worst_z(where(rows, formula=name)) for name in names], color="C3")
    wrong.axvline(RIGHT, color="k", linestyle="--", label=f"right formulas stay below {RIGHT:g}")
    wrong.set(xscale="log", xlabel="|z|", title="wrong formulas")
    wrong.legend(fontsize="small")
    return figure


if __name__ == "__main__":
    claim.main(claim.RunOptions)
