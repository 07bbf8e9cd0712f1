"""scikit-learn's digits."""

from __future__ import annotations

import numpy as np
from finetune.sources.digits import load_digits_data


def test_digits_are_split_once_by_class() -> None:
    """No image twice, none lost, the classes balanced; the split depends on its own seed alone."""
    data, again, other = (load_digits_data(8, seed) for seed in (0, 0, 1))
    cases = [case for split in (data.train, data.val, data.test) for case in split.cases]
    assert sorted(map(int, cases)) == list(range(1797))
    assert data.test.cases == again.test.cases != other.test.cases
    for split in (data.train, data.val, data.test):
        assert np.bincount(split.labels).min() > 0.09 * len(split)
    assert data.train.images.shape[1:] == (1, 8, 8)
    assert data.train.images.max() == 255
