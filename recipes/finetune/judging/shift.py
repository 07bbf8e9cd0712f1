"""How much worse arms are on another part of the data than on the one they do best to know: shift without a corruption.

Two parts are compared on the labels that both can score, since means over different labels are not comparable. Their
patients, or cases, are drawn anew together, as a patient may have images in both.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.tasks import Predictions, Task
from ..options import BASELINE
from .intervals import LEVEL
from .metrics import Scored, positives, resample_aurocs

RESAMPLES = 1000
_FEWEST_OF_EITHER = 5  # cases with a label, and without it, for the label to be scored
_CHUNK = 100

# Per arm and seed.
OfArms = Mapping[str, Sequence[Predictions]]


@dataclass(frozen=True)
class Part:
    """Some cases of a split: their rows in the predictions."""

    name: str
    predictions: OfArms
    rows: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        return self.predictions[BASELINE][0].labels[self.rows]


@dataclass(frozen=True)
class Shift:
    """Two parts beside each other.

    Attributes:
        names, cases: of both.
        labels: how many are scored in both.
        per_case: labels that a case has on average, in both; None where labels are classes.
        aurocs: per arm the macro AUROC on both, mean over seeds.
        differences: per other arm how much more it loses than the baseline does, with its bootstrap interval.
    """

    names: tuple[str, str]
    cases: tuple[int, int]
    labels: int
    per_case: tuple[float, float] | None
    aurocs: dict[str, tuple[float, float]]
    differences: dict[str, tuple[float, float, float]]


def shifts(
    task: Task, test: OfArms, val: OfArms | None, subgroups: Mapping[str, Sequence[str | None]]
) -> Iterator[Shift]:
    """From validation to test, and from the most frequent value of each subgroup to each other one.

    Args:
        val: None where validation and test are the same cases, as in cross-validation.
    """
    pairs = []
    if val is not None:
        every = [(found, np.arange(len(found[BASELINE][0].labels))) for found in (val, test)]
        pairs = [(Part("validation", *every[0]), Part("test", *every[1]))]
    for name, values in subgroups.items():
        known, counts = np.unique([value for value in values if value is not None], return_counts=True)
        from_most = known[np.argsort(-counts, kind="stable")]
        parts = [Part(f"{name} {value}", test, np.flatnonzero(np.array(values) == value)) for value in from_most]
        pairs += [(parts[0], other) for other in parts[1:]]
    for pair in pairs:
        found = _shift(task, *pair)
        if found is not None:
            yield found


def _shift(task: Task, first: Part, second: Part) -> Shift | None:
    """None where no label can be scored in both."""
    both = [
        task.classes[k]
        for k, positive in positives(task, first.labels).items()
        if all(
            _FEWEST_OF_EITHER <= found.sum() <= len(found) - _FEWEST_OF_EITHER
            for found in (positive, positives(task, second.labels)[k])
        )
    ]
    if not both:
        return None
    values: dict[str, list[np.ndarray]] = {arm: [] for arm in first.predictions}
    for weights in _weights(first, second):
        for arm, found in values.items():
            found.append(
                [_aurocs(task, part, arm, both, drawn) for part, drawn in zip((first, second), weights, strict=True)]
            )
    of_arms = {arm: np.concatenate(found, axis=1) for arm, found in values.items()}  # (2, 1 + RESAMPLES)
    differences = {}
    for arm in of_arms:
        if arm != BASELINE:
            lost = (of_arms[arm][0] - of_arms[arm][1]) - (of_arms[BASELINE][0] - of_arms[BASELINE][1])
            low, high = np.nanquantile(lost[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            differences[arm] = (float(lost[0]), float(low), float(high))
    parts = (first, second)
    return Shift(
        names=(first.name, second.name),
        cases=(len(first.rows), len(second.rows)),
        labels=len(both),
        per_case=tuple(float(part.labels.sum(axis=1).mean()) for part in parts) if task.multi_label else None,
        aurocs={arm: (float(found[0, 0]), float(found[1, 0])) for arm, found in of_arms.items()},
        differences=differences,
    )


def _aurocs(task: Task, part: Part, arm: str, names: Sequence[str], weights: np.ndarray) -> np.ndarray:
    """The macro AUROC over these labels, mean over seeds, for each weighting of the cases, (B,)."""
    seeds = []
    for found in part.predictions[arm]:
        scored = resample_aurocs(Scored(task, part.labels, found.probabilities[part.rows]), weights[part.rows])
        seeds.append(np.mean([scored[name] for name in names], axis=0))
    return np.mean(seeds, axis=0)


def _weights(first: Part, second: Part) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """How often each case of the two splits is drawn: once, and then in RESAMPLES resamples, (N, B) each."""
    generators = [np.random.default_rng(seed) for seed in (0, 1)]
    splits = [part.predictions[BASELINE][0] for part in (first, second)]
    same = first.predictions is second.predictions
    ones = [np.ones((len(split.labels), 1), dtype=np.float32) for split in splits]
    yield ones[0], ones[1]
    for start in range(0, RESAMPLES, _CHUNK):
        drawn = [
            _drawn(split, rng, min(_CHUNK, RESAMPLES - start)) for split, rng in zip(splits, generators, strict=True)
        ]
        yield (drawn[0], drawn[0]) if same else (drawn[0], drawn[1])


def _drawn(split: Predictions, rng: np.random.Generator, count: int) -> np.ndarray:
    unit_of = np.unique(np.asarray(split.patients or split.cases), return_inverse=True)[1]
    units = int(unit_of.max()) + 1
    return rng.multinomial(units, np.full(units, 1 / units), size=count).T.astype(np.float32)[unit_of]
