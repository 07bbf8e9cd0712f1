"""Temperatures, against a grid, scikit-learn's derivative-free fit and planted ones; and what scaling leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
from finetune.data.tasks import Task
from finetune.judging.metrics import Chosen, choose, score
from finetune.judging.temperature import LARGEST, SMALLEST, fit_temperatures, scale
from scipy.special import expit, logit, softmax
from sklearn.metrics import log_loss

BINARY = Task("binary", ("no", "yes"))
CLASSES = Task("multi-class", ("a", "b", "c"))
LABELS = Task("multi-label", ("a", "b", "c"))


def drawn(task: Task, cases: int = 400, planted: float | np.ndarray = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels that are drawn by probabilities, and these probabilities with their logits times `planted`."""
    rng = np.random.default_rng(0)
    logits = 1.5 * rng.normal(size=(cases, len(task.classes)))
    if task.multi_label:
        logits -= [0, 1, 3]
        return (rng.random(logits.shape) < expit(logits)).astype(int), expit(logits * planted)
    labels = np.array([rng.choice(len(task.classes), p=p) for p in softmax(logits, axis=1)])
    return labels, softmax(logits * planted, axis=1)


def loss(task: Task, labels: np.ndarray, probabilities: np.ndarray, temperatures: np.ndarray) -> float:
    return score(task, labels, probabilities, Chosen(temperatures=temperatures))["log_loss_scaled"]


@pytest.mark.parametrize("planted", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("task", [BINARY, CLASSES], ids=lambda task: task.kind)
def test_the_loss_on_validation_is_lowest(task: Task, planted: float) -> None:
    """A grid finds none lower, and the best of the grid is next to it."""
    labels, probabilities = drawn(task, planted=planted)
    found = fit_temperatures(task, labels, probabilities)
    assert found.shape == (1,)
    grid = np.geomspace(SMALLEST, LARGEST, 400)
    logits = np.log(probabilities)
    losses = [log_loss(labels, softmax(logits / temperature, axis=1)) for temperature in grid]
    assert loss(task, labels, probabilities, found) <= min(losses)
    assert found[0] == pytest.approx(grid[np.argmin(losses)], rel=grid[1] / grid[0] - 1)


def test_each_label_has_its_own() -> None:
    labels, probabilities = drawn(LABELS, planted=np.array([0.5, 1, 3]))
    found = fit_temperatures(LABELS, labels, probabilities)
    for k, temperature in enumerate(found):
        alone = np.stack([1 - probabilities[:, k], probabilities[:, k]], axis=1)
        assert fit_temperatures(BINARY, labels[:, k], alone)[0] == pytest.approx(temperature)
        np.testing.assert_allclose(
            scale(LABELS, probabilities, found)[:, k], expit(logit(probabilities[:, k]) / temperature)
        )


@pytest.mark.parametrize("task", [BINARY, CLASSES, LABELS], ids=lambda task: task.kind)
def test_a_planted_temperature_is_recovered(task: Task) -> None:
    """Whatever it is the scaled probabilities are the same, so that the scaled figures are."""
    labels, plain = drawn(task)
    own = fit_temperatures(task, labels, plain)
    for planted in (0.25, 3.0):
        sharpened = drawn(task, planted=planted)[1]
        found = fit_temperatures(task, labels, sharpened)
        np.testing.assert_allclose(found, planted * own, rtol=1e-6)
        np.testing.assert_allclose(scale(task, sharpened, found), scale(task, plain, own), rtol=1e-5)
    many = fit_temperatures(task, *drawn(task, cases=20000, planted=3.0))
    np.testing.assert_allclose(many, 3, rtol=0.15)


@pytest.mark.parametrize("task", [BINARY, CLASSES, LABELS], ids=lambda task: task.kind)
def test_scaling_changes_the_scaled_figures_alone(task: Task) -> None:
    """AUROC, calls and unscaled losses stay; a scaled figure is the plain one of scaled probabilities."""
    labels, probabilities = drawn(task, planted=3.0)
    chosen = choose(task, labels, probabilities)
    scores = score(task, labels, probabilities, chosen)
    plain = score(task, labels, probabilities, Chosen(chosen.thresholds))
    scaled = score(task, labels, scale(task, probabilities, chosen.temperatures))
    for metric in ("log_loss", "ece"):
        assert plain[f"{metric}_scaled"] == plain[metric]
        assert scores[f"{metric}_scaled"] == scaled[metric] < scores[metric]
    assert {name: value for name, value in scores.items() if not name.endswith("scaled")} == {
        name: value for name, value in plain.items() if not name.endswith("scaled")
    }
    assert scaled["accuracy"] == scores["accuracy"]
    if task.kind != "multi-class":
        assert scaled["auroc"] == scores["auroc"]


def test_the_temperature_is_1_where_there_is_nothing_to_fit() -> None:
    """One class alone, or no case called wrongly; the loss falls for ever then, and so would the temperature."""
    labels, probabilities = drawn(CLASSES)
    right = np.eye(3)[labels] * 0.3 + 0.7 / 3
    for case_labels, likely in ((0 * labels, probabilities), (labels, right), (labels, np.eye(3)[labels])):
        assert fit_temperatures(CLASSES, case_labels, likely).tolist() == [1.0]
        np.testing.assert_allclose(scale(CLASSES, likely, np.ones(1)), likely, atol=1e-12)
    labels, probabilities = drawn(LABELS)
    labels[:, 1] = 0
    found = fit_temperatures(LABELS, labels, probabilities)
    assert found[1] == 1
    assert (found[[0, 2]] != 1).all()


def test_probabilities_of_0_and_1_and_those_worse_than_chance_have_a_finite_one() -> None:
    labels = np.array([0, 1, 2, 0, 1, 2])
    sure = np.eye(3)[[0, 1, 2, 0, 1, 0]]
    wrong = np.eye(3)[(labels + 1) % 3] * 0.9 + 0.1 / 3
    assert fit_temperatures(CLASSES, labels, wrong).tolist() == [LARGEST]
    found = fit_temperatures(CLASSES, labels, sure)
    assert SMALLEST < found[0] < LARGEST
    figures = score(CLASSES, labels, sure, Chosen(temperatures=found))
    assert figures["log_loss_scaled"] < figures["log_loss"]
    almost = np.array([[0.6, 0.4], [0.4, 0.6], [0.6, 0.4], [0.5 - 1e-9, 0.5 + 1e-9]])
    assert fit_temperatures(BINARY, np.array([0, 1, 0, 0]), almost).tolist() == [SMALLEST]
