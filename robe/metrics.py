"""Quality of click predictions: exact AUC, log loss, normalised entropy, base rate."""

import numpy as np

CHUNK = 1 << 20  # rows whose losses are in memory at a time


def auc(label: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve: P(score of a click > score of a non-click), ties counted half.

    label (N,) 0 or 1; score (N,) any float, logits or probabilities (logits tie less often). Exact:
    the pairs are counted in integers. NaN if a class is missing or a score is NaN.
    """
    clicks = label > 0.5
    positive, negative = np.sort(score[clicks]), np.sort(score[~clicks])
    if not len(positive) or not len(negative) or np.isnan(positive[-1]) or np.isnan(negative[-1]):
        return float("nan")
    # Both sides sorted, so the binary searches walk through memory in order.
    below = int(np.searchsorted(negative, positive, "left").sum())
    not_above = int(np.searchsorted(negative, positive, "right").sum())
    return (below + not_above) / (2 * len(positive) * len(negative))


def log_loss(label: np.ndarray, logits: np.ndarray) -> float:
    """Mean of -log(probability of what happened), in nats, from logits (N,) and label (N,) 0 or 1."""
    total = 0.0
    for start in range(0, len(logits), CHUNK):
        x = logits[start : start + CHUNK].astype(np.float64)
        y = label[start : start + CHUNK]
        total += float((np.logaddexp(0, x) - x * y).sum())
    return total / max(len(logits), 1)


def entropy(rate: float) -> float:
    """Log loss of predicting `rate` for every row when that is the share of clicks."""
    return float(-sum(p * np.log(p) for p in (rate, 1 - rate) if p > 0))


@np.errstate(invalid="ignore")  # A NaN stays one.
def probability(logits: np.ndarray) -> np.ndarray:
    """The sigmoid of logits, float64, without overflow."""
    return np.exp(-np.logaddexp(0, -logits.astype(np.float64)))


@np.errstate(invalid="ignore")  # Logits that are not finite are told by None.
def summary(label: np.ndarray, logits: np.ndarray) -> dict[str, float | None]:
    """All metrics of predictions. `normalised_entropy` is the log loss over that of the base rate
    (He et al., 2014): below 1 the model knows something. With one class alone, it and the AUC are None; and
    so is whatever logits that are not finite make infinite or NaN."""
    rate = float(np.mean(label, dtype=np.float64))
    loss = log_loss(label, logits)
    two_classes = 0 < rate < 1
    lowest, highest = probability(np.array([logits.min(), logits.max()])).tolist()
    found = {
        "auc": auc(label, logits) if two_classes else None,
        "log_loss": loss,
        "normalised_entropy": loss / entropy(rate) if two_classes else None,
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
