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


def summary(label: np.ndarray, logits: np.ndarray) -> dict[str, float | None]:
    """All metrics of predictions. `normalised_entropy` is the log loss over that of the base rate
    (He et al., 2014): below 1 the model knows something. With one class alone, it and the AUC are None."""
    rate = float(np.mean(label, dtype=np.float64))
    loss = log_loss(label, logits)
    two_classes = 0 < rate < 1
    return {
        "auc": auc(label, logits) if two_classes else None,
        "log_loss": loss,
        "normalised_entropy": loss / entropy(rate) if two_classes else None,
        "base_rate": rate,
        "rows": len(label),
    }
