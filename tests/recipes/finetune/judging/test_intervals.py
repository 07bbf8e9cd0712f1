"""The intervals that hold one source of noise each: over the seeds, and over the test cases."""

from __future__ import annotations

import numpy as np
import pytest
from finetune.data.tasks import Task
from finetune.judging.intervals import bootstrap, paired_t, resamples
from scipy import stats
from sklearn.metrics import roc_auc_score

BINARY = Task("binary", ("no", "yes"))
LABELS = Task("multi-label", ("a", "b"))


def two_columns(positive: np.ndarray) -> np.ndarray:
    return np.stack([1 - positive, positive], axis=1)


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
    np.testing.assert_array_equal(found.replicates(["baseline"]), again.replicates(["baseline"]))
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
    every = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=10 * resamples)
    of_patient = np.stack([labels[np.array(patients) == name].sum(axis=0) for name in names])
    images = np.array([patients.count(name) for name in names])
    held = (every @ of_patient > 0) & (every @ (images[:, None] - of_patient) > 0)
    assert not held[:resamples, 1].all()
    draws = every[held.all(axis=1)][:resamples]
    expected = {arm: np.full((2, resamples), np.nan) for arm in arms}
    for resample, draw in enumerate(draws):
        drawn = [name for name, times in zip(names, draw, strict=True) for _ in range(times)]
        rows = [row for name in drawn for row in range(30) if patients[row] == name]
        for arm, seeds in arms.items():
            for k in (0, 1):
                aurocs = [roc_auc_score(labels[rows, k], scores[rows, k]) for scores in seeds]
                expected[arm][k, resample] = np.mean(aurocs)
    for k, name in enumerate("ab"):
        for arm in arms:
            values = found.replicates([arm], name)[:, 0].mean(axis=1)
            np.testing.assert_allclose(values, expected[arm][k], rtol=0, atol=1e-12)
        quantiles = np.quantile(expected["inmerge"][k] - expected["baseline"][k], [0.025, 0.975])
        assert found.interval("inmerge", "baseline", name) == pytest.approx(tuple(quantiles))
    values = found.replicates(["inmerge"])[:, 0].mean(axis=1)
    np.testing.assert_allclose(values, np.mean(expected["inmerge"], axis=0), rtol=0, atol=1e-12)
    assert found.interval("inmerge") == pytest.approx(
        tuple(np.quantile(np.mean(expected["inmerge"], axis=0), [0.025, 0.975]))
    )


def test_a_macro_mean_is_over_the_same_labels_in_all_resamples() -> None:
    """Of a label with two positive cases many draws have none: without it the mean would be another figure."""
    rng = np.random.default_rng(0)
    labels = np.stack([np.arange(200) % 2, np.isin(np.arange(200), (0, 1))], axis=1).astype(int)
    scores = np.stack([0.3 * labels[:, 0] + rng.random(200), labels[:, 1] + rng.random(200)], axis=1)
    found = bootstrap(LABELS, labels, {"baseline": [scores]})
    assert found.aurocs["b"].min() == 1  # a perfect label, in every resample
    means = (found.aurocs["a"] + found.aurocs["b"]) / 2
    np.testing.assert_allclose(found.figures["auroc"], means, atol=1e-12)
    for metric in ("auprc", "kappa"):
        assert np.isfinite(found.figures[metric]).all()


def test_labels_too_rare_to_be_drawn_together_end_the_redrawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.judging.intervals.RESAMPLES", 20)
    needed = [np.arange(400) == k for k in range(40)]
    assert sum(weights.shape[1] for weights in resamples(np.arange(400), needed)) == 20
