"""Where the hash puts blocks: as evenly and as independently as chance, or not.

Claim (our derivation). With ideal starts, N blocks in M positions,

1. the chi-square statistic of the N starts over the M positions has mean M - 1, variance 2 (M - 1) (1 - 1/N);
2. that of the elements of blocks of Z over the slots has mean M - Z, and the variance that hash_variance
   gives without signs: about 2Z / 3 times that of a textbook test with M - 1 degrees of freedom, which is
   wrong there;
3. two rows that share the start of one block share that of the next with probability 1/M;
4. rows of several blocks never repeat one another, for all that happens.

`mix`, the default, does all this on any ids. `affine`, the hash of the published implementation, is fair on
average over its seeds, but:

- its collisions come all or nothing, since whether two ids collide depends on their difference alone: the
  chi-square statistic of ordered ids varies more than twenty times as much as chance, from seed to seed;
- two rows that share one block share the next two times in three: the same step follows, and only the
  remainder by P = 2038074743 may wrap in between;
- so under some seeds tens of thousands of rows repeat another row exactly, whatever is trained, among them
  the published seed 1024;
- without signs the variance of a flat vector's norm is many times that of independent starts. With hashed
  signs it is right: these need pairs of starts to be independent, no more.

Conditions: 4 blocks a row; ids that are consecutive, 1024 apart, random or, with --data, real. The faults of
`affine` are part of the verdict: were they not found, the measurement would be at fault.

Measured: robe/kernels/parts/hashing.py against ideal starts from NumPy's PCG64, over many seeds.

    python analysis/hash_quality.py [--quick] [--seed N] [--out DIR] [--data FILE_OR_FOLDER]
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import sqrt
from pathlib import Path

import numpy as np

from analysis import claim
from analysis.claim import RIGHT, Check, where
from analysis.hash_variance import bound as variance_bound
from analysis.sketch import chunks, many, project, trials
from data_pipeline.batches import Rows
from data_pipeline.folders import open_folder
from data_pipeline.logs import read_log
from robe.kernels.parts.hashing import slot_map, slots_reference

FAMILIES = ("ideal", "mix", "affine")
BLOCKS = 4  # of a row
TOKENS, PLACES = 4096, 16369
PUBLISHED_SEED = 1024


def bound(blocks: int, positions: int) -> tuple[float, float]:
    """Mean and deviation of the chi-square statistic of the starts of so many blocks."""
    return positions - 1, sqrt(2 * (positions - 1) * (1 - 1 / blocks))


def starts_of(family: str, tokens: np.ndarray, positions: int, seeds: np.ndarray) -> np.ndarray:
    """Places (seeds, rows, BLOCKS) where the blocks of the rows begin."""
    if family == "ideal":
        shape = (len(seeds), len(tokens), BLOCKS)
        return np.random.default_rng(seeds).integers(0, positions, shape)
    # The start of a block does not depend on its length: elements of blocks of 1 lie at the starts.
    return slots_reference(many(family, BLOCKS, 1, positions, seeds, signed=False), tokens)[0]


def pairs(keys: np.ndarray) -> int:
    """Pairs of equal keys."""
    counts = np.unique(keys, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def chi_square(loads: np.ndarray) -> np.ndarray:
    """Of each row of loads (trials, positions)."""
    mean = loads.mean(axis=1, keepdims=True)
    return ((loads - mean) ** 2 / mean).sum(axis=1)


def loads_of(starts: np.ndarray, positions: int) -> np.ndarray:
    """How many blocks begin at each position (trials, positions)."""
    flat = starts.reshape(len(starts), -1) + positions * np.arange(len(starts))[:, None]
    return np.bincount(flat.ravel(), minlength=len(starts) * positions).reshape(-1, positions)


def element_loads(starts: np.ndarray, positions: int, block: int, circular: bool) -> np.ndarray:
    """How many elements lie in each slot (trials, M): a start loads the Z slots from it on."""
    loads = loads_of(starts, positions)
    before = loads[:, positions - block + 1 :] if circular else np.zeros((len(loads), block - 1), int)
    after = np.zeros((len(loads), 0 if circular else block - 1), int)
    total = np.cumsum(np.concatenate([before, loads, after], axis=1), axis=1)
    total = np.concatenate([np.zeros((len(loads), 1), int), total], axis=1)
    return total[:, block:] - total[:, :-block]


def id_patterns(rng: np.random.Generator, data: Path | None) -> dict[str, np.ndarray]:
    """Kind of ids -> TOKENS different tokens."""
    patterns = {
        "consecutive": np.arange(TOKENS),
        "1024 apart": 1024 * np.arange(TOKENS),
        "random": rng.choice(2**32, TOKENS, replace=False),
    }
    if data is not None:
        patterns["real"] = real_tokens(data, rng)
    return {name: tokens.astype(np.uint64) for name, tokens in patterns.items()}


def real_tokens(data: Path, rng: np.random.Generator) -> np.ndarray:
    """Tokens drawn from those in a raw log or a prepared folder."""
    if data.is_dir():
        ids = next(Rows(open_folder(data), None).batches(100_000, prefetch=0)).ids
    else:
        ids = next(read_log(data, labelled=None)).ids
    tokens = np.unique((np.arange(ids.shape[1], dtype=np.uint64) << np.uint64(32)) + ids)
    return np.sort(rng.choice(tokens, min(TOKENS, len(tokens)), replace=False))


def measure(quick: bool = False, seed: int = 0, data: Path | None = None) -> claim.Rows:
    """Rows by `part`; data: take real ids from this raw log or prepared folder."""
    rng = np.random.default_rng(seed)
    rows = []
    for (ids, tokens), family in product(id_patterns(rng, data).items(), FAMILIES):
        rows += spread(family, ids, tokens, trials(seed, 200 if quick else 1000, 1))
    for family in FAMILIES:
        rows += flat_vector(family, trials(seed, 500 if quick else 4000, 2))
        # The seeds 0 and 1 too, which decide nothing: they are to be seen.
        rows += [repeated(family, s) for s in ((0, PUBLISHED_SEED) if quick else (PUBLISHED_SEED, *range(5)))]
    return rows


def spread(family: str, ids: str, tokens: np.ndarray, seeds: np.ndarray) -> Iterator[dict]:
    """Starts over positions, and blocks that rows share, over many seeds."""
    statistic, shared, both = [], 0, 0
    for some in chunks(seeds, tokens.size * BLOCKS):
        starts = starts_of(family, tokens, PLACES, some)
        statistic.append(chi_square(loads_of(starts, PLACES)))
        for first, second in zip(starts[..., 0], starts[..., 1], strict=True):
            shared += pairs(first)
            both += pairs(first * PLACES + second)
    mean, deviation = bound(tokens.size * BLOCKS, PLACES)
    statistic = (np.concatenate(statistic) - mean) / deviation
    columns = {"family": family, "ids": ids, "tokens": tokens.size, "seeds": len(seeds)}
    low, high = claim.share_interval(both, shared)
    expected = len(seeds) * tokens.size * (tokens.size - 1) / 2 / PLACES
    yield {
        "part": "spread",
        **columns,
        "z_mean": claim.z_mean(statistic, 0.0),
        "deviation": float(statistic.std()),
        "shared": shared,
        "z_shared": (shared - expected) / sqrt(expected),
        "both": both,
        "both_if_shared": both / shared,
        "low": low,
        "high": high,
        "z_both": (both - shared / PLACES) / sqrt(shared / PLACES + 1),
    }
    for level in np.linspace(0.005, 0.995, 100):
        yield {"part": "quantile", **columns, "level": level, "value": float(np.quantile(statistic, level))}


def flat_vector(family: str, seeds: np.ndarray, rows: int = 128, block: int = 8) -> Iterator[dict]:
    """Loads of slots, and the variance of a flat vector's norm with and without signs; consecutive rows."""
    memory, circular = 1024, family != "affine"
    positions = memory if circular else memory - block + 1
    tokens, width = np.arange(rows, dtype=np.uint64), BLOCKS * block
    loads = [
        element_loads(starts_of(family, tokens, positions, some), positions, block, circular)
        for some in chunks(seeds, rows * BLOCKS)
    ]
    loads, ones = np.concatenate(loads), np.ones(rows * width)
    row = {"part": "flat vector", "family": family, "block": block, "memory": memory, "seeds": len(seeds)}
    yield row | {"signs": "none", **ratio((loads**2).sum(axis=1), ones, block, memory, circular, "none")}
    if circular:
        statistic = chi_square(loads)
        squares = (statistic - (memory - block)) ** 2
        z = claim.z_mean(statistic, memory - block), claim.z_mean(squares, 2 * (memory - 1))
        yield row | {"signs": "none", "z_mean": z[0], "z_textbook": z[1]}
    if family != "ideal":
        norms = []
        for some in chunks(seeds, ones.size):
            slots, signs = slots_reference(many(family, width, block, memory, some), tokens)
            slots, signs = (a.reshape(len(some), -1) for a in (slots, signs))
            norms.append((project(signs, slots, memory) ** 2).sum(axis=1))
        yield row | {
            "signs": "element",
            **ratio(np.concatenate(norms), ones, block, memory, circular, "element"),
        }


def ratio(norms: np.ndarray, ones: np.ndarray, *layout) -> dict:
    """Measured variance of the norm over that of independent starts."""
    mean, variance = variance_bound(ones, ones, *layout)
    ratios = (norms - mean) ** 2 / variance
    found, half = claim.mean_interval(ratios)
    return {"variance_ratio": found, "half_interval": half, "z_variance": claim.z_mean(ratios, 1.0)}


def repeated(family: str, seed: int, rows: int = 1_000_000, memory: int = 1_000_000) -> dict:
    """Rows of BLOCKS blocks of 32 that repeat another row in all their positions."""
    positions = memory if family != "affine" else memory - 31
    tokens = np.arange(rows, dtype=np.uint64)
    if family == "ideal":
        starts = starts_of(family, tokens, positions, np.array([seed]))[0]
    else:
        starts = slots_reference(slot_map(family, BLOCKS, 1, positions, seed, signed=False), tokens)[0]
    halves = starts[:, 0] * positions + starts[:, 1], starts[:, 2] * positions + starts[:, 3]
    order = np.lexsort(halves)
    same = np.logical_and(*(np.diff(half[order]) == 0 for half in halves))
    columns = {"part": "repeated", "family": family, "hash_seed": seed, "rows": rows, "memory": memory}
    return columns | {"repeated": int(same.sum())}


def verdict(rows: claim.Rows) -> claim.Verdict:
    return claim.conclude(checks(rows))


def checks(rows: claim.Rows) -> Iterator[Check]:
    spreads = where(rows, part="spread")
    for row in spreads:
        name = f"{row['family']}, {row['ids']} ids"
        deviation, chance = row["deviation"], row["both_if_shared"]
        found = f"deviation {deviation:.2f} of chance's, P(next shared) {chance:.2g}"
        if row["family"] == "affine":
            holds = 0.5 < chance < 0.8
            what = f"{name}: rows that share a block share the next 2 times in 3"
            if row["ids"] in ("consecutive", "1024 apart"):
                what, holds = (
                    what + ", and loads vary 20 times as much as by chance",
                    holds and deviation > 20,
                )
        else:
            what = f"{name}: starts spread, and are shared, as by chance"
            slack = max(0.1, 5 / sqrt(2 * row["seeds"]))
            holds = abs(deviation - 1) < slack and all(
                abs(row[z]) < RIGHT for z in ("z_mean", "z_shared", "z_both")
            )
        yield Check(what, holds, found)
    flat = where(rows, part="flat vector")
    for row in flat:
        name = f"{row['family']}, flat vector, signs: {row['signs']}"
        if "z_textbook" in row:
            z = row["z_mean"]
            yield Check(
                f"{row['family']}: loads have the mean chi-square M - Z", abs(z) < RIGHT, f"z {z:.1f}"
            )
            z = row["z_textbook"]
            yield Check(f"rejected, {row['family']}: its textbook variance", z > RIGHT, f"z {z:.0f}")
        elif row["family"] == "affine" and row["signs"] == "none":
            many_times = row["variance_ratio"]
            yield Check(
                f"{name}: variance over 20 times the formula", many_times > 20, f"{many_times:.0f} times"
            )
        else:
            z = row["z_variance"]
            yield Check(f"{name}: variance of the norm as derived", abs(z) < RIGHT, f"z {z:.1f}")
    again = where(rows, part="repeated")
    for family in ("ideal", "mix"):
        total = sum(row["repeated"] for row in where(again, family=family))
        yield Check(f"{family}: no row repeats another", total == 0, f"{total} rows")
    for row in where(again, family="affine", hash_seed=PUBLISHED_SEED):
        what = "affine, published seed: over 10,000 of a million rows repeat another"
        yield Check(what, row["repeated"] > 10_000, f"{row['repeated']:,} rows")


def plot(rows: claim.Rows):
    figure, (even, joint, norms, again) = claim.figure(2, 2, "Where the hash puts blocks")
    for i, family in enumerate(FAMILIES):
        for ids, style in (("consecutive", "-"), ("real", "--")):
            chosen = where(rows, part="quantile", family=family, ids=ids)
            level, value = ([row[name] for row in chosen] for name in ("level", "value"))
            if chosen:
                even.plot(level, value, f"C{i}{style}", label=f"{family}, {ids} ids")
    even.set(yscale="symlog", xlabel="share of the seeds", ylabel="chi-square of the starts, standardised")
    even.set_title("evenness (ideal and mix coincide)")

    kinds = list(dict.fromkeys(row["ids"] for row in where(rows, part="spread")))
    for i, family in enumerate(FAMILIES):
        chosen = where(rows, part="spread", family=family)
        x = np.arange(len(kinds)) + 0.2 * (i - 1)
        y = np.array([row["both_if_shared"] for row in chosen])
        spread = np.abs([[row["low"], row["high"]] - value for row, value in zip(chosen, y, strict=True)]).T
        joint.errorbar(x, y, spread, color=f"C{i}", fmt="o", capsize=3, label=f"{family}, 95%")
    joint.axhline(2 / 3, color="k", linestyle="--", label="2/3")
    joint.axhline(1 / PLACES, color="k", linestyle=":", label="1/M")
    joint.set(yscale="log", ylabel="P(next block shared, if one is)", title="rows that share a block")
    joint.set_xticks(range(len(kinds)), kinds)

    chosen = [row for row in where(rows, part="flat vector") if "variance_ratio" in row]
    for i, row in enumerate(chosen):
        color = f"C{FAMILIES.index(row['family'])}"
        norms.errorbar(i, row["variance_ratio"], row["half_interval"], color=color, fmt="o", capsize=3)
    norms.axhline(1, color="k", linestyle="--", label="independent starts")
    norms.set(yscale="log", ylabel="variance, measured / formula", title="norm of a flat vector, 95%")
    names = [f"{row['family']}\n{'no signs' if row['signs'] == 'none' else 'signs'}" for row in chosen]
    norms.set_xticks(range(len(chosen)), names)

    for i, family in enumerate(FAMILIES):
        chosen = where(rows, part="repeated", family=family)
        x = np.arange(len(chosen)) + 0.25 * (i - 1)
        again.bar(x, [row["repeated"] for row in chosen], 0.25, color=f"C{i}", label=family)
    again.set_xticks(range(len(chosen)), [str(row["hash_seed"]) for row in chosen])
    again.set(yscale="symlog", ylim=(0, 1e6), xlabel="seed of the hash", ylabel="rows that repeat another")
    again.set_title("a million rows in a million weights")
    for ax in (even, joint, norms, again):
        ax.legend(fontsize="small")
    return figure


@dataclass(frozen=True)
class Options(claim.SeededOptions):
    data: Path | None = None
    """Take real ids from this raw log or prepared folder too."""


if __name__ == "__main__":
    claim.main(Options)
