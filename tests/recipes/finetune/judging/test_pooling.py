"""Pooling over data sets and Holm's adjustment, against published figures and simulated zoos."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
from finetune.judging.pooling import holm, pool

# Thirteen trials of the BCG vaccine (Colditz and others, JAMA 271, 1994, 698-702), the example of R's metafor: with and
# without tuberculosis among the vaccinated, and among the others.
BCG = """
4 119 11 128, 6 300 29 274, 3 228 11 209, 62 13536 248 12619, 33 5036 47 5761, 180 1361 372 1079, 8 2537 10 619,
505 87886 499 87892, 29 7470 45 7232, 17 1699 65 1600, 186 50448 141 27197, 5 2493 3 2338, 27 16886 29 17825
"""


def bcg() -> tuple[np.ndarray, np.ndarray]:
    """Log risk ratios and their standard errors."""
    a, b, c, d = np.array([trial.split() for trial in BCG.split(",")], dtype=float).T
    return np.log(a / (a + b) / (c / (c + d))), np.sqrt(1 / a - 1 / (a + b) + 1 / c - 1 / (c + d))


def test_pooling_agrees_with_metafor() -> None:
    """Tau squared .3181 by Paule and Mandel; mean and interval by Knapp and Hartung as it has with REML's .3132."""
    found = pool(*bcg(), [f"trial {k}" for k in range(13)])
    assert found.datasets == 13
    assert found.tau_squared == pytest.approx(0.3181, abs=1e-4)
    assert found.mean == pytest.approx(-0.7145, abs=0.002)
    assert (found.low, found.high) == pytest.approx((-1.108, -0.321), abs=0.005)
    assert found.prediction_low < -1.9 < 0.4 < found.prediction_high


def test_models_on_one_data_set_count_as_one_study() -> None:
    """However often a data set is there with the same figures, nothing is surer."""
    effects, errors = bcg()
    names = [f"trial {k}" for k in range(13)]
    more = [*range(13), 0, 1, 2, 0]
    repeated = pool(effects[more], errors[more], [names[k] for k in more])
    assert astuple(repeated) == pytest.approx(astuple(pool(effects, errors, names)))
    # Two models that differ are averaged, and are no surer than one.
    alone = pool([0.01, 0.02, 0.03], [0.01, 0.01, 0.01], ["a", "b", "c"])
    both = pool([0.0, 0.02, 0.02, 0.03], [0.005, 0.015, 0.01, 0.01], ["a", "a", "b", "c"])
    assert both.mean == pytest.approx(alone.mean)
    assert both.low == pytest.approx(alone.low)


def test_the_interval_covers_the_mean_over_data_sets() -> None:
    rng = np.random.default_rng(0)
    covered, predicted = [], []
    for _ in range(500):
        errors = rng.uniform(0.002, 0.006, 6)
        found = pool(rng.normal(rng.normal(0.01, 0.005, 6), errors), errors, list("abcdef"))
        covered.append(found.low <= 0.01 <= found.high)
        predicted.append(found.prediction_low <= rng.normal(0.01, 0.005) <= found.prediction_high)
    assert 0.92 < np.mean(covered) < 0.985
    assert 0.87 < np.mean(predicted) < 0.985, "known to fall short with few studies"


def test_what_cant_be_pooled_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"pooled over 3 data sets at least, and there are 2 \(a, b\)"):
        pool([0.01] * 4, [0.01] * 4, ["a", "a", "b", "b"])
    with pytest.raises(ValueError, match="the difference on b has no standard error"):
        pool([0.01, 0.0, 0.02], [0.01, 0.0, 0.01], ["a", "b", "c"])


def test_holm_adjusts_within_the_declared_family() -> None:
    """A trial that is not finished counts, so that its end can only lower the others' p."""
    adjusted = holm({"a": 0.04, "b": 0.01, "c": None, "d": 0.02})
    assert adjusted == {"a": pytest.approx(0.08), "b": pytest.approx(0.04), "c": None, "d": pytest.approx(0.06)}
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}
