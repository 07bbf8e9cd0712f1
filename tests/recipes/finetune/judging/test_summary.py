"""What summary.json holds: figures over seeds, differences with all their intervals, and the verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from finetune.data.tasks import Task
from finetune.judging.intervals import LEVEL, Bootstrap, bootstrap
from finetune.judging.metrics import RESAMPLED, Chosen, choose, per_class, score
from finetune.judging.obuchowski_rockette import compare, error_covariances
from finetune.judging.summary import Rule, difference_of, summarise
from finetune.options import Options
from finetune.reports.terminal import table
from finetune.runs.results import read_predictions
from scipy import stats
from scipy.special import expit, softmax
from small_runs import QUICK, run_digits, run_recipe

BINARY = Task("binary", ("no", "yes"))
CLASSES = Task("multi-class", ("a", "b", "c"))
LABELS = Task("multi-label", ("a", "b"))
NO_SCALING = {"temperatures": {"all classes": 1.0}}
Arms = dict[str, list[np.ndarray]]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.judging.intervals.RESAMPLES", 400)


def results_of(
    task: Task, labels: np.ndarray, arms: Arms, chosen: dict[str, list[Chosen]] | None = None
) -> dict[int, dict[str, Any]]:
    """Results of stages that made these predictions, per arm and seed, by what was chosen on validation."""

    def result(probabilities: np.ndarray, on_validation: Chosen) -> dict[str, Any]:
        scores = {"test": score(task, labels, probabilities, on_validation)}
        classes = per_class(task, labels, probabilities, on_validation)
        return {"epoch": 1, "kept": scores, "last": scores, "per_class": classes, "merges": {}, **NO_SCALING}

    seeds = range(len(next(iter(arms.values()))))
    return {
        seed: {arm: result(found[seed], chosen[arm][seed] if chosen else Chosen()) for arm, found in arms.items()}
        for seed in seeds
    }


def summary_of(
    task: Task,
    labels: np.ndarray,
    arms: Arms,
    patients: list[str] | None = None,
    chosen: dict[str, list[Chosen]] | None = None,
    **rule: Any,
) -> tuple[dict[str, Any], Bootstrap]:
    resampled = bootstrap(task, labels, arms, patients, chosen=chosen)
    summary = summarise("made", task, results_of(task, labels, arms, chosen), resampled, Rule(**rule))
    json.dumps(summary, allow_nan=False)
    return summary, resampled


def drawn(task: Task, cases: int = 80, seeds: int = 3, **skills: float) -> tuple[np.ndarray, Arms]:
    """Labels, and probabilities of arms that know so much of them; what an arm makes of a case is partly its own."""
    rng = np.random.default_rng(0)
    outputs = len(task.classes)
    labels = rng.integers(0, 2, (cases, outputs)) if task.multi_label else rng.integers(0, outputs, cases)
    truth = 2 * labels - 1 if task.multi_label else 3 * np.eye(outputs)[labels]
    arms = {}
    for arm, skill in (skills or {"baseline": 1.0, "inmerge": 1.0}).items():
        of_arm = skill * truth + 0.5 * rng.normal(size=truth.shape)
        logits = [of_arm + 0.5 * rng.normal(size=truth.shape) for _ in range(seeds)]
        arms[arm] = [expit(found) if task.multi_label else softmax(found, axis=1) for found in logits]
    return labels, arms


def test_summary_has_the_intervals_of_each_class_and_null_where_there_is_none() -> None:
    """Whatever the order of the arms; label b has no positive case."""
    rng = np.random.default_rng(0)
    labels = np.stack([rng.integers(0, 2, 40), np.zeros(40, int)], axis=1)
    arms = {arm: [labels * 0.2 + rng.random((40, 2)) * 0.8 for _ in range(2)] for arm in ("inmerge", "baseline")}
    scores = {arm: [(score(LABELS, labels, p), per_class(LABELS, labels, p)) for p in arms[arm]] for arm in arms}
    results = {
        seed: {
            arm: {
                "epoch": 1,
                "kept": {"test": s},
                "last": {"test": s},
                "per_class": classes,
                "merges": {},
                **NO_SCALING,
            }
            for arm, (s, classes) in ((arm, scores[arm][seed]) for arm in arms)
        }
        for seed in (0, 1)
    }
    resampled = bootstrap(LABELS, labels, arms)
    summary = summarise("made", LABELS, results, resampled)
    for arm in arms:
        for figures, name in ((summary["arms"][arm], None), (summary["per_class"][arm]["a"], "a")):
            auroc = figures["auroc"]
            assert (auroc["bootstrap_low"], auroc["bootstrap_high"]) == resampled.interval(arm, name=name)
            assert auroc["bootstrap_low"] < auroc["mean"] < auroc["bootstrap_high"]
        undefined = summary["per_class"][arm]["b"]["auroc"]
        assert undefined["mean"] is undefined["bootstrap_low"] is undefined["bootstrap_high"] is None
    difference = summary["per_class"]["inmerge"]["a"]["auroc"]["difference"]
    a, b = (np.array([classes["a"]["auroc"] for _, classes in scores[arm]]) for arm in ("inmerge", "baseline"))
    assert difference["values"] == (a - b).tolist()
    assert (difference["bootstrap_low"], difference["bootstrap_high"]) == resampled.interval("inmerge", "baseline", "a")
    assert summary["per_class"]["inmerge"]["b"]["auroc"]["difference"]["bootstrap_low"] is None
    assert "difference" not in summary["per_class"]["baseline"]["a"]["auroc"]
    json.dumps(summary, allow_nan=False)


def test_a_difference_has_one_interval_for_both_sources_of_noise_and_one_for_each() -> None:
    labels, arms = drawn(BINARY, baseline=0.5, inmerge=0.6)
    summary, resampled = summary_of(BINARY, labels, arms)
    for metric, found in summary["differences"]["inmerge"].items():
        values = np.array([summary["arms"][arm][metric]["values"] for arm in ("inmerge", "baseline")])
        errors = error_covariances(resampled.replicates(("inmerge", "baseline"), metric=metric))
        both, over_seeds = compare(values, errors), stats.ttest_rel(*values)
        assert (found["mean"], found["p"]) == (pytest.approx(both.mean), pytest.approx(both.p))
        assert (found["low"], found["high"]) == pytest.approx(both.interval(LEVEL))
        assert difference_of(found).interval(LEVEL) == pytest.approx(both.interval(LEVEL))
        assert (found["t_low"], found["t_high"]) == pytest.approx(tuple(over_seeds.confidence_interval(LEVEL)))
        assert found["t_p"] == pytest.approx(over_seeds.pvalue)
        cases = resampled.interval("inmerge", "baseline", metric=metric)
        assert (found["bootstrap_low"], found["bootstrap_high"]) == cases
    # The last epoch leaves no predictions, so that the noise over seeds alone is known.
    last = summary["last"]["differences"]["inmerge"]["auroc"]
    assert last["low"] is last["p"] is last["bootstrap_low"] is None
    assert last["t_low"] == summary["differences"]["inmerge"]["auroc"]["t_low"]


@pytest.mark.parametrize("task", [BINARY, CLASSES, LABELS], ids=lambda task: task.kind)
@pytest.mark.parametrize("metric", get_args(get_type_hints(Options)["primary_metric"]))
def test_a_verdict_is_about_the_primary_metric(task: Task, metric: str) -> None:
    """Every one that can be asked for, on every kind of task; an arm that knows much more is better in each."""
    assert metric in RESAMPLED
    labels, arms = drawn(task, cases=150, baseline=0.2, inmerge=2.5)
    summary, _ = summary_of(task, labels, arms, metric=metric, margin=0.01)
    (verdict,) = summary["verdicts"]
    difference = summary["differences"]["inmerge"][metric]
    assert (verdict["outcome"], verdict["metric"], verdict["mean"]) == ("better", metric, difference["mean"])
    assert (difference["mean"] < 0) == (metric in ("log_loss", "log_loss_scaled", "brier"))
    assert difference["p_adjusted"] == difference["p"]
    assert verdict["sentence"] in table(summary)
    assert "The margin is 0.01 " in table(summary)


def test_patients_are_the_units() -> None:
    """Eight copies of each case are no new evidence over patients, and the verdict counts patients."""
    labels, arms = drawn(BINARY, cases=60, baseline=0.3, inmerge=0.3)
    copies = {arm: [np.repeat(found, 8, axis=0) for found in seeds] for arm, seeds in arms.items()}
    single, _ = summary_of(BINARY, labels, arms)
    patients = [f"patient {k // 8}" for k in range(480)]
    grouped, _ = summary_of(BINARY, np.repeat(labels, 8), copies, patients)
    apart, _ = summary_of(BINARY, np.repeat(labels, 8), copies)
    alone, of_patients, of_cases = (
        found["differences"]["inmerge"]["auroc"]["case_variance"] for found in (single, grouped, apart)
    )
    assert of_patients == pytest.approx(alone, rel=0.25)
    assert of_cases < alone / 4
    assert "over patients alone" in table(grouped)
    assert grouped["verdicts"][0]["outcome"] != "undecided" or "60 test patients" in grouped["intervals"]["low, high"]


def test_a_class_absent_from_test_leaves_the_verdict_to_the_others_and_a_single_class_none() -> None:
    labels, arms = drawn(CLASSES)
    labels = np.where(labels == 2, 0, labels)
    summary, _ = summary_of(CLASSES, labels, arms)
    assert summary["per_class"]["inmerge"]["c"]["auroc"]["mean"] is None
    assert summary["verdicts"][0]["mean"] is not None
    single, _ = summary_of(BINARY, np.zeros(80, int), drawn(BINARY)[1])
    (verdict,) = single["verdicts"]
    assert (verdict["outcome"], verdict["mean"]) == ("not judged", None)
    assert "AUROC: it is not defined on this test set" in table(single)


def test_a_pair_is_judged_on_the_seeds_that_both_finished_and_no_other_pair_is_touched() -> None:
    """As if the seed that one arm lacks had not been asked for, to the bit; the other arm is judged as without it."""
    labels, arms = drawn(BINARY, seeds=4, **{"baseline": 0.3, "inmerge": 0.4, "random-pairs": 0.35})
    results = results_of(BINARY, labels, arms)
    whole = summarise("made", BINARY, results, bootstrap(BINARY, labels, arms))
    del results[1]["inmerge"]
    left = {**arms, "inmerge": [None if seed == 1 else found for seed, found in enumerate(arms["inmerge"])]}
    summary = summarise("made", BINARY, results, bootstrap(BINARY, labels, left), diverged={"inmerge": {1: 3}})
    json.dumps(summary, allow_nan=False)
    three = {arm: [found for seed, found in enumerate(seeds) if seed != 1] for arm, seeds in arms.items()}
    expected, _ = summary_of(BINARY, labels, three)
    for metric, found in summary["differences"]["inmerge"].items():
        assert found.pop("values")[1] is None
        assert expected["differences"]["inmerge"][metric].pop("values")
        for figures in (found, expected["differences"]["inmerge"][metric]):
            figures.pop("p_adjusted", None)
        assert found == expected["differences"]["inmerge"][metric]
    judged = {found["arm"]: found for found in whole["verdicts"] if found["reference"] == "baseline"}
    broken = {found["arm"]: found for found in summary["verdicts"] if found["reference"] == "baseline"}
    assert broken["random-pairs"] == judged["random-pairs"]
    assert broken["inmerge"]["outcome"] == "diverged"
    assert summary["arms"]["inmerge"]["auroc"]["mean"] == expected["arms"]["inmerge"]["auroc"]["mean"]


def test_equal_weights_are_identical_and_one_seed_is_not_judged() -> None:
    labels, arms = drawn(BINARY)
    arms["inmerge"] = arms["baseline"]
    results, resampled = results_of(BINARY, labels, arms), bootstrap(BINARY, labels, arms)
    pair = {("inmerge", "baseline")}
    (verdict,) = summarise("made", BINARY, results, resampled, identical=pair)["verdicts"]
    assert verdict["outcome"] == "identical"
    assert (verdict["mean"], verdict["low"], verdict["high"], verdict["p"]) == (0, 0, 0, None)
    one = {arm: seeds[:1] for arm, seeds in arms.items()}
    summary, _ = summary_of(BINARY, labels, one)
    assert summary["verdicts"][0]["outcome"] == "not judged"
    assert summary["differences"]["inmerge"]["auroc"]["low"] is None
    assert "+0.0000" not in table(summary)


def test_several_arms_share_one_error_and_holms_p_stands_beside() -> None:
    """Inmerge is set against random-pairs as well."""
    labels, arms = drawn(BINARY, **{"baseline": 0.3, "inmerge": 0.4, "random-pairs": 0.35})
    summary, _ = summary_of(BINARY, labels, arms)
    assert set(summary["differences"]) == {"inmerge", "random-pairs"}
    compared = [(found["arm"], found["reference"]) for found in summary["verdicts"]]
    assert compared == [("inmerge", "baseline"), ("random-pairs", "baseline"), ("inmerge", "random-pairs")]
    for verdict in summary["verdicts"][:2]:
        found = summary["differences"][verdict["arm"]]["auroc"]
        difference = difference_of(found)
        assert (verdict["low"], verdict["high"]) == pytest.approx(difference.interval(1 - 0.05 / 2))
        assert (verdict["equivalence_low"], verdict["equivalence_high"]) == difference.interval(1 - 0.10 / 2)
        assert found["p"] <= found["p_adjusted"] <= 2 * found["p"]
    contrast = summary["contrasts"]["inmerge - random-pairs"]["auroc"]
    assert contrast["p"] == contrast["p_adjusted"]


def test_planted_damage_is_found_and_every_figure_follows_from_the_predictions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An arm whose kernels are replaced by others after each step is worse than the baseline on three seeds."""
    damage = ["--merge-prob", "1", "--merge-weight", "0", "--similarity-threshold", "-1", "--skip-layers", "0"]
    short = ["--epochs", "4", "--inmerge-epochs", "1", "--lr", "0.05"]
    run = run_digits(tmp_path / "run", *damage, *short, "--seeds", "0", "1", "2")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["verdicts"][0]["outcome"] == "worse"
    assert "inmerge is worse than baseline on AUROC, by more than 0.005: -" in capsys.readouterr().out
    task = Task("multi-class", tuple("0123456789"))
    val, test = (
        {
            arm: [read_predictions(run / f"seed_{seed}/{arm}", part) for seed in range(3)]
            for arm in ("baseline", "inmerge")
        }
        for part in ("val", "test")
    )
    chosen = {arm: [choose(task, seed.labels, seed.probabilities) for seed in seeds] for arm, seeds in val.items()}
    probabilities = {arm: [found.probabilities for found in seeds] for arm, seeds in test.items()}
    expected, _ = summary_of(task, test["baseline"][0].labels, probabilities, chosen=chosen)
    assert summary["differences"] == expected["differences"]
    assert summary["verdicts"] == expected["verdicts"]


def test_no_merges_leave_identical_arms(tmp_path: Path) -> None:
    """The difference is exactly 0, in each seed and in each resample of the test set."""
    short = ["--epochs", "1", "--inmerge-epochs", "1", "--limit-train", "300"]
    run = run_digits(tmp_path / "run", "--merge-prob", "0", "--seeds", "0", "1", "2", *short)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["verdicts"][0]["outcome"] == "identical"
    for difference in summary["differences"]["inmerge"].values():
        assert difference["values"] == [0, 0, 0]
        for low, high, p in (("low", "high", "p"), ("t_low", "t_high", "t_p")):
            assert (difference["mean"], difference[low], difference[high], difference[p]) == (0, 0, 0, None)
        assert (difference["bootstrap_low"], difference["bootstrap_high"]) == (0, 0)


def test_labels_that_mean_nothing_show_no_difference(made_medmnist: Callable[..., Path], tmp_path: Path) -> None:
    """Whatever merging does to the weights, it can't predict chance."""
    data = ["--data-dir", made_medmnist("breastmnist", colour=False, classes=2, cases=128), "--allow-modified"]
    short = ["--batch-size", "32", "--epochs", "1", "--inmerge-epochs", "1", "--similarity-threshold", "-0.5"]
    run_recipe("--dataset", "breastmnist", *QUICK, *data, *short, "--seeds", 0, 1, 2, "--output", tmp_path / "run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["verdicts"][0]["outcome"] == "undecided"
    assert summary["merges"]["inmerge"]["layer3.0.conv3"]["merged"] > 0
