"""Why a smaller array takes more steps, and why signs take fewer.

Claims (our derivation, linear models):

1. Gradients. Added into the array, a gradient g (n,) keeps its squared length on average with signs. Without,
   it gains ((sum g)^2 - sum over blocks of (sum of g in the block)^2) / M: n/M times, where all agree.
2. Conditioning. N samples of F active tokens each, all different, have the Gram matrix F I in a full table.
   In M > N shared weights its eigenvalues spread as Marchenko and Pastur's: with gamma = N / M the largest is
   F (1 + sqrt(gamma))^2 and the condition number ((1 + sqrt(gamma)) / (1 - sqrt(gamma)))^2, by which gradient
   descent to a tolerance takes at most ln(1 / tolerance) / ln((kappa + 1) / (kappa - 1)) steps.
3. Signs. Without them one eigenvalue stands out at about N F^2 / M + F + 1, if F sqrt(N / M) > 1, in the
   direction in which all samples agree, and descent takes several times as many steps.
4. Learning rate. The largest curvature grows from that of the full table by a factor from 1 + r / M to
   (1 + sqrt(r / M))^2, to a tenth, with r = trace / largest eigenvalue of the full table's: keep the rate
   where r is much smaller than M (Zipf-distributed data), and lower it by that factor otherwise, not by
   M / n. Shown for curvatures that are spread evenly over all elements.
5. Floor. What sharing cannot represent acts as noise in the labels: one-pass gradient descent at the rate eta
   ends at 2 L / (2 - eta F), L the least squared error that the array allows (leading order; within 10%
   here). So decay the rate, rather than starting with less.

Conditions: as said in each; non-linear models and Adagrad are not covered.

Measured: with the hash of kernels/parts/hashing.py and several seeds of it. The formulas of signed hashing
must be rejected for unsigned, and the floor L alone for large rates.

    python analysis/convergence.py [--quick] [--seed N] [--out DIR]
"""

from collections.abc import Iterator
from math import log, sqrt

import numpy as np
from numba import njit
from scipy.sparse.linalg import LinearOperator, cg

from analysis import claim
from analysis.claim import RIGHT, WRONG, Check, where
from analysis.sample_tables import zipf_rows
from analysis.sketch import chunks, draw, project, trials

SAMPLES, ACTIVE = 300, 26  # N and F
TOLERANCE = 1e-3
FIELDS, VOCABULARY, BLOCK = 10, 2000, 16  # of one-pass descent


def bound(samples: int, active: int, memory: int) -> tuple[float, float, float]:
    """Largest eigenvalue, condition number and steps of gradient descent, with signs; memory > samples."""
    root = sqrt(samples / memory)
    kappa = ((1 + root) / (1 - root)) ** 2
    return active * (1 + root) ** 2, kappa, log(1 / TOLERANCE) / log((kappa + 1) / (kappa - 1))


def spike(samples: int, active: int, memory: int) -> float:
    """Largest eigenvalue without signs."""
    return samples * active**2 / memory + active + 1


def curvature_range(rank: float, memory: int) -> tuple[float, float]:
    return 1 + rank / memory, (1 + sqrt(rank / memory)) ** 2


def floor(least: float, rate: float) -> float:
    """Squared error where one-pass descent ends, rate = eta F."""
    return 2 * least / (2 - rate)


def measure(quick: bool = False, seed: int = 0) -> claim.Rows:
    """Rows by `part`: gradient, conditioning, curvature, floor."""
    return [
        *gradients(quick, seed),
        *conditioning(quick, seed),
        *curvature(quick, seed),
        *one_pass(quick, seed),
    ]


def gradients(quick: bool, seed: int) -> Iterator[dict]:
    n, memory, block, count = 4000, 100, BLOCK, 300 if quick else 2000
    for agreeing in (False, True):
        g = np.ones(n) if agreeing else np.random.default_rng([seed, 1]).normal(size=n)
        for signed in (True, False):
            lengths = []
            for seeds in chunks(trials(seed, count, 1), n):
                slots, signs = draw(seeds, n, block, memory)
                values = np.broadcast_to(g * (signs if signed else 1), slots.shape)
                lengths.append((project(values, slots, memory) ** 2).sum(axis=1) / (g @ g))
            lengths = np.concatenate(lengths)
            blocks = g.reshape(-1, block).sum(axis=1)
            gain = 0 if signed else (g.sum() ** 2 - blocks @ blocks) / memory / (g @ g)
            mean, half = claim.mean_interval(lengths)
            row = {"part": "gradient", "agreeing": agreeing, "signed": signed, "memory": memory, "n": n}
            row |= {"formula": 1 + gain, "measured": mean, "half_interval": half}
            yield row | {"z": claim.z_mean(lengths, 1 + gain), "z_as_signed": claim.z_mean(lengths, 1.0)}


def conditioning(quick: bool, seed: int) -> Iterator[dict]:
    """Spectra of the Gram matrix, and descent to the tolerance on random targets."""
    n = SAMPLES * ACTIVE
    for memory in (600, 1000, 3000) if quick else (450, 600, 1000, 3000, 10_000):
        largest, kappa, steps = bound(SAMPLES, ACTIVE, memory)
        for block in (1, 16):
            for signed in (True, False):
                found = []
                for trial in range(5 if quick else 10):
                    rng = np.random.default_rng([seed, 2, memory, block, trial])
                    slots, signs = (a[0] for a in draw(rng.integers(0, 2**32, 1), n, block, memory))
                    # Which tokens a sample has is random, so that blocks do not fall together with samples.
                    of = rng.permutation(n).reshape(SAMPLES, ACTIVE)
                    values = signs[of].astype(float) if signed else np.ones(of.shape)
                    sketches = project(values, slots[of], memory)
                    found.append(spectrum(sketches @ sketches.T, rng))
                found = np.array(found)
                columns = {"part": "conditioning", "memory": memory, "block": block, "signed": signed}
                columns |= {"gamma": SAMPLES / memory, "bound_largest": largest, "bound_kappa": kappa}
                columns |= {"bound_steps": steps, "spike": spike(SAMPLES, ACTIVE, memory)}
                for name, values in zip(("largest", "kappa", "steps"), found.T, strict=True):
                    columns[name], columns[f"{name}_half"] = claim.mean_interval(values)
                yield columns


def spectrum(gram: np.ndarray, rng: np.random.Generator) -> tuple[float, float, int]:
    """Largest eigenvalue, condition number, and steps of gradient descent at its best constant rate."""
    values = np.linalg.eigvalsh(gram)
    low, high = values[0], values[-1]
    # In the eigenvectors' coordinates random targets are random too, and each shrinks on its own.
    target, shrink = rng.normal(size=values.size), 1 - 2 / (low + high) * values
    for step in range(100_000):
        if np.linalg.norm(target * shrink**step) <= TOLERANCE * np.linalg.norm(target):
            break
    return high, high / low, step


def curvature(quick: bool, seed: int) -> Iterator[dict]:
    """Largest eigenvalue of S H S^T, S the hashing, for projections H on random subspaces of dimension r."""
    n = 2000 if quick else 4000
    for rank in (50, 200) if quick else (50, 200, 500):
        for memory in (200, 1000, 5000):
            ratios = []
            for trial in range(3 if quick else 5):
                rng = np.random.default_rng([seed, 3, rank, memory, trial])
                basis = np.linalg.qr(rng.normal(size=(n, rank)))[0]
                slots, signs = draw(rng.integers(0, 2**32, 1), n, BLOCK, memory)
                sketch = project(basis.T * signs, np.repeat(slots, rank, axis=0), memory)
                ratios.append(np.linalg.eigvalsh(sketch @ sketch.T)[-1])
            low, high = curvature_range(rank, memory)
            mean, half = claim.mean_interval(ratios)
            row = {"part": "curvature", "rank": rank, "memory": memory, "low": low, "high": high, "n": n}
            yield row | {"measured": mean, "half_interval": half}


def one_pass(quick: bool, seed: int) -> Iterator[dict]:
    """Squared error, relative to that of zero weights, at the end of one pass at a constant rate."""
    n, steps = FIELDS * VOCABULARY, 40_000 if quick else 150_000
    law = zipf_rows(VOCABULARY, 1.05)
    law /= law.sum()
    for compression in (10, 40) if quick else (4, 10, 40, 100):
        memory, found = n // compression, {}
        for trial in range(3 if quick else 5):
            rng = np.random.default_rng([seed, 4, compression, trial])
            slots, signs = (a[0] for a in draw(rng.integers(0, 2**32, 1), n, BLOCK, memory))
            truth = rng.normal(size=n)
            ids = rng.choice(VOCABULARY, (steps, FIELDS), p=law) + VOCABULARY * np.arange(FIELDS)
            energy = second_moment(truth, law) @ truth
            least = least_error(slots, signs, truth, law, memory) / energy
            for rate in (0.2, 0.4, 0.7, 1.0):
                errors = descend(ids, slots, signs.astype(float), truth, memory, rate / FIELDS)
                found.setdefault(rate, []).append((errors[len(errors) // 2 :].mean() / energy, least))
        for rate, values in found.items():
            error, least = np.array(values).T
            # Per trial, as the floor differs from hash to hash.
            ratio, ratio_half = claim.mean_interval(error / floor(least, rate))
            mean, half = claim.mean_interval(error)
            row = {
                "part": "floor",
                "compression": compression,
                "memory": memory,
                "rate": rate,
                "steps": steps,
            }
            row |= {"least": float(least.mean()), "formula": floor(float(least.mean()), rate)}
            yield row | {"measured": mean, "half_interval": half, "ratio": ratio, "ratio_half": ratio_half}


def second_moment(vector: np.ndarray, law: np.ndarray) -> np.ndarray:
    """E[z z^T] vector, z the row of ones at one token of each field, drawn by `law` independently."""
    parts = vector.reshape(FIELDS, -1)
    means = parts @ law
    # Different fields meet with the product of their probabilities; within one, a token meets itself alone.
    return (law * (parts + means.sum() - means[:, None])).ravel()


def least_error(slots, signs, truth, law, memory: int) -> float:
    """Expected squared error of the best weights of the array, of labels <z, truth>."""

    def shared(vector):
        return np.bincount(slots, signs * vector, memory)

    def curve(theta):
        return shared(second_moment(signs * theta[slots], law))

    goal = second_moment(truth, law)
    best, _ = cg(LinearOperator((memory, memory), curve, dtype=float), shared(goal), rtol=1e-8, maxiter=5000)
    left = truth - signs * best[slots]
    return float(left @ second_moment(left, law))


@njit(cache=True)
def descend(ids, slots, signs, truth, memory, rate):
    """Squared errors (steps,) before each step, of labels <z, truth>; ids (steps, F) index the table."""
    theta = np.zeros(memory)
    errors = np.empty(len(ids))
    for step in range(len(ids)):
        error = 0.0
        for i in ids[step]:
            error += signs[i] * theta[slots[i]] - truth[i]
        errors[step] = error * error
        for i in ids[step]:
            theta[slots[i]] -= rate * error * signs[i]
    return errors


def verdict(rows: claim.Rows) -> claim.Verdict:
    return claim.conclude(checks(rows))


def with_signs(rows: claim.Rows, row: dict) -> dict:
    """The same measurement with signs."""
    return where(rows, part=row["part"], memory=row["memory"], block=row["block"], signed=True)[0]


def checks(rows: claim.Rows) -> Iterator[Check]:
    for row in where(rows, part="gradient"):
        name = "gradients that " + ("agree, " if row["agreeing"] else "differ, ")
        name += "signs" if row["signed"] else "no signs"
        found = f"{row['measured']:.3f}, z {row['z']:.1f}"
        yield Check(f"{name}: squared length times {row['formula']:.3f}", abs(row["z"]) < RIGHT, found)
        if row["agreeing"] and not row["signed"]:
            z = row["z_as_signed"]
            yield Check("rejected: without signs the length stays", abs(z) > WRONG, f"z {z:.0f}")
    spectra = where(rows, part="conditioning")
    # Marchenko and Pastur's is the limit of large N; near gamma = 1 the smallest eigenvalue is far from it.
    signed = [row for row in spectra if row["signed"] and row["gamma"] <= 0.5]
    worst = max((abs(row["kappa"] / row["bound_kappa"] - 1) for row in signed), default=np.inf)
    yield Check("condition number within 15% where gamma <= 1/2", worst < 0.15, f"worst {worst:.0%}")
    slow = [row for row in where(spectra, signed=True) if row["steps"] > row["bound_steps"] + 1]
    yield Check(
        "descent takes no more steps than that allows", bool(signed) and not slow, f"{len(slow)} exceed"
    )
    unsigned = [row for row in where(spectra, signed=False) if ACTIVE**2 * row["gamma"] > 1]
    worst = max((abs(row["largest"] / row["spike"] - 1) for row in unsigned), default=np.inf)
    yield Check("largest eigenvalue without signs within 5%", worst < 0.05, f"worst {worst:.1%}")
    beyond = min((row["largest"] / row["bound_largest"] for row in unsigned), default=0)
    yield Check("rejected: it is that with signs", beyond > 1.1, f"at least {beyond:.2f} times it")
    times = [r["steps"] / with_signs(rows, r)["steps"] for r in unsigned if r["gamma"] >= 0.1]
    found = f"at least {min(times, default=0):.1f} times"
    yield Check("without signs over 1.5 times the steps, gamma >= 0.1", min(times, default=0) > 1.5, found)
    curves = where(rows, part="curvature")
    off = [row for row in curves if not 0.9 * row["low"] <= row["measured"] <= 1.1 * row["high"]]
    least = min((row["measured"] for row in curves), default=0)
    most = max((row["measured"] for row in curves), default=0)
    found = f"{len(off)} outside, of factors {least:.2f} to {most:.2f}"
    yield Check("curvature grows as said, to a tenth", bool(curves) and not off, found)
    for row in where(curves, rank=50, memory=200):
        grows = f"{row['measured']:.1f} times, n / M = {row['n'] / row['memory']:.0f}"
        yield Check("rejected: it grows by n / M", row["measured"] < 0.5 * row["n"] / row["memory"], grows)
    floors = where(rows, part="floor")
    worst = max((abs(row["ratio"] - 1) for row in floors), default=np.inf)
    yield Check("one pass ends at 2 L / (2 - eta F), within 10%", worst < 0.1, f"worst {worst:.0%}")
    fast = where(floors, rate=1.0)
    least = min((row["measured"] / row["least"] for row in fast), default=0)
    yield Check("rejected: it ends at L, at the rate 1 / F", least > 1.3, f"at least {least:.2f} L")


def plot(rows: claim.Rows):
    figure, (kappa, steps, curves, floors) = claim.figure(
        2, 2, "Steps and rates in a shared array, linear models"
    )
    spectra = where(rows, part="conditioning")
    memory = np.geomspace(min(row["memory"] for row in spectra), max(row["memory"] for row in spectra))
    for ax, name, index in ((kappa, "largest", 0), (steps, "steps", 2)):
        ax.plot(memory, [bound(SAMPLES, ACTIVE, m)[index] for m in memory], "k--", label="Marchenko-Pastur")
        for i, (signed, block) in enumerate(((True, 1), (True, 16), (False, 1), (False, 16))):
            chosen = where(spectra, signed=signed, block=block)
            values, half = [row[name] for row in chosen], [row[f"{name}_half"] for row in chosen]
            label = f"{'signs' if signed else 'no signs'}, Z = {block}"
            x = [row["memory"] * 1.03 ** (i - 1.5) for row in chosen]
            ax.errorbar(x, values, half, color=f"C{i}", fmt="o", markersize=4, capsize=3, label=label)
        ax.set(xscale="log", yscale="log", xlabel=f"slots M, for {SAMPLES} samples of {ACTIVE} tokens")
        claim.ticks(ax, [row["memory"] for row in spectra])
        claim.plain(ax.yaxis)
    kappa.plot(memory, [spike(SAMPLES, ACTIVE, m) for m in memory], "C2:", label="N F² / M + F + 1")
    kappa.set(ylabel="largest eigenvalue", title="conditioning")
    steps.set(ylabel=f"steps of descent to {TOLERANCE:g}", title="iterations (bound with signs)")

    chosen = where(rows, part="curvature")
    for i, rank in enumerate(dict.fromkeys(row["rank"] for row in chosen)):
        some = where(chosen, rank=rank)
        x = [row["memory"] for row in some]
        curves.fill_between(
            x, *([row[name] for row in some] for name in ("low", "high")), color=f"C{i}", alpha=0.2
        )
        values, half = ([row[name] for row in some] for name in ("measured", "half_interval"))
        curves.errorbar(
            x, values, half, color=f"C{i}", fmt="o", capsize=3, label=f"r = {rank}; band: formula"
        )
    curves.set(xscale="log", xlabel="slots M", ylabel="factor, 95%", title="growth of the largest curvature")
    claim.ticks(curves, x)

    chosen = where(rows, part="floor")
    rate = np.linspace(0.05, 1.05)
    for i, compression in enumerate(dict.fromkeys(row["compression"] for row in chosen)):
        some = where(chosen, compression=compression)
        floors.plot(rate, [floor(some[0]["least"], r) for r in rate], f"C{i}", label=f"n / M = {compression}")
        floors.axhline(some[0]["least"], color=f"C{i}", linestyle=":", linewidth=1)
        values, half = ([row[name] for row in some] for name in ("measured", "half_interval"))
        floors.errorbar([row["rate"] for row in some], values, half, color=f"C{i}", fmt="o", capsize=3)
    floors.set(
        xlabel="rate, eta F", ylabel="squared error at the end, 95%", title="one pass; dotted: least error L"
    )
    for ax in (kappa, steps, curves, floors):
        ax.legend(fontsize="small")
    return figure


if __name__ == "__main__":
    claim.main()
