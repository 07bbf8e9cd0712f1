"""The analysis of Obuchowski and Rockette agrees with published ones, and covers what it should."""

from __future__ import annotations

import numpy as np
import pytest
from finetune.data.tasks import Task
from finetune.judging.intervals import bootstrap
from finetune.judging.obuchowski_rockette import Difference, ErrorCovariances, compare, error_covariances
from scipy import stats

NO_ERRORS = ErrorCovariances(0.0, 0.0, 0.0, 0.0)


def test_van_dykes_study_as_rjafroc_has_it() -> None:
    """Five readers, two modalities: F, degrees of freedom, p and interval of RJafroc's documentation (dataset02)."""
    areas = np.array(
        [
            [0.91964573, 0.85877617, 0.90386473, 0.97310789, 0.82979066],
            [0.94782609, 0.90531401, 0.92173913, 0.99935588, 0.92995169],
        ]
    )
    errors = ErrorCovariances(0.00080228827, 0.00034661371, 0.00034407483, 0.00023902837)
    found = compare(areas, errors)
    assert found.mean == pytest.approx(-0.043800322, rel=1e-6)
    assert found.standard_error == pytest.approx(0.020748618, rel=1e-6)
    assert (found.mean / found.standard_error) ** 2 == pytest.approx(4.4563187, rel=1e-6)
    assert found.df == pytest.approx(15.259675, rel=1e-6)
    assert found.p == pytest.approx(0.051665686, rel=1e-5)
    assert found.interval(0.95) == pytest.approx((-0.087959499, 0.00035885444), abs=1e-7)


def test_a_negative_estimate_counts_as_none_as_rjafroc_has_it() -> None:
    """Franken's study (dataset03): Cov2 is estimated below Cov3, and the t test over readers is left."""
    differences = [0.00384441429, 0.02148349163, 0.01718679331, 0.00090456807]
    errors = ErrorCovariances(0.0015257762, 0.00079168215, 0.00048363767, 0.00051250915)
    found = compare(np.array([differences, [0] * 4]), errors)
    assert (found.df, found.case_variance) == (pytest.approx(3), 0)
    assert found.standard_error == pytest.approx(0.0050101218, rel=1e-6)
    assert found.p == pytest.approx(0.11883786, rel=1e-6)
    assert found.interval(0.95) == pytest.approx((-0.0050896269, 0.026799261), rel=1e-6)


def test_equal_differences_leave_the_noise_of_the_cases() -> None:
    """With Franken's covariances: the interval of the analysis with fixed readers, as RJafroc has it for that mean."""
    errors = ErrorCovariances(0.0015257762, 0.00079168215, 0.00048363767, 0.00051250915)
    found = compare(np.array([[0.010854817] * 4, [0] * 4]), errors)
    assert found.standard_error == pytest.approx(0.019158472, rel=1e-6)
    assert found.p == pytest.approx(0.57099922, rel=1e-4)
    assert found.interval(0.95) == pytest.approx((-0.026695098, 0.048404732), rel=1e-4)


def test_no_noise_at_all_gives_the_mean_and_no_p() -> None:
    for mean in (0.0, 0.01):
        found = compare(np.array([[0.5 + mean] * 3, [0.5] * 3]), NO_ERRORS)
        assert found.interval(0.95) == (found.mean, found.mean)
        assert found.mean == pytest.approx(mean)
        assert found.p is None


def test_without_shared_noise_it_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    for seeds in (2, 5):
        values = rng.normal(size=(2, seeds))
        found, expected = compare(values, NO_ERRORS), stats.ttest_rel(*values)
        assert found.p == pytest.approx(expected.pvalue)
        assert found.interval(0.9) == pytest.approx(tuple(expected.confidence_interval(0.9)))


def test_one_seed_has_no_interval_and_an_undefined_figure_no_mean() -> None:
    found = compare(np.array([[0.7], [0.6]]), None)
    assert found.mean == pytest.approx(0.1)
    assert (found.p, found.interval(0.95)) == (None, (None, None))
    assert compare(np.full((2, 3), np.nan), NO_ERRORS) == Difference(None, 3)


def test_covariances_are_the_means_of_their_kind() -> None:
    """Against plain loops over all pairs of figures; resamples with an undefined figure are left out."""
    rng = np.random.default_rng(0)
    replicates = rng.normal(size=(50, 2, 3)) + rng.normal(size=(50, 1, 3)) + rng.normal(size=(50, 2, 1))
    kinds: dict[tuple[bool, bool], list[float]] = {}
    for i, j, k, m in np.ndindex(2, 3, 2, 3):
        covariance = np.cov(replicates[:, i, j], replicates[:, k, m])[0, 1]
        kinds.setdefault((i == k, j == m), []).append(covariance)
    expected = [np.mean(kinds[kind]) for kind in ((True, True), (False, True), (True, False), (False, False))]
    with_gap = np.concatenate([replicates, np.full((1, 2, 3), np.nan)])
    for given in (replicates, with_gap):
        found = error_covariances(given)
        assert [found.variance, found.cov1, found.cov2, found.cov3] == pytest.approx(expected)


def test_covariances_of_equal_arms_are_equal() -> None:
    """So that nothing but the seeds is left in their difference."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 80)
    seeds = [np.stack([1 - p, p], axis=1) for p in rng.random((3, 80))]
    resampled = bootstrap(Task("binary", ("no", "yes")), labels, {"baseline": seeds, "inmerge": seeds})
    found = error_covariances(resampled.replicates(("inmerge", "baseline")))
    assert found.variance == pytest.approx(found.cov1)
    assert found.cov2 == pytest.approx(found.cov3)
    values = np.array([[0.5, 0.6, 0.7]] * 2)
    assert compare(values, found).interval(0.95) == (0, 0)
