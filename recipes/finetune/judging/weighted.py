"""Figures under many weightings of the cases at once: scikit-learn's take one, and sort or count anew for each.

A bootstrap resample is a weighting by how often each case was drawn. All functions take weights of shape (N, B), counts
whose sums float32 holds exactly, and return (B,), NaN where the weighted cases leave the figure undefined. What is
defined equals scikit-learn's with `sample_weight`.
"""

import numpy as np


def mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean of one value per case, (N,): a loss, or whether the case was right."""
    totals = np.einsum("n,nb->b", values, weights, dtype=np.float64)
    return totals / weights.sum(axis=0, dtype=np.float64)


def auroc(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The area under the ROC curve of bool (N,) by scores (N,); tied scores count half."""
    negatives = np.flatnonzero(~positive)
    negatives = negatives[np.argsort(scores[negatives])]
    below = np.zeros((len(negatives) + 1, weights.shape[1]), dtype=np.float32)
    np.cumsum(weights[negatives], axis=0, out=below[1:])
    first, last = (np.searchsorted(scores[negatives], scores[positive], side) for side in ("left", "right"))
    won = np.einsum("nb,nb->b", weights[positive], (below[first] + below[last]) / 2, dtype=np.float64)
    return _ratio(won, weights[positive].sum(axis=0, dtype=np.float64) * below[-1])


def average_precision(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The area under the precision-recall curve, as steps, of bool (N,) by scores (N,)."""
    order = np.argsort(-scores)
    thresholds = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    drawn = weights[order]
    above = np.cumsum(drawn, axis=0)[thresholds]
    found = np.cumsum(drawn * positive[order, None], axis=0)[thresholds]
    gained = np.diff(found, axis=0, prepend=0)
    total = found[-1].astype(np.float64)
    area = np.einsum("nb,nb->b", gained, found / np.maximum(above, 1), dtype=np.float64)
    return np.where(total < above[-1], _ratio(area, total), np.nan)


def f1(positive: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The harmonic mean of precision and recall, of bool (N,) and (N,)."""
    counts = _confusion(positive.astype(int), predicted.astype(int), 2, weights)
    (_, false), (missed, found) = counts
    both = (counts.sum(axis=1) > 0).all(axis=0)
    return np.where(both, _ratio(2 * found, 2 * found + false + missed), np.nan)


def calibration_error(outcomes: np.ndarray, confidence: np.ndarray, bins: int, weights: np.ndarray) -> np.ndarray:
    """How far the share of outcomes is from the confidence, (N,) and (N,), on average over equal bins of it."""
    bin_of = np.searchsorted(np.linspace(0, 1, bins + 1), confidence, side="right")
    apart = outcomes - confidence
    in_bins = [bin_of == k for k in np.unique(bin_of)]
    gaps = [np.einsum("n,nb->b", apart[rows], weights[rows], dtype=np.float64) for rows in in_bins]
    return np.abs(gaps).sum(axis=0) / weights.sum(axis=0, dtype=np.float64)


def balanced_accuracy(labels: np.ndarray, predicted: np.ndarray, classes: int, weights: np.ndarray) -> np.ndarray:
    """The mean recall over the classes that have cases, two of them at least; labels and predicted are indices (N,)."""
    counts = _confusion(labels, predicted, classes, weights)
    recalls = _ratio(np.einsum("kkb->kb", counts), counts.sum(axis=1))
    present = np.isfinite(recalls).sum(axis=0)
    return np.where(present > 1, _ratio(np.nansum(recalls, axis=0), present), np.nan)


def kappa(
    labels: np.ndarray, predicted: np.ndarray, classes: int, weights: np.ndarray, quadratic: bool = False
) -> np.ndarray:
    """Cohen's kappa of class indices (N,), agreement beyond chance, where the cases have two classes at least.

    Args:
        quadratic: count a disagreement by the square of its distance, for classes that have an order.
    """
    counts = _confusion(labels, predicted, classes, weights)
    k = np.arange(classes)
    cost = (k[:, None] - k) ** 2 if quadratic else k[:, None] != k
    expected = np.einsum("ib,jb->ijb", counts.sum(axis=1), counts.sum(axis=0))
    total = counts.sum(axis=(0, 1))
    observed, by_chance = (np.einsum("ij,ijb->b", cost.astype(np.float64), table) for table in (counts, expected))
    several = (counts.sum(axis=1) > 0).sum(axis=0) > 1
    return np.where(several, 1 - _ratio(observed * total, by_chance), np.nan)


def _confusion(labels: np.ndarray, predicted: np.ndarray, classes: int, weights: np.ndarray) -> np.ndarray:
    """How many cases of class i were called j, float64 (classes, classes, B)."""
    cells = labels * classes + predicted
    order = np.argsort(cells)
    present, first = np.unique(cells[order], return_index=True)
    counts = np.zeros((classes * classes, weights.shape[1]))
    counts[present] = np.add.reduceat(weights[order], first, axis=0)
    return counts.reshape(classes, classes, -1)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)
