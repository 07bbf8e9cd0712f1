"""How each arm calls the classes, and how well its probabilities are calibrated."""

import numpy as np

from ..judging.formatting import percent
from ..judging.metrics import positives
from ..judging.operating import Rate, calibration, operating
from ..options import BASELINE
from ..runs.finished import FinishedRun
from ..runs.sections import Section
from .style import interval_text, number_text

_TEMPERATURES = {False: "One temperature for all classes", True: "One temperature for each label"}


def calls_section(run: FinishedRun) -> Section | None:
    """A row per class and arm: the threshold chosen on validation, sensitivity and specificity on test."""
    if not run.arms:
        return None
    several = run.task.kind in ("multi-class", "ordinal")
    by_arm = {arm: operating(run.task, run.validation[arm], run.predictions[arm]) for arm in run.arms}
    rows = []
    for name in by_arm[run.arms[0]]:
        for arm, found in by_arm.items():
            cells = [] if several else [_thresholds_text(found[name].thresholds)]
            rows.append([name, arm, *cells, _rate_text(found[name].sensitivity), _rate_text(found[name].specificity)])
    how = (
        "The likeliest class is called."
        if several
        else "A case is called positive from the probability on at which sensitivity and specificity together are best "
        "on validation; test has no part in it."
    )
    unit = "patients" if run.predictions[run.arms[0]][0].patients else "cases"
    text = (
        f"{how} Means over seeds on test, with Wilson's 95 % intervals for as many {unit} as there are of the class, "
        "or of the others."
    )
    header = ("class", "arm", *(() if several else ("threshold",)), "sensitivity", "specificity")
    return Section("Sensitivity and specificity", text, header, rows)


def calibration_section(run: FinishedRun) -> Section | None:
    """A row per class and arm: calibration slope, intercept and temperature, each a mean over seeds.

    Its text says what is left of each difference once both arms are scaled.
    """
    if not run.arms:
        return None
    rows = []
    for k, positive in positives(run.task, run.predictions[run.arms[0]][0].labels).items():
        for arm in run.arms:
            found = [calibration(positive, seed.probabilities[:, k]) for seed in run.predictions[arm]]
            known = [seed for seed in found if seed is not None]
            temperatures = [chosen.temperatures[k if run.task.multi_label else 0] for chosen in run.chosen[arm]]
            figures = [x.slope for x in known], [x.intercept for x in known], temperatures
            rows.append([run.task.classes[k], arm, *map(_mean, figures)])
    text = (
        "Of the log odds of what is so by those that were predicted, on test, mean ± standard deviation over seeds: a "
        "slope of 1 and an intercept of 0 are perfect. A slope below 1 says that probabilities are too extreme, an "
        "intercept above 0 that they are too low on the whole. There is no slope where the probabilities of a class "
        "tell its cases from the others without an error.\n\n"
        f"{_TEMPERATURES[run.task.multi_label]} (Guo et al., 2017) is fitted on validation, by its log loss, for every "
        "seed, and all logits on test are divided by it: above 1 it says that the model is too sure of itself. It is 1 "
        "where there is nothing to fit: where all of validation is of one class, or none of it is called wrongly. "
        "Log loss and ECE are told of the probabilities as they are, and scaled. What an arm has ahead as they are and "
        "not once they are scaled, temperature scaling gives the baseline as well."
    )
    text = "\n\n".join([text, *(_left_after_scaling(run, arm) for arm in run.other_arms)])
    return Section("Calibration", text, ("class", "arm", "slope", "intercept", "temperature"), rows)


def _left_after_scaling(run: FinishedRun, arm: str) -> str:
    """An arm's differences in log loss and ECE, as predicted and scaled."""
    found = run.summary["differences"][arm]
    texts = {
        metric: interval_text(found[metric]["mean"], (found[metric]["low"], found[metric]["high"]))
        for metric in ("log_loss", "log_loss_scaled", "ece", "ece_scaled")
    }
    return (
        f"{arm} minus {BASELINE}: log loss {texts['log_loss']}, scaled {texts['log_loss_scaled']}; "
        f"ECE {texts['ece']}, scaled {texts['ece_scaled']}."
    )


def _mean(values: list[float | None]) -> str | None:
    if not values or None in values:
        return None
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{number_text(float(np.mean(values)), '{:.2f}')}{spread}"


def _thresholds_text(thresholds: tuple[float, ...]) -> str:
    return ", ".join(f"{threshold:.3g}" for threshold in thresholds)


def _rate_text(rate: Rate | None) -> str | None:
    if rate is None:
        return None
    return f"{percent(rate.value, 1)} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
