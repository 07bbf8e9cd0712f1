"""What the report claims of models that were made smaller."""

from __future__ import annotations

import pytest
from finetune.reports.smaller import Size, largest_reduction


def of_size(macs: float) -> Size:
    return Size(macs, macs, macs, {}, 0.0)


@pytest.mark.parametrize(
    ("sizes", "outcomes", "told"),
    [
        pytest.param([0.7, 0.9, 0.5], ["equivalent", "equivalent", "undecided"], "is arm0, with 70.0 %", id="smallest"),
        pytest.param([0.7, 0.9], ["undecided", "worse"], "None of the smaller models is shown", id="none equivalent"),
        pytest.param([1.0, 0.9], ["identical", "worse"], "None of the smaller models is shown", id="the whole one"),
        pytest.param([1.0, 1.0], ["equivalent", "worse"], "None of the models became smaller", id="none smaller"),
    ],
)
def test_a_reduction_is_a_smaller_model_that_is_equivalent(sizes: list[float], outcomes: list[str], told: str) -> None:
    names = [f"arm{number}" for number in range(len(sizes))]
    found = largest_reduction(
        dict(zip(names, map(of_size, sizes), strict=True)), dict(zip(names, outcomes, strict=True)), 0.005
    )
    assert told in found
