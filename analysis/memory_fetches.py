"""How many cache lines a look-up touches, by width D, block length Z and line length B.

Claim (our derivation). L consecutive elements at a random position touches 1 + (L - 1) / B lines of B
elements on average. Rows of D elements are cut into pieces where blocks of Z end, kappa of them on average:

    mix      kappa = 1 + (D - gcd(D, Z)) / Z    blocks run on from row to row
    affine   kappa = ceil(D / Z)                blocks begin with the row

and each piece lies at a random position of its own, so a row touches

    D / B + (1 - 1 / B) kappa    lines

and a row of a full table, aligned to lines, D / B, or 1 + (D - gcd(D, B)) / B if B does not divide D. Longer
blocks than the row gain next to nothing over Z = D. In a small array of M elements the pieces share lines: of
its M / B lines, with `mix`,

    M / B (1 - product over the pieces of (1 - (1 + (L - 1) / B) / (M / B)))    are touched,

averaged over the rows.

Conditions: B divides M, and starts are uniform; for the small array independent, which those of `affine` are
not: there the pieces of a row are evenly spaced, and how many lines they share depends on the seed alone. Its
edge changes the number by O(Z / M).

Measured: exactly, by enumeration of all alignments, as fractions; by the addresses that our gather reads
(robe/kernels/gather.py), which it tells itself when the array holds 0, 1, 2, ...; and beside it the time it
takes, on which the verdict does not rest. The formula ceil(D / Z) ceil(Z / B) must be rejected.

    python analysis/memory_fetches.py [--quick] [--seed N] [--out DIR]
"""

import time
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from math import ceil, gcd, prod

import numpy as np

from analysis import claim
from analysis.claim import RIGHT, WRONG, Check, where
from robe.backend import select
from robe.kernels.parts.hashing import slot_map

FAMILIES = ("mix", "affine")
LINE = 16  # float32 in the 64 bytes of a CPU's cache line


def bound(width: int, block: int | None, line: int, family: str = "mix") -> Fraction:
    """Lines that a row touches on average in a large array; block None: in an aligned full table."""
    if block is None:
        return 1 + Fraction(width - gcd(width, line), line)
    kappa = (
        ceil(Fraction(width, block)) if family == "affine" else 1 + Fraction(width - gcd(width, block), block)
    )
    return Fraction(width, line) + (1 - Fraction(1, line)) * kappa


def bound_in_small_array(width: int, block: int, memory: int) -> float:
    """The same with `mix` where pieces share lines; the rows differ in where their first block ends."""
    lines = memory / LINE
    cuts = [pieces(width, block, first) for first in first_positions(width, block, "mix")]
    missed = [prod(1 - (1 + (length - 1) / LINE) / lines for length in cut) for cut in cuts]
    return lines * (1 - sum(missed) / len(missed))


def wrong(width: int, block: int, line: int) -> int:
    """Every block begins with a line, it says."""
    return ceil(width / block) * ceil(block / line)


def first_positions(width: int, block: int, family: str) -> range:
    """Positions in their block at which rows begin, each as often as the others."""
    return range(1) if family == "affine" else range(0, block, gcd(width, block))


def pieces(width: int, block: int, first: int) -> list[int]:
    """Lengths of the pieces of a row that begins at position `first` of a block."""
    ends = [*range(block - first, width, block), width]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def enumerated(width: int, block: int | None, line: int, family: str) -> Fraction:
    """Lines per row, counted: for every position of a row among the blocks and of a piece among the lines."""

    def lines(start: int, length: int) -> int:
        return (start + length - 1) // line - start // line + 1

    if block is None:
        counts = [lines(row * width, width) for row in range(line)]
        return Fraction(sum(counts), line)
    firsts = first_positions(width, block, family)
    cuts = [length for first in firsts for length in pieces(width, block, first)]
    return Fraction(sum(lines(start, length) for length in cuts for start in range(line)), line * len(firsts))


def touched(width: int, block: int, family: str, memory: int, rows: int, seed: int) -> np.ndarray:
    """Lines (rows,) that our gather reads for random rows."""
    where_to = slot_map(family, width, block, memory, seed, signed=False)
    ids = np.random.default_rng(seed).integers(0, 2**32, (rows, 1), np.uint32)
    slots = np.empty((rows, 1, width))
    # An array that holds its own addresses makes the gather tell which it read.
    addresses, base = np.arange(memory, dtype=np.float64), np.zeros(1, np.uint64)
    select("cpu").kernels.gather(addresses, ids, base, where_to, slots)
    lines = np.sort(slots[:, 0].astype(np.int64) // LINE, axis=1)
    return 1 + (np.diff(lines, axis=1) > 0).sum(axis=1)


def timed(width: int, blocks: list[int | None], memory: int, rows: int, rounds: int, seed: int) -> np.ndarray:
    """Nanoseconds of CPU time per row (blocks, rounds) of the gather, the blocks taking turns.

    CPU time, so that what else the machine does takes less part in it.
    """
    rng, gather = np.random.default_rng(seed), select("cpu").kernels.gather
    array, base = rng.random(memory, np.float32), np.zeros(1, np.uint64)
    out = np.empty((rows, 1, width), np.float32)
    ids = rng.integers(0, memory // width, (rounds + 1, rows, 1), np.uint32)
    times = np.empty((len(blocks), rounds))
    for turn in range(-1, rounds):  # turn -1 compiles, and is overwritten by the last
        for i, block in enumerate(blocks):
            # Without signs, which a full table has not either; its rows are prefetched as blocks of D.
            where_to = slot_map(
                "mix" if block else "table", width, block or width, memory, seed, signed=False
            )
            started = time.process_time()
            gather(array, ids[turn], base, where_to, out)
            times[i, turn] = 1e9 * (time.process_time() - started) / rows
    return times


def measure(quick: bool = False, seed: int = 0) -> claim.Rows:
    """Rows by `part`: enumerated (sums over many cases), touched, timed."""
    return [*enumeration(16 if quick else 48), *addresses(quick, seed), *times(quick, seed)]


def enumeration(most: int) -> Iterator[dict]:
    sizes = range(1, most + 1)
    for family in ("table", *FAMILIES):
        cases = list(product(sizes, (None,) if family == "table" else sizes, (1, 2, 3, 8, 12, 16, 32)))
        different = sum(bound(*case, family) != enumerated(*case, family) for case in cases)
        columns = {"part": "enumerated", "family": family, "cases": len(cases), "different": different}
        if family == "table":
            yield columns
        else:
            yield columns | {
                "wrong_different": sum(wrong(*case) != enumerated(*case, family) for case in cases)
            }


def addresses(quick: bool, seed: int) -> Iterator[dict]:
    rows, large = 20_000 if quick else 200_000, 2**22
    for family, width, memory in product(FAMILIES, (16, 24, 128), (2**12, large)):
        if family == "affine" and memory < large:
            continue
        for block in (1, 4, 8, 16, 32, 64, 100, 128, 256):
            counts = touched(width, block, family, memory, rows, seed)
            formula = large_array = float(bound(width, block, LINE, family))
            if family == "mix":
                formula = bound_in_small_array(width, block, memory)
            mean, half = claim.mean_interval(counts)
            yield {
                "part": "touched",
                "family": family,
                "width": width,
                "memory": memory,
                "block": block,
                "formula": formula,
                "formula_large": large_array,
                "measured": mean,
                "half_interval": half,
                "z": claim.z_mean(counts, formula),
                # Away from it by chance, and at most so far by the edge.
                "off": abs(mean - formula) / formula,
                "edge": block / memory if family == "affine" else 0.0,
                "z_wrong": claim.z_mean(counts, wrong(width, block, LINE)),
            }


def times(quick: bool, seed: int) -> Iterator[dict]:
    # An array far larger than the caches, and one that fits into them.
    memory, rows, rounds = (2**24, 2**13, 5) if quick else (2**26, 2**15, 15)
    for width, size in product((16, 128), (2**18, memory)):
        blocks = [None, *(block for block in (1, 2, 4, 8, 16, 32, 64, 128, 256) if block <= 2 * width)]
        for block, nanoseconds in zip(blocks, timed(width, blocks, size, rows, rounds, seed), strict=True):
            low, middle, high = np.percentile(nanoseconds, (25, 50, 75))
            yield {
                "part": "timed",
                "family": "mix" if block else "table",
                "width": width,
                "memory": size,
                "block": block,
                "formula_large": float(bound(width, block, LINE)),
                "measured": middle,
                "low": low,
                "high": high,
            }


def verdict(rows: claim.Rows) -> claim.Verdict:
    return claim.conclude(checks(rows))


def checks(rows: claim.Rows) -> Iterator[Check]:
    for row in where(rows, part="enumerated"):
        family, cases, different = (row[name] for name in ("family", "cases", "different"))
        yield Check(
            f"enumeration equals the formula, {family}", different == 0, f"{different} of {cases} differ"
        )
        if family in FAMILIES:
            different = row["wrong_different"]
            what = f"rejected: ceil(D / Z) ceil(Z / B), {family}"
            yield Check(what, different > cases // 2, f"{different} of {cases} differ")
    reads = where(rows, part="touched")
    for family in FAMILIES:
        chosen = where(reads, family=family)
        # Where starts end before the edge, the formula holds but for O(Z / M).
        beyond = [row for row in chosen if abs(row["z"]) >= RIGHT and row["off"] > row["edge"]]
        told = max(beyond or chosen, key=lambda row: row["off"] - row["edge"])
        found = f"D = {told['width']}, Z = {told['block']}: {told['measured']:.4f} for {told['formula']:.4f}"
        yield Check(f"lines that our gather touches, {family}", bool(chosen) and not beyond, found)
    for row in where(reads, family="mix", width=128, block=32):
        yield Check(
            "rejected: the same, for what the gather touches",
            abs(row["z_wrong"]) > WRONG,
            f"z {row['z_wrong']:.0f}",
        )


def plot(rows: claim.Rows):
    figure, axes = claim.figure(2, 2, "Cache lines of 64 bytes per look-up, and its time")
    large = max(row["memory"] for row in where(rows, part="touched"))
    for ax, width in zip(axes[:2], (16, 128), strict=True):
        for i, family in enumerate(FAMILIES):
            chosen = where(rows, part="touched", family=family, width=width, memory=large)
            z = [row["block"] for row in chosen]
            ax.plot(z, [row["formula_large"] for row in chosen], f"C{i}", label=f"formula, {family}")
            half = [row["half_interval"] for row in chosen]
            style = {"fmt": "os"[i], "markersize": 5, "capsize": 3, "color": f"C{i}", "fillstyle": "none"}
            ax.errorbar(
                z, [row["measured"] for row in chosen], half, **style, label="read by our gather, 95%"
            )
        ax.plot(z, [wrong(width, block, LINE) for block in z], "C3:", label="ceil(D / Z) ceil(Z / B)")
        ax.axhline(float(bound(width, None, LINE)), color="k", linestyle="--", label="full table")
        ax.set(yscale="log", ylabel="lines per row")
    clock = where(rows, part="timed")
    sizes = sorted({row["memory"] for row in clock})
    for ax, width in zip(axes[2:], (16, 128), strict=True):
        for i, size in enumerate(sizes):
            chosen = where(clock, width=width, memory=size, family="mix")
            z = [row["block"] for row in chosen]
            middle = np.array([row["measured"] for row in chosen])
            spread = np.abs([[row["low"], row["high"]] - m for row, m in zip(chosen, middle, strict=True)]).T
            label = f"{4 * size / 2**20:.0f} MiB"
            ax.errorbar(z, middle, spread, color=f"C{i}", fmt="o-", markersize=4, capsize=3, label=label)
            table = where(clock, width=width, memory=size, family="table")[0]
            ax.axhline(table["measured"], color=f"C{i}", linestyle="--", label=f"full table, {label}")
        ax.set(yscale="log", ylabel="CPU ns per row, median and quartiles")
    for ax, width in zip(axes, (16, 128) * 2, strict=True):
        ax.set(xscale="log", xlabel="block length Z", title=f"D = {width}")
        claim.ticks(ax, [1, 2, 4, 8, 16, 32, 64, 128, 256])
        claim.plain(ax.yaxis)
        ax.legend(fontsize="small")
    return figure


if __name__ == "__main__":
    claim.main()
