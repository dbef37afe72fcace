"""Quality of click predictions: exact AUC, of all rows and by group, log loss, calibration, base rate.

With `weight` (N,), finite and at least 0, each row counts so much instead of 1: a mean is over the sum of the
weights, and a pair of an AUC counts the product of both.
"""

import numpy as np

CHUNK = 1 << 20  # rows whose losses are in memory at a time
BINS = 20  # of a reliability curve


def auc(label: np.ndarray, score: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Area under the ROC curve: P(score of a click > score of a non-click), ties counted half.

    label (N,) 0 or 1; score (N,) any float, logits or probabilities (logits tie less often). Exact:
    the pairs are counted in integers. NaN if a class is missing or a score is NaN.
    """
    clicks = label > 0.5
    if weight is not None:
        return _weighted_auc(clicks, score, weight.astype(np.float64))
    positive, negative = np.sort(score[clicks]), np.sort(score[~clicks])
    if not len(positive) or not len(negative) or np.isnan(positive[-1]) or np.isnan(negative[-1]):
        return float("nan")
    # Both sides sorted, so the binary searches walk through memory in order.
    below = int(np.searchsorted(negative, positive, "left").sum())
    not_above = int(np.searchsorted(negative, positive, "right").sum())
    return (below + not_above) / (2 * len(positive) * len(negative))


def _weighted_auc(clicks: np.ndarray, score: np.ndarray, weight: np.ndarray) -> float:
    order = np.argsort(score[~clicks])
    negative, before = score[~clicks][order], np.append(0, np.cumsum(weight[~clicks][order]))
    positive, counts = score[clicks], weight[clicks]
    if np.isnan(score).any() or not counts.sum() or not before[-1]:
        return float("nan")
    twice = sum(before[np.searchsorted(negative, positive, side)] for side in ("left", "right"))
    return float((counts * twice).sum() / (2 * counts.sum() * before[-1]))


def grouped_auc(
    label: np.ndarray, score: np.ndarray, group: np.ndarray, weight: np.ndarray | None = None
) -> dict[str, float | int | None]:
    """The mean of the AUCs of groups of rows, weighted by their rows (GAUC: Zhu et al., 2017).

    group (N,): rows of one number are a group. Groups of one class have no AUC, and are left out: `rows` and
    `groups` count the others. `auc` is None where there are none, or a score is NaN.
    """
    order = np.lexsort((score, group))
    clicks, score, group = label[order] > 0.5, score[order], group[order]
    begins = np.append(True, group[1:] != group[:-1])
    # Runs of rows of one group and one score; those that begin a group.
    runs = np.flatnonzero(begins | np.append(True, score[1:] != score[:-1]))
    first = np.flatnonzero(begins[runs])
    if weight is None:
        positive = np.add.reduceat(clicks, runs, dtype=np.int64)
        negative = np.diff(runs, append=len(group)) - positive
    else:
        counts = weight[order].astype(np.float64)
        positive, negative = (np.add.reduceat(counts * of, runs) for of in (clicks, ~clicks))
    below = np.cumsum(negative) - negative
    below -= np.repeat(below[first], np.diff(first, append=len(runs)))
    # Twice the pairs in the right order, ties counted half.
    right, positives, negatives = (
        np.add.reduceat(values, first) for values in (positive * (2 * below + negative), positive, negative)
    )
    both = (positives > 0) & (negatives > 0)
    size = (positives + negatives)[both]
    rows = np.diff(runs[first], append=len(group))[both]
    found = right[both] / (2 * positives[both] * negatives[both])
    known = rows.size > 0 and not np.isnan(score).any()
    return {
        "auc": float(found @ size / size.sum()) if known else None,
        "groups": int(both.sum()),
        "groups_of_one_class": int((~both).sum()),
        "rows": int(rows.sum()),
    }


def log_loss(label: np.ndarray, logits: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Mean of -log(probability of what happened), in nats, from logits (N,) and label (N,) 0 or 1."""
    total = 0.0
    for start in range(0, len(logits), CHUNK):
        x = logits[start : start + CHUNK].astype(np.float64)
        y = label[start : start + CHUNK]
        losses = np.logaddexp(0, x) - x * y
        total += float(losses.sum() if weight is None else (losses * weight[start : start + CHUNK]).sum())
    return total / _count(logits, weight)


def _count(rows: np.ndarray, weight: np.ndarray | None) -> float:
    """How much rows count together."""
    return max(len(rows), 1) if weight is None else float(weight.sum(dtype=np.float64))


def entropy(rate: float) -> float:
    """Log loss of predicting `rate` for every row when that is the share of clicks."""
    return float(-sum(p * np.log(p) for p in (rate, 1 - rate) if p > 0))


@np.errstate(invalid="ignore")  # A NaN stays one.
def probability(logits: np.ndarray) -> np.ndarray:
    """The sigmoid of logits, float64, without overflow."""
    return np.exp(-np.logaddexp(0, -logits.astype(np.float64)))


def mean_probability(logits: np.ndarray, weight: np.ndarray | None = None) -> float:
    total = 0.0
    for start in range(0, len(logits), CHUNK):
        part = probability(logits[start : start + CHUNK])
        total += float(part.sum() if weight is None else (part * weight[start : start + CHUNK]).sum())
    return total / _count(logits, weight)


def reliability(
    label: np.ndarray, logits: np.ndarray, weight: np.ndarray | None = None
) -> list[dict[str, float | int]]:
    """What was predicted, and what came: `probability` and `base_rate` are the means of `rows` rows, in up to
    BINS parts of about as many rows, from the lowest predictions to the highest.

    Rows of one prediction stay together. There is no part where a logit is not finite, or all weights are 0.
    """
    if not len(logits) or not np.isfinite(logits).all():
        return []
    edges = np.sort(logits)[len(logits) * np.arange(1, BINS) // BINS]
    sums = np.zeros((4, BINS))
    for start in range(0, len(logits), CHUNK):
        x, y = logits[start : start + CHUNK], label[start : start + CHUNK]
        part = np.searchsorted(edges, x, "right")
        counts = 1 if weight is None else weight[start : start + CHUNK].astype(np.float64)
        of_rows = None if weight is None else counts
        for total, weights in zip(sums, (None, of_rows, y * counts, probability(x) * counts), strict=True):
            total += np.bincount(part, weights, BINS)
    return [
        {"probability": predicted / count, "base_rate": clicks / count, "rows": int(rows)}
        for rows, count, clicks, predicted in sums.T.tolist()
        if count
    ]


@np.errstate(invalid="ignore")  # Logits that are not finite are told by None.
def summary(
    label: np.ndarray, logits: np.ndarray, weight: np.ndarray | None = None
) -> dict[str, float | None]:
    """All metrics of predictions. `normalised_entropy` is the log loss over that of the base rate
    (He et al., 2014): below 1 the model knows something. `calibration` is the mean probability over the base
    rate. With one class alone, normalised entropy and AUC are None, and without a click calibration; and so
    is whatever logits that are not finite make infinite or NaN."""
    if weight is None:
        rate = float(np.mean(label, dtype=np.float64))
    else:
        rate = float(np.average(label, weights=weight.astype(np.float64)))
    loss = log_loss(label, logits, weight)
    two_classes = 0 < rate < 1
    lowest, highest = probability(np.array([logits.min(), logits.max()])).tolist()
    found = {
        "auc": auc(label, logits, weight) if two_classes else None,
        "log_loss": loss,
        "normalised_entropy": loss / entropy(rate) if two_classes else None,
        "calibration": mean_probability(logits, weight) / rate if rate else None,
        "base_rate": rate,
        "lowest_probability": lowest,
        "highest_probability": highest,
        "rows": len(label),
    }
    return {name: None if value is None or not np.isfinite(value) else value for name, value in found.items()}


def all_alike(lowest: float, highest: float) -> bool:
    """Whether probabilities between these two tell no row from another: the odds differ by 0.1% at most."""
    return highest - lowest <= max(1e-9, 1e-3 * min(lowest, 1 - highest))


def is_constant(found: dict) -> bool:
    """Whether predictions tell no row from another, from their `summary`; those of old runs do not say."""
    lowest, highest = found.get("lowest_probability"), found.get("highest_probability")
    return None not in (lowest, highest) and found["rows"] > 1 and all_alike(lowest, highest)


def trouble(found: dict) -> str | None:
    """Why predictions are of no use, in a few words, from their `summary`; None if they are of some."""
    loss, share = found["log_loss"], found["normalised_entropy"]
    if loss is None:
        return "some predictions are not finite"
    if is_constant(found):
        return f"every row gets the probability {found['lowest_probability']:.4g}"
    if share is not None and share >= 1:
        return (
            f"a log loss of {loss:.4g} is no better than the {loss / share:.4g} of predicting the base rate "
            f"{found['base_rate']:.4f} for every row"
        )
    return None
