"""Scores of predictions, from scikit-learn and torchmetrics. A metric is added to METRICS, and nowhere else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    f1_score,
    log_loss,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from ..data.tasks import Task
from . import weighted
from .temperature import fit_temperatures, scale

_BINS = 15

Thresholds = dict[str, np.ndarray]
# From which cases are positive, their probabilities of it, and which are predicted to be so, each (N,).
OfClass = Callable[[np.ndarray, np.ndarray, np.ndarray], float]
# The same, and how often each of B resamples holds each case, (N, B); (B,).
OfClassResampled = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Chosen:
    """What is chosen on validation, and used as it is on test.

    Attributes:
        thresholds: of a multi-label task, from choose_thresholds; None: 0.5.
        temperatures: from fit_temperatures; None: 1, so that what is scaled stays as it is.
    """

    thresholds: Thresholds | None = None
    temperatures: np.ndarray | None = None


@dataclass(frozen=True)
class Scored:
    """What a metric is computed from.

    Attributes:
        labels: class indices (N,), or 0 and 1 of shape (N, labels).
        probabilities: shape (N, outputs).
        chosen: on validation.
    """

    task: Task
    labels: np.ndarray
    probabilities: np.ndarray
    chosen: Chosen = Chosen()

    @cached_property
    def scaled(self) -> "Scored":
        """The same with the probabilities at the temperatures chosen on validation."""
        if self.chosen.temperatures is None:
            return self
        return replace(self, probabilities=scale(self.task, self.probabilities, self.chosen.temperatures))

    def above(self, metric: str) -> np.ndarray:
        """Of a multi-label task what is predicted at the thresholds of a metric, bool (N, labels)."""
        return self.probabilities >= (0.5 if self.chosen.thresholds is None else self.chosen.thresholds[metric])


@dataclass(frozen=True)
class Metric:
    """A figure of predictions.

    Attributes:
        title: as reports write it.
        of_class: its value for one class against the rest, not asked for where all cases or none are positive. None:
            it has none.
        of: its value over all; None where the labels leave it undefined. By default the mean of of_class.
        of_class_resampled, resampled: the same in many resamples of the cases at once, NaN where one leaves it
            undefined. Without them a difference has no interval but that over seeds, and no verdict.
        lower_is_better: as of a loss.
        aside: left out of the terminal's table, for that to fit a screen.
    """

    title: str
    of_class: OfClass | None = None
    of: Callable[[Scored], float | None] | None = None
    of_class_resampled: OfClassResampled | None = None
    resampled: Callable[[Scored, np.ndarray], np.ndarray] | None = None
    lower_is_better: bool = False
    aside: bool = False


def score(
    task: Task,
    labels: np.ndarray,
    probabilities: np.ndarray,
    chosen: Chosen = Chosen(),
    names: Sequence[str] | None = None,
) -> dict[str, float | None]:
    """The figures of METRICS, or those of these names; see Scored for the other arguments.

    Multi-label tasks get the mean over the labels that have positive and negative cases, and of accuracy, which needs
    no threshold but 0.5, over all. AUROC, AUPRC (average precision) and F1 are macro means over the classes that have
    positive and negative cases, of a binary task the figures of its positive class.
    The Brier score of several classes is the sum over classes, from 0 to 2. ECE has 15 bins, of the largest
    probability; of a binary task or a label, of the positive one. Both stand beside themselves after temperature
    scaling. Cohen's kappa weighs a disagreement of ordinal classes by the square of its distance.
    """
    scored = Scored(task, labels, probabilities, chosen)
    return {
        name: metric.of(scored) if metric.of else mean_of_known(list(_by_class(metric.of_class, scored).values()))
        for name, metric in METRICS.items()
        if names is None or name in names
    }


def per_class(
    task: Task, labels: np.ndarray, probabilities: np.ndarray, chosen: Chosen = Chosen()
) -> dict[str, dict[str, float | None]]:
    """The metrics that there are of each class against the rest, of a binary task of the positive one alone; None for a
    class that no case, or every case, has.
    """
    scored = Scored(task, labels, probabilities, chosen)
    named = [(name, metric.of_class) for name, metric in METRICS.items() if metric.of_class]
    by_metric = {name: _by_class(of_class, scored) for name, of_class in named}
    return {task.classes[k]: {name: by_metric[name][k] for name in by_metric} for k in positives(task, labels)}


def resample(scored: Scored, weights: np.ndarray, metrics: Sequence[str]) -> dict[str, np.ndarray]:
    """These of RESAMPLED in many resamples of the cases at once; NaN where one leaves a figure undefined.

    Args:
        weights: how often each resample holds each case, (N, B).

    Returns:
        Per metric (B,).
    """
    return {name: _resampled(METRICS[name], scored, weights) for name in metrics}


def resample_aurocs(scored: Scored, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The AUROC of each scored class in each resample, (B,)."""
    found = _by_class_resampled(METRICS["auroc"].of_class_resampled, scored, weights)
    return {scored.task.classes[k]: values for k, values in found.items()}


def choose(task: Task, labels: np.ndarray, probabilities: np.ndarray) -> Chosen:
    """What these predictions of validation choose."""
    return Chosen(choose_thresholds(task, labels, probabilities), fit_temperatures(task, labels, probabilities))


def choose_thresholds(task: Task, labels: np.ndarray, probabilities: np.ndarray) -> Thresholds | None:
    """Per label of a multi-label task the thresholds with the best F1 and the best balanced accuracy; None for classes.

    They are chosen on validation and used as they are on test. At 0.5 both figures of a rare label would say nothing
    but that it is rare. A label without positive or negative cases gets 0.5.
    """
    if not task.multi_label:
        return None
    f1, balanced = (np.full(len(task.classes), 0.5) for _ in range(2))
    for k, positive in positives(task, labels).items():
        if _has_both(positive):
            precision, recall, cuts = precision_recall_curve(positive, probabilities[:, k])
            f1[k] = cuts[np.argmax((precision * recall / np.maximum(precision + recall, 1e-12))[:-1])]
            balanced[k] = _balanced_cut(positive, probabilities[:, k])
    return {"f1": f1, "balanced_accuracy": balanced}


def operating_points(task: Task, labels: np.ndarray, probabilities: np.ndarray) -> dict[int, float]:
    """Per label, or for the positive class of a binary task, the probability from which a case is called positive.

    It is chosen on validation, where sensitivity and specificity together are best; 0.5 where validation has no
    positive or no negative cases. None for several classes, of which the likeliest is called.
    """
    if task.kind not in ("binary", "multi-label"):
        return {}
    found = positives(task, labels).items()
    return {k: _balanced_cut(positive, probabilities[:, k]) if _has_both(positive) else 0.5 for k, positive in found}


def _balanced_cut(positive: np.ndarray, probabilities: np.ndarray) -> float:
    """The threshold with the best mean of sensitivity and specificity."""
    false_positive, true_positive, cuts = roc_curve(positive, probabilities)
    return float(cuts[1:][np.argmax((true_positive - false_positive)[1:])])  # the first is infinite


def positives(task: Task, labels: np.ndarray) -> dict[int, np.ndarray]:
    """Per scored output which cases are positive: each class against the rest, of a binary task that alone."""
    if task.multi_label:
        return {k: labels[:, k] == 1 for k in range(labels.shape[1])}
    return {k: labels == k for k in ([task.positive] if task.kind == "binary" else range(len(task.classes)))}


def has_auroc(task: Task, labels: np.ndarray) -> bool:
    """Whether any class or label has positive and negative cases, without which there is no AUROC."""
    return any(map(_has_both, positives(task, labels).values()))


def _accuracy(scored: Scored) -> float:
    if scored.task.multi_label:
        return float(np.mean(scored.labels == (scored.probabilities > 0.5)))
    return float(accuracy_score(scored.labels, scored.probabilities.argmax(axis=1)))


def _accuracy_resampled(scored: Scored, weights: np.ndarray) -> np.ndarray:
    if scored.task.multi_label:
        return weighted.mean((scored.labels == (scored.probabilities > 0.5)).mean(axis=1), weights)
    return weighted.mean(scored.labels == scored.probabilities.argmax(axis=1), weights)


def _balanced_accuracy(scored: Scored) -> float | None:
    pairs = [pair for pair in _calls(scored) if len(np.unique(pair[0])) > 1]
    return mean_of_known([float(balanced_accuracy_score(*pair)) for pair in pairs])


def _balanced_accuracy_resampled(scored: Scored, weights: np.ndarray) -> np.ndarray:
    pairs, classes = _calls(scored), _classes_of_a_call(scored)
    return _defined_mean([weighted.balanced_accuracy(*pair, classes, weights) for pair in pairs])


def _kappa(scored: Scored) -> float | None:
    pairs = [pair for pair in _calls(scored) if len(np.unique(pair[0])) > 1]
    costs, classes = "quadratic" if scored.task.kind == "ordinal" else None, range(_classes_of_a_call(scored))
    return mean_of_known([float(cohen_kappa_score(*pair, labels=classes, weights=costs)) for pair in pairs])


def _kappa_resampled(scored: Scored, weights: np.ndarray) -> np.ndarray:
    pairs, classes, quadratic = _calls(scored), _classes_of_a_call(scored), scored.task.kind == "ordinal"
    return _defined_mean([weighted.kappa(*pair, classes, weights, quadratic) for pair in pairs])


def _calls(scored: Scored) -> list[tuple[np.ndarray, np.ndarray]]:
    """The true and the predicted class of each case, (N,) and (N,); of a multi-label task a pair per label."""
    if not scored.task.multi_label:
        return [(scored.labels, scored.probabilities.argmax(axis=1))]
    return list(zip(scored.labels.T, scored.above("balanced_accuracy").T.astype(int), strict=True))


def _classes_of_a_call(scored: Scored) -> int:
    return 2 if scored.task.multi_label else len(scored.task.classes)


def _auroc(positive: np.ndarray, probabilities: np.ndarray, predicted: np.ndarray) -> float:
    return float(roc_auc_score(positive, probabilities))


def _auprc(positive: np.ndarray, probabilities: np.ndarray, predicted: np.ndarray) -> float:
    return float(average_precision_score(positive, probabilities))


def _f1(positive: np.ndarray, probabilities: np.ndarray, predicted: np.ndarray) -> float:
    return float(f1_score(positive, predicted))


def _log_loss(scored: Scored) -> float:
    pairs = _outcomes(scored)
    if pairs:
        return float(np.mean([log_loss(positive, p, labels=[False, True]) for positive, p in pairs]))
    return float(log_loss(scored.labels, scored.probabilities, labels=range(len(scored.task.classes))))


def _log_loss_resampled(scored: Scored, weights: np.ndarray) -> np.ndarray:
    smallest = np.finfo(scored.probabilities.dtype).eps  # scikit-learn's
    pairs = _outcomes(scored)
    if pairs:
        losses = [-np.log(np.clip(np.where(positive, p, 1 - p), smallest, 1 - smallest)) for positive, p in pairs]
        return weighted.mean(np.mean(losses, axis=0), weights)
    of_label = scored.probabilities[np.arange(len(scored.labels)), scored.labels]
    return weighted.mean(-np.log(np.clip(of_label, smallest, 1 - smallest)), weights)


def _brier(scored: Scored) -> float:
    return float(np.mean(_brier_of_cases(scored)))


def _brier_resampled(scored: Scored, weights: np.ndarray) -> np.ndarray:
    return weighted.mean(_brier_of_cases(scored), weights)


def _brier_of_cases(scored: Scored) -> np.ndarray:
    pairs = _outcomes(scored)
    if pairs:
        return np.mean([(p - positive) ** 2 for positive, p in pairs], axis=0)
    one_hot = np.eye(len(scored.task.classes))[scored.labels]
    return ((scored.probabilities - one_hot) ** 2).sum(axis=1)


def _ece(scored: Scored) -> float:
    pairs = _outcomes(scored)
    if pairs:
        return float(np.mean([_binary_ece(positive, p) for positive, p in pairs]))
    probabilities, labels = torch.from_numpy(scored.probabilities), torch.from_numpy(scored.labels)
    return float(multiclass_calibration_error(probabilities, labels, len(scored.task.classes), n_bins=_BINS))


def _ece_resampled(scored: Scored, weights: np.ndarray) -> np.ndarray:
    likely = scored.probabilities
    pairs = _outcomes(scored) or [(likely.argmax(axis=1) == scored.labels, likely.max(axis=1))]
    return np.mean([weighted.calibration_error(*pair, _BINS, weights) for pair in pairs], axis=0)


def _binary_ece(positive: np.ndarray, probabilities: np.ndarray) -> torch.Tensor:
    return binary_calibration_error(torch.from_numpy(probabilities), torch.from_numpy(positive).long(), n_bins=_BINS)


def _outcomes(scored: Scored) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of a binary task or each label which cases are positive, and their probabilities; none of several classes.

    A label that all cases or none have is left out, as of the means of AUROC, unless all are such.
    """
    if scored.task.kind not in ("multi-label", "binary"):
        return []
    found = [(cases, scored.probabilities[:, k].copy()) for k, cases in positives(scored.task, scored.labels).items()]
    return [pair for pair in found if _has_both(pair[0])] or found


def _by_class(of_class: OfClass, scored: Scored) -> dict[int, float | None]:
    """A figure per scored output; None where all cases or none are positive."""
    return {k: of_class(*columns) if _has_both(columns[0]) else None for k, columns in _columns(scored).items()}


def _resampled(metric: Metric, scored: Scored, weights: np.ndarray) -> np.ndarray:
    if metric.resampled:
        return metric.resampled(scored, weights)
    return _defined_mean(list(_by_class_resampled(metric.of_class_resampled, scored, weights).values()))


def _by_class_resampled(of_class: OfClassResampled, scored: Scored, weights: np.ndarray) -> dict[int, np.ndarray]:
    return {k: of_class(*columns, weights) for k, columns in _columns(scored).items()}


def _columns(scored: Scored) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per scored output what OfClass takes."""
    called = scored.above("f1") if scored.task.multi_label else _one_hot(scored.probabilities.argmax(axis=1), scored)
    found = positives(scored.task, scored.labels)
    return {k: (positive, scored.probabilities[:, k], called[:, k]) for k, positive in found.items()}


def _one_hot(classes: np.ndarray, scored: Scored) -> np.ndarray:
    return classes[:, None] == np.arange(scored.probabilities.shape[1])


def _has_both(positive: np.ndarray) -> bool:
    return bool(positive.any() and not positive.all())


def mean_of_known(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def _defined_mean(values: list[np.ndarray]) -> np.ndarray:
    """The mean over classes or labels in each resample, of those that it leaves defined."""
    return np.ma.masked_invalid(values).mean(axis=0).filled(np.nan)


def _scaled(title: str, of: Callable[[Scored], float], resampled: Callable[[Scored, np.ndarray], np.ndarray]) -> Metric:
    """A loss of the probabilities at the temperatures chosen on validation."""
    return Metric(
        title,
        of=lambda scored: of(scored.scaled),
        resampled=lambda scored, weights: resampled(scored.scaled, weights),
        lower_is_better=True,
        aside=True,
    )


METRICS = {
    "accuracy": Metric("accuracy", of=_accuracy, resampled=_accuracy_resampled),
    "balanced_accuracy": Metric("balanced accuracy", of=_balanced_accuracy, resampled=_balanced_accuracy_resampled),
    "kappa": Metric("Cohen's kappa", of=_kappa, resampled=_kappa_resampled, aside=True),
    "auroc": Metric("AUROC", _auroc, of_class_resampled=lambda true, p, _, weights: weighted.auroc(true, p, weights)),
    "auprc": Metric(
        "AUPRC", _auprc, of_class_resampled=lambda true, p, _, weights: weighted.average_precision(true, p, weights)
    ),
    "f1": Metric("F1", _f1, of_class_resampled=lambda true, _, called, weights: weighted.f1(true, called, weights)),
    "log_loss": Metric("log loss", of=_log_loss, resampled=_log_loss_resampled, lower_is_better=True, aside=True),
    "log_loss_scaled": _scaled("log loss, scaled", _log_loss, _log_loss_resampled),
    "brier": Metric("Brier score", of=_brier, resampled=_brier_resampled, lower_is_better=True, aside=True),
    "ece": Metric("ECE", of=_ece, resampled=_ece_resampled, lower_is_better=True, aside=True),
    "ece_scaled": _scaled("ECE, scaled", _ece, _ece_resampled),
}
# What has an interval over test cases, and what a verdict can be about.
RESAMPLED = tuple(name for name, metric in METRICS.items() if metric.resampled or metric.of_class_resampled)


def title_of(metric: str) -> str:
    """As reports write it; a data set's own figures have no entry in METRICS and are written as they are called."""
    return METRICS[metric].title if metric in METRICS else metric.replace("_", " ")
