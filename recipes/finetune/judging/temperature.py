"""Temperature scaling: one number, fitted on validation, by which all logits of a question are divided.

It takes out the part of a miscalibration that is over- or underconfidence, and changes no ranking and no call of the
likeliest class. An arm that only makes a network less sure of itself differs from the baseline in log loss and ECE, and
no longer once both are scaled.

References:
    C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On calibration of modern neural networks", ICML 2017.
"""

import numpy as np
from scipy import optimize, special

from ..data.tasks import Task

SMALLEST, LARGEST = 0.05, 20.0
WHOLE = "all classes"


def fit_temperatures(task: Task, labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The temperatures with the lowest log loss on these cases: one for all classes, (1,), or one per label, (labels,).

    Each label is a question of its own with its own sigmoid, and the log loss of all is the sum of theirs. One
    temperature for all of them would draw the rare ones, whose logits lie far below 0, towards a half along with the
    others.

    Where there is nothing to fit, the temperature is 1: where all cases have the same class, and where the likeliest
    class is right in every case, so that the loss falls for ever as the temperature does.
    """
    if not task.multi_label:
        return np.array([_fit(np.log(_clipped(probabilities)), labels)])
    columns = zip(_clipped(probabilities).T, labels.T, strict=True)
    return np.array([_fit(np.log(np.stack([1 - likely, likely], axis=1)), of_label) for likely, of_label in columns])


def scale(task: Task, probabilities: np.ndarray, temperatures: np.ndarray) -> np.ndarray:
    """The probabilities of the logits over their temperatures."""
    if task.multi_label:
        return special.expit(special.logit(_clipped(probabilities)) / temperatures)
    return special.softmax(np.log(_clipped(probabilities)) / temperatures, axis=1)


def named(task: Task, temperatures: np.ndarray) -> dict[str, float]:
    """Temperatures by label, or by WHOLE."""
    names = task.classes if task.multi_label else (WHOLE,)
    return dict(zip(names, temperatures.tolist(), strict=True))


def _fit(logits: np.ndarray, labels: np.ndarray) -> float:
    """Where the derivative of the log loss by 1 / temperature, in which it is convex, is 0; at most LARGEST."""
    ahead = logits - np.take_along_axis(logits, labels[:, None], axis=1)  # of the true class
    if len(np.unique(labels)) < 2 or ahead.max() <= 0:
        return 1.0

    def derivative(sharpness: float) -> float:
        return float((special.softmax(sharpness * ahead, axis=1) * ahead).sum(axis=1).mean())

    dull, sharp = 1 / LARGEST, 1 / SMALLEST
    if derivative(dull) >= 0:
        return LARGEST
    if derivative(sharp) <= 0:
        return SMALLEST
    return 1 / optimize.brentq(derivative, dull, sharp)


def _clipped(probabilities: np.ndarray) -> np.ndarray:
    smallest = np.finfo(probabilities.dtype).eps  # as log loss is
    return np.clip(probabilities, smallest, 1 - smallest)
