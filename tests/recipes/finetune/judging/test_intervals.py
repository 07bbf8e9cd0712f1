"""Intervals that cover, adjustments that hold the family's error, and verdicts that follow one rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from finetune.data.tasks import Task
from finetune.judging.intervals import bootstrap, holm, paired_t, weighted_auroc
from finetune.judging.metrics import per_class, score
from finetune.judging.summary import summarise, verdict
from finetune.reports.terminal import table
from finetune.runs.results import read_predictions
from scipy import stats
from sklearn.metrics import roc_auc_score
from small_runs import QUICK, run_digits, run_recipe

BINARY = Task("binary", ("no", "yes"))
LABELS = Task("multi-label", ("a", "b"))


def two_columns(positive: np.ndarray) -> np.ndarray:
    return np.stack([1 - positive, positive], axis=1)


def results_of(aurocs: dict[str, list[float | None]]) -> dict:
    """Results of stages with these test AUROCs per arm and seed."""
    seeds = len(next(iter(aurocs.values())))
    scores = {(seed, arm): {"test": {"auroc": values[seed]}} for arm, values in aurocs.items() for seed in range(seeds)}
    return {
        seed: {
            arm: {"epoch": 1, "kept": scores[seed, arm], "last": scores[seed, arm], "per_class": {}, "merges": {}}
            for arm in aurocs
        }
        for seed in range(seeds)
    }


def test_t_interval_covers_the_true_difference() -> None:
    """95 of 100 intervals of five seeds hold the true value, and 5 of 100 tests reject a true null."""
    rng = np.random.default_rng(0)
    found = [paired_t(rng.normal(0.01, 0.004, 5).tolist()) for _ in range(1000)]
    coverage = np.mean([t.low <= 0.01 <= t.high for t in found])
    assert abs(coverage - 0.95) < 0.02
    rejected = np.mean([paired_t(rng.normal(0, 0.004, 5).tolist()).p < 0.05 for _ in range(1000)])
    assert abs(rejected - 0.05) < 0.02


def test_paired_t_is_scipys_test_of_the_pairs() -> None:
    a, b = [0.81, 0.84, 0.80], [0.80, 0.82, 0.80]
    found, expected = paired_t([x - y for x, y in zip(a, b, strict=True)]), stats.ttest_rel(a, b)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_no_interval_is_invented() -> None:
    """One seed has none; equal differences have no spread to test with, be they 0 or equal but for rounding."""
    assert paired_t([0.02]).low is None
    assert paired_t([0.02, None]).p is None
    assert paired_t([None, None]).mean is None
    for values in ([0.0, 0.0], [0.75 - 0.5, 0.85 - 0.6, 0.95 - 0.7]):
        found = paired_t(values)
        assert found.low == found.high == found.mean
        assert found.p is None


def test_holm_adjusts_over_the_p_values_there_are() -> None:
    adjusted = holm({"a": 0.04, "b": 0.01, "c": None, "d": 0.03})
    assert adjusted == {"a": pytest.approx(0.06), "b": pytest.approx(0.03), "c": None, "d": pytest.approx(0.06)}
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_weighted_auroc_is_scikit_learns() -> None:
    """With ties, repeated and left-out cases; undefined where one class has no weight."""
    rng = np.random.default_rng(0)
    positive, scores = rng.random(60) < 0.3, rng.integers(0, 8, 60) / 8
    weights = rng.integers(0, 4, (60, 20)).astype(np.float32)
    expected = [roc_auc_score(positive, scores, sample_weight=column) for column in weights.T]
    np.testing.assert_allclose(weighted_auroc(positive, scores, weights), expected, rtol=0, atol=1e-12)
    assert np.isnan(weighted_auroc(positive, scores, positive[:, None].astype(np.float32)))[0]


def test_bootstrap_spreads_as_the_test_set_does() -> None:
    """Its interval of a difference is about as wide as the differences over freshly drawn test sets are."""
    rng = np.random.default_rng(0)

    def drawn(cases: int = 300) -> tuple[np.ndarray, dict[str, list[np.ndarray]]]:
        labels = rng.integers(0, 2, cases)
        signal = labels + rng.normal(0, 1, cases)
        noisy = {arm: signal + rng.normal(0, spread, cases) for arm, spread in (("baseline", 1.0), ("inmerge", 0.5))}
        return labels, {arm: [two_columns(1 / (1 + np.exp(-scores)))] for arm, scores in noisy.items()}

    fresh = []
    for _ in range(300):
        labels, arms = drawn()
        aurocs = {arm: roc_auc_score(labels, probabilities[0][:, 1]) for arm, probabilities in arms.items()}
        fresh.append(aurocs["inmerge"] - aurocs["baseline"])
    low, high = bootstrap(BINARY, *drawn()).interval("inmerge", "baseline")
    assert high - low == pytest.approx(np.subtract(*np.quantile(fresh, [0.975, 0.025])), rel=0.25)
    assert low < np.mean(fresh) < high


def test_bootstrap_over_patients_is_wider_where_their_images_agree() -> None:
    """Eight copies of each case are no new evidence: over patients the interval stays, over cases it shrinks."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (100, 2))
    arms = {arm: [labels * 0.3 + rng.random((100, 2))] for arm in ("baseline", "inmerge")}
    copies = {arm: [np.repeat(scores, 8, axis=0) for scores in seeds] for arm, seeds in arms.items()}
    patients = [f"patient {k // 8}" for k in range(800)]

    def width(*arguments: object) -> float:
        low, high = bootstrap(LABELS, *arguments).interval("inmerge", "baseline")
        return high - low

    single = width(labels, arms)
    assert width(np.repeat(labels, 8, axis=0), copies, patients) == pytest.approx(single, rel=0.1)
    assert width(np.repeat(labels, 8, axis=0), copies) < single / 2


def test_bootstrap_of_equal_arms_is_exactly_zero_and_repeatable() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 50), two_columns(rng.random(50))
    found = bootstrap(BINARY, labels, {"baseline": [scores], "inmerge": [scores]})
    assert found.interval("inmerge", "baseline") == (0, 0)
    again = bootstrap(BINARY, labels, {"baseline": [scores]})
    np.testing.assert_array_equal(found.auroc("baseline"), again.auroc("baseline"))
    undefined = bootstrap(BINARY, np.zeros(50, int), {"baseline": [scores], "inmerge": [scores]})
    assert undefined.interval("inmerge", "baseline") == (None, None)


def test_bootstrap_of_a_class_is_scikit_learns_auroc_on_each_redrawn_test_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patients drawn one by one in a plain loop, all of their images each time, two seeds of two arms."""
    resamples = 50
    monkeypatch.setattr("finetune.judging.intervals.RESAMPLES", resamples)
    rng = np.random.default_rng(0)
    labels = (rng.random((30, 2)) < [0.5, 0.1]).astype(int)  # some resamples have no positive case of the rarer label
    patients = [f"patient {k}" for k in rng.integers(0, 12, 30)]
    arms = {arm: [labels * 0.3 + rng.random((30, 2)) for _ in range(2)] for arm in ("baseline", "inmerge")}
    found = bootstrap(LABELS, labels, arms, patients)
    names = np.unique(patients)
    assert (found.unit, found.units) == ("patients", len(names))
    draws = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    expected = {arm: np.full((2, resamples), np.nan) for arm in arms}
    for resample, draw in enumerate(draws):
        drawn = [name for name, times in zip(names, draw, strict=True) for _ in range(times)]
        rows = [row for name in drawn for row in range(30) if patients[row] == name]
        for arm, seeds in arms.items():
            for k in (0, 1):
                if len(set(labels[rows, k])) == 2:
                    aurocs = [roc_auc_score(labels[rows, k], scores[rows, k]) for scores in seeds]
                    expected[arm][k, resample] = np.mean(aurocs)
    assert 0 < np.isnan(expected["inmerge"][1]).mean() < 0.9
    for k, name in enumerate("ab"):
        for arm in arms:
            np.testing.assert_allclose(found.auroc(arm, name), expected[arm][k], rtol=0, atol=1e-12)
        quantiles = np.nanquantile(expected["inmerge"][k] - expected["baseline"][k], [0.025, 0.975])
        assert found.interval("inmerge", "baseline", name) == pytest.approx(tuple(quantiles))
    np.testing.assert_allclose(found.auroc("inmerge"), np.nanmean(expected["inmerge"], axis=0), rtol=0, atol=1e-12)
    assert found.interval("inmerge") == pytest.approx(
        tuple(np.nanquantile(np.nanmean(expected["inmerge"], axis=0), [0.025, 0.975]))
    )


def test_summary_has_the_intervals_of_each_class_and_null_where_there_is_none() -> None:
    """Whatever the order of the arms; label b has no positive case."""
    rng = np.random.default_rng(0)
    labels = np.stack([rng.integers(0, 2, 40), np.zeros(40, int)], axis=1)
    arms = {arm: [labels * 0.2 + rng.random((40, 2)) * 0.8 for _ in range(2)] for arm in ("inmerge", "baseline")}
    scores = {arm: [(score(LABELS, labels, p), per_class(LABELS, labels, p)) for p in arms[arm]] for arm in arms}
    results = {
        seed: {
            arm: {"epoch": 1, "kept": {"test": s}, "last": {"test": s}, "per_class": classes, "merges": {}}
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


@pytest.mark.parametrize(
    ("inmerge", "outcome", "sentence"),
    [
        ([0.84, 0.85, 0.86], "better", "inmerge beats baseline on AUROC: +0.0500 [0.0252, 0.0748], 3 seeds"),
        ([0.74, 0.75, 0.76], "worse", "inmerge is worse than baseline on AUROC: -0.0500 [-0.0748, -0.0252], 3 seeds"),
        ([0.9, 0.7, 0.81], "no difference shown", "inmerge shows no difference from baseline on AUROC: +0.0033 ["),
        ([0.8, 0.8, 0.8], "no difference shown", "on AUROC: +0.0000 [0.0000, 0.0000], 3 seeds"),
        ([None, None, 0.82], "no difference shown", "on AUROC: +0.0200, one seed, which gives no interval over seeds"),
        ([None, None, None], "no difference shown", "on AUROC: not defined on this test set"),
    ],
)
def test_verdict_is_a_sentence(inmerge: list[float | None], outcome: str, sentence: str) -> None:
    summary = summarise("made", BINARY, results_of({"baseline": [0.8, 0.8, 0.8], "inmerge": inmerge}))
    (found,) = summary["verdicts"]
    assert found["outcome"] == outcome
    assert sentence in found["sentence"]
    assert found["sentence"] in table(summary)
    json.dumps(summary, allow_nan=False)


def test_several_arms_share_one_error() -> None:
    """A p of .04 alone shows a difference; as one of three arms it doesn't, and the sentence says why."""
    difference = {"mean": 0.01, "low": 0.001, "high": 0.019, "values": [0.01, 0.01], "p": 0.04, "p_adjusted": 0.04}
    assert verdict("ema", "baseline", difference)["outcome"] == "better"
    found = verdict("ema", "baseline", {**difference, "p_adjusted": 0.12})
    assert found["outcome"] == "no difference shown"
    assert found["sentence"].endswith("2 seeds, Holm-adjusted p 0.12")


def test_inmerge_is_set_against_random_pairs_as_well() -> None:
    aurocs = {"baseline": [0.8, 0.8, 0.8], "inmerge": [0.84, 0.85, 0.86], "random-pairs": [0.8, 0.81, 0.8]}
    summary = summarise("made", BINARY, results_of(aurocs))
    assert set(summary["differences"]) == {"inmerge", "random-pairs"}
    contrast = summary["contrasts"]["inmerge - random-pairs"]["auroc"]
    assert contrast["values"] == pytest.approx([0.04, 0.04, 0.06])
    assert contrast["p"] == contrast["p_adjusted"]
    compared = [(found["arm"], found["reference"]) for found in summary["verdicts"]]
    assert compared == [("inmerge", "baseline"), ("random-pairs", "baseline"), ("inmerge", "random-pairs")]


def test_planted_damage_is_found_and_every_figure_follows_from_the_predictions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An arm whose kernels are replaced by others after each step is worse than the baseline on three seeds."""
    damage = ["--merge-prob", "1", "--merge-weight", "0", "--similarity-threshold", "-1", "--skip-layers", "0"]
    run = run_digits(tmp_path / "run", *damage, "--seeds", "0", "1", "2", "--inmerge-epochs", "1", "--epochs", "1")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["verdicts"][0]["outcome"] == "worse"
    assert "inmerge is worse than baseline on AUROC: -" in capsys.readouterr().out
    task = Task("multi-class", tuple("0123456789"))
    read = {
        arm: [read_predictions(run / f"seed_{seed}/{arm}", "test") for seed in range(3)]
        for arm in ("baseline", "inmerge")
    }
    scores = {arm: [score(task, p.labels, p.probabilities) for p in seeds] for arm, seeds in read.items()}
    for metric in scores["baseline"][0]:
        a, b = ([found[metric] for found in scores[arm]] for arm in ("inmerge", "baseline"))
        difference, expected = summary["differences"]["inmerge"][metric], stats.ttest_rel(a, b)
        assert difference["values"] == [x - y for x, y in zip(a, b, strict=True)]
        assert difference["p"] == pytest.approx(expected.pvalue)
        assert (difference["low"], difference["high"]) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    probabilities = {arm: [p.probabilities for p in seeds] for arm, seeds in read.items()}
    interval = bootstrap(task, read["baseline"][0].labels, probabilities)
    auroc = summary["differences"]["inmerge"]["auroc"]
    assert (auroc["bootstrap_low"], auroc["bootstrap_high"]) == interval.interval("inmerge", "baseline")
    assert auroc["bootstrap_low"] < auroc["mean"] < auroc["bootstrap_high"] < 0


def test_no_merges_show_no_difference(tmp_path: Path) -> None:
    """The difference is exactly 0, in each seed and in each resample of the test set."""
    run = run_digits(
        tmp_path / "run", "--merge-prob", "0", "--seeds", "0", "1", "--epochs", "1", "--inmerge-epochs", "1"
    )
    summary = json.loads((run / "summary.json").read_text())
    assert summary["verdicts"][0]["outcome"] == "no difference shown"
    for difference in summary["differences"]["inmerge"].values():
        assert difference["values"] == [0, 0]
        assert (difference["mean"], difference["low"], difference["high"], difference["p"]) == (0, 0, 0, None)
    auroc = summary["differences"]["inmerge"]["auroc"]
    assert (auroc["bootstrap_low"], auroc["bootstrap_high"]) == (0, 0)


def test_labels_that_mean_nothing_show_no_difference(made_medmnist: Callable[..., Path], tmp_path: Path) -> None:
    """Whatever merging does to the weights, it can't predict chance."""
    data = ["--data-dir", made_medmnist("breastmnist", colour=False, classes=2, cases=128), "--allow-modified"]
    short = ["--batch-size", "32", "--epochs", "1", "--inmerge-epochs", "1", "--similarity-threshold", "-0.5"]
    run_recipe("--dataset", "breastmnist", *QUICK, *data, *short, "--seeds", 0, 1, 2, "--output", tmp_path / "run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["verdicts"][0]["outcome"] == "no difference shown"
    assert summary["merges"]["inmerge"]["layer3.0.conv3"]["merged"] > 0
