"""How often the verdict is wrong in simulated trials: a small version of benchmarks/verdict_simulation.py."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from finetune.options import MARGIN
from verdict_simulation import Setting, bootstrapped, delong, draw_scores, simulate


@pytest.mark.parametrize("arm_by_case", [0.0, 1.0])
@pytest.mark.parametrize("seeds", [3, 10])
def test_equal_arms_are_called_different_as_seldom_as_said(seeds: int, arm_by_case: float) -> None:
    """The t test over seeds is not: where an arm does to a case the same in all seeds, it is wrong too often."""
    tally = simulate(Setting(seeds, 150, arm_by_case), 0.0, trials=500)
    assert 0.02 <= tally.share("differs") <= 0.08
    assert 0.93 <= tally.share("covered") <= 0.97
    assert tally.share("equivalent") <= 0.06
    if arm_by_case:
        assert tally.share("t_test") > (0.4 if seeds == 10 else 0.1)


def test_arms_at_the_margins_edge_are_seldom_called_equivalent() -> None:
    for margin in (MARGIN, 0.05):
        tally = simulate(Setting(5, 150, 1.0, margin), margin, trials=500)
        assert tally.share("equivalent") <= 0.07
        assert 0.93 <= tally.share("covered") <= 0.97


def test_the_bootstrap_finds_delongs_covariances() -> None:
    """On average to 3 %: what the simulation takes, and what the recipes take."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(20):
        positive, scores = draw_scores(Setting(5, 624, 1.0), 0.0, rng)
        errors = delong(positive, scores)[1], bootstrapped(positive, scores)
        pairs.append([list(asdict(found).values()) for found in errors])
    exact, resampled = np.array(pairs).transpose(1, 0, 2)
    np.testing.assert_allclose(resampled.mean(axis=0), exact.mean(axis=0), rtol=0.03)
    np.testing.assert_allclose(resampled, exact, rtol=0.25)
