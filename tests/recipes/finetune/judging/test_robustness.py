"""The second endpoint: what it is the mean of, and by which rule it is judged beside the first."""

from __future__ import annotations

import numpy as np
import pytest
from finetune.data.tasks import Predictions, Task
from finetune.judging.intervals import bootstrap
from finetune.judging.medmnistc import ALEXNET, ill_conditioned, relative_errors
from finetune.judging.metrics import Chosen
from finetune.judging.obuchowski_rockette import Difference, compare, error_covariances
from finetune.judging.robustness import Clean, figures_of, summarise_robustness

TASK = Task("binary", ("no", "yes"))
LABELS = np.arange(120) % 2
ARMS = ("baseline", "inmerge")


def made(shift: float, seed: int) -> np.ndarray:
    """Probabilities that tell the classes apart by `shift` standard deviations."""
    scores = np.random.default_rng(seed).normal(size=len(LABELS)) + shift * LABELS
    positive = 1 / (1 + np.exp(-scores))
    return np.stack([1 - positive, positive], axis=1)


def clean_of(probabilities: dict[str, list[np.ndarray]], **more: object) -> Clean:
    cases = [str(case) for case in range(len(LABELS))]
    return Clean(
        predictions={arm: [Predictions(LABELS, p, cases) for p in seeds] for arm, seeds in probabilities.items()},
        chosen={arm: [Chosen()] * len(seeds) for arm, seeds in probabilities.items()},
        metric="auroc",
        margin=0.005,
        differences={"inmerge": Difference(0.02, 3, 1e-5, 1e-5, 0.004, 5.0)},
        **{"compared": ["inmerge"], **more},
    )


def of_arms(shifts: dict[str, float], start: int = 0) -> dict[str, list[np.ndarray]]:
    return {arm: [made(shifts[arm], start + seed) for seed in range(3)] for arm in ARMS}


def test_the_endpoint_is_the_mean_over_all_cells_and_judged_over_the_same_cases() -> None:
    clean = of_arms({"baseline": 2.0, "inmerge": 2.0})
    cells = [
        (
            name,
            severity,
            of_arms({"baseline": 1.5 - 0.2 * severity, "inmerge": 1.9 - 0.2 * severity}, 10 * severity + k),
        )
        for k, name in enumerate(("fog", "rain"))
        for severity in (1, 2, 3)
    ]
    summary = summarise_robustness(TASK, "general", clean_of(clean), cells)
    aurocs = np.array(
        [
            [[figures_of(TASK, LABELS, p, Chosen())["auroc"] for p in found[arm]] for arm in ARMS]
            for _, _, found in cells
        ]
    ).mean(axis=0)
    draws = np.mean([bootstrap(TASK, LABELS, found).replicates(ARMS) for _, _, found in cells], axis=0)
    expected = compare(aurocs[::-1], error_covariances(draws[:, ::-1]))
    verdict = summary["verdicts"][1]
    assert (verdict["endpoint"], verdict["outcome"]) == ("mean corrupted AUROC", "better")
    assert verdict["mean"] == pytest.approx(expected.mean)
    assert (verdict["low"], verdict["high"]) == pytest.approx(expected.interval(1 - 0.05 / 2))
    assert summary["corrupted"]["inmerge"]["auroc"]["values"] == pytest.approx(aurocs[1].tolist())
    by_name = [summary["by_corruption"][name]["baseline"]["auroc"]["mean"] for name in ("fog", "rain")]
    assert np.mean(by_name) == pytest.approx(aurocs[0].mean())
    change = summary["change"]["baseline"]["auroc"]["mean"]
    assert change == pytest.approx(aurocs[0].mean() - summary["clean"]["baseline"]["auroc"]["mean"])
    first = summary["verdicts"][0]
    assert (first["low"], first["high"]) == pytest.approx(clean_of(clean).differences["inmerge"].interval(0.975))
    assert summary["relative"] == {}
    of_three = np.mean(
        [bootstrap(TASK, LABELS, found).replicates(ARMS) for _, severity, found in cells if severity == 3], 0
    )
    low = summary["auroc_intervals_of_mean"]["3"]["inmerge"]["low"]
    assert low == pytest.approx(np.quantile(of_three[:, 1].mean(axis=1), 0.025))


def test_corruptions_that_change_nothing_change_no_figure() -> None:
    clean = of_arms({"baseline": 1.0, "inmerge": 1.5})
    summary = summarise_robustness(TASK, "general", clean_of(clean), [("none", severity, clean) for severity in (1, 2)])
    for arm in ARMS:
        assert summary["corrupted"][arm] == summary["clean"][arm]
        assert {figure["mean"] for figure in summary["change"][arm].values()} == {0}


def test_arms_that_diverged_or_are_identical_are_said_to_be_so_on_both_endpoints() -> None:
    clean = of_arms({"baseline": 1.0, "inmerge": 1.0})
    cells = [("fog", 1, clean)]
    found = summarise_robustness(
        TASK, "general", clean_of(clean, diverged={"swa": 3}, identical={"inmerge"}, compared=["inmerge", "swa"]), cells
    )
    outcomes = {(verdict["arm"], verdict["endpoint"]): verdict["outcome"] for verdict in found["verdicts"]}
    assert outcomes == {
        ("inmerge", "clean AUROC"): "identical",
        ("inmerge", "mean corrupted AUROC"): "identical",
        ("swa", "clean AUROC"): "diverged",
        ("swa", "mean corrupted AUROC"): "diverged",
    }


def test_one_seed_is_not_judged() -> None:
    one = {arm: seeds[:1] for arm, seeds in of_arms({"baseline": 1.0, "inmerge": 1.2}).items()}
    found = summarise_robustness(TASK, "general", clean_of(one), [("fog", 1, one)])
    assert found["verdicts"][1]["outcome"] == "not judged"
    assert found["differences"]["fog"]["inmerge"]["low"] is None


def test_relative_errors_are_medmnistcs() -> None:
    """By hand for BreastMNIST's motion blur: AlexNet's errors are .1454 clean and .2590 blurred."""
    found = relative_errors("breastmnist", 0.15, {"motion_blur": 0.20, "unknown": 0.3})
    assert found == {"motion_blur": pytest.approx((0.20 / 0.2590, 0.05 / (0.2590 - 0.1454)))}
    assert relative_errors("general", 0.1, {"motion_blur": 0.2}) == {}
    assert ill_conditioned("pneumoniamnist") == ["contrast_up", "gamma_corr_up"]
    assert ill_conditioned("general") == []
    assert {len(ill_conditioned(name)) for name in ALEXNET} == {0, 1, 2, 6}


def test_balanced_error_is_one_minus_balanced_accuracy_at_the_thresholds() -> None:
    labels, scores = np.array([[0], [0], [1], [1]]), np.array([[0.1], [0.3], [0.2], [0.4]])
    task = Task("multi-label", ("finding",))
    cut = Chosen({"f1": np.array([0.5]), "balanced_accuracy": np.array([0.35])})
    assert figures_of(task, labels, scores, cut)["balanced_error"] == 0.25
    assert figures_of(task, labels, scores, Chosen())["balanced_error"] == 0.5


def test_an_arm_that_diverged_in_a_seed_is_told_and_not_judged_there() -> None:
    clean = of_arms({"baseline": 1.0, "inmerge": 1.2})
    clean["inmerge"][1] = None
    given = clean_of(
        {"baseline": clean["baseline"], "inmerge": [found for found in clean["inmerge"] if found is not None]},
        diverged={"inmerge": 1},
    )
    first, last = given.predictions["inmerge"]
    given.predictions["inmerge"][:] = [first, None, last]
    given.chosen["inmerge"].insert(1, None)
    found = summarise_robustness(TASK, "general", given, [("fog", 1, clean)])
    assert found["corrupted"]["inmerge"]["auroc"]["values"][1] is None
    assert found["change"]["inmerge"]["ece"]["values"][1] is None
    verdict = found["verdicts"][1]
    assert (verdict["outcome"], verdict["seeds"]) == ("diverged", 2)
    assert "inmerge diverged in 1 of 3 seeds" in verdict["sentence"]
