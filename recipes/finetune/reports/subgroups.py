"""How well each arm does in parts of the test set, such as the images of women, and how far apart the parts are."""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..data.images import ImageData
from ..data.tasks import Task
from ..judging.formatting import percent
from ..judging.intervals import LEVEL, both_of, resamples, units_of
from ..judging.metrics import Scored, per_class, positives, resample_aurocs
from ..options import BASELINE
from ..runs.finished import FinishedRun
from ..runs.sections import Section
from .style import interval_text, number_text, range_text

FEWEST = 10  # positive and negative cases of a label in a part, below which its AUROC there says nothing


@dataclass(frozen=True)
class _Part:
    """A part of the test set: its name, its rows, and the labels that are scored there."""

    name: str
    rows: np.ndarray
    labels: tuple[str, ...]


def subgroup_section(run: FinishedRun, data: ImageData) -> Section:
    """A row per subgroup of the test set: its size, each arm's macro AUROC, and the differences; all with intervals.

    Below stands the gap of each part to the largest one of its kind. Labels with fewer than FEWEST positive or negative
    cases in a part are left out of its mean. The intervals are bootstrap intervals over the patients, or over the cases
    where patients are not known.
    """
    probabilities = {arm: [found.probabilities for found in seeds] for arm, seeds in run.predictions.items()}
    unit = "cases" if data.test.patients is None else "patients"
    parts = {
        name: [_part(data, f"{name}: {value}", np.array(values) == value) for value in sorted(set(values) - {None})]
        for name, values in data.test.subgroups.items()
    }
    rows = [
        row
        for found in parts.values()
        for row in [*(_row(data, part, probabilities) for part in found), *_gaps(data, found, probabilities)]
    ]
    unknown = [
        f"{name} of {count:,} of {len(data.test):,} test cases"
        for name, values in data.test.subgroups.items()
        if (count := Counter(values)[None])
    ]
    return Section(
        title="Subgroups",
        text=(
            "AUROC on parts of the test set: the mean over the labels that have at least "
            f"{FEWEST} positive and {FEWEST} negative cases there (how many these are stands in the table), and over "
            "the seeds. Means over different labels are not comparable; a gap between two parts is over the labels "
            f"that both have. In brackets: {percent(LEVEL)} bootstrap intervals over the {unit}, which is test-set "
            "noise, given these models. With this many comparisons some intervals leave out 0 by chance."
            + (f"\n\nNot known, or not plausible, is the {', the '.join(unknown)}." if unknown else "")
        ),
        header=[
            "subgroup",
            "cases",
            "patients",
            "labels",
            *run.arms,
            *(f"{arm} - {BASELINE}" for arm in run.other_arms),
        ],
        rows=rows,
    )


def _part(data: ImageData, name: str, chosen: np.ndarray) -> _Part:
    rows = np.flatnonzero(chosen)
    found = positives(data.task, data.test.labels[rows])
    enough = [k for k, cases in found.items() if min(cases.sum(), (~cases).sum()) >= FEWEST]
    return _Part(name, rows, tuple(data.task.classes[k] for k in enough))


def _row(data: ImageData, part: _Part, probabilities: dict[str, list[np.ndarray]]) -> list[str | None]:
    patients = None if data.test.patients is None else len({data.test.patients[row] for row in part.rows})
    sizes = [f"{len(part.rows):,}", None if patients is None else f"{patients:,}", str(len(part.labels))]
    others = [arm for arm in probabilities if arm != BASELINE]
    if not part.labels:
        return [part.name, *sizes, *[None] * (len(probabilities) + len(others))]
    (means,), (draws,) = _figures(data, [part], part.labels, probabilities)
    arms = [f"{number_text(means[arm])} {range_text(*_interval(draws[arm]))}" for arm in probabilities]
    differences = [
        interval_text(means[arm] - means[BASELINE], _interval(draws[arm] - draws[BASELINE])) for arm in others
    ]
    return [part.name, *sizes, *arms, *differences]


def _gaps(data: ImageData, parts: list[_Part], probabilities: dict[str, list[np.ndarray]]) -> list[list[str | None]]:
    """Each part minus the largest one, where they have labels in common."""
    largest = max(parts, key=lambda part: len(part.rows), default=None)
    rows = []
    for part in parts:
        labels = tuple(name for name in part.labels if largest and name in largest.labels)
        if part is largest or not labels:
            continue
        means, draws = _figures(data, [part, largest], labels, probabilities)
        cells = [
            interval_text(means[0][arm] - means[1][arm], _interval(draws[0][arm] - draws[1][arm]))
            for arm in probabilities
        ]
        name = f"gap of {part.name} to {largest.name.partition(': ')[2]}"
        rows.append([name, None, None, str(len(labels)), *cells, *[None] * (len(probabilities) - 1)])
    return rows


def _figures(
    data: ImageData, parts: list[_Part], labels: tuple[str, ...], probabilities: dict[str, list[np.ndarray]]
) -> tuple[list[dict[str, float]], list[dict[str, np.ndarray]]]:
    """Per part and arm the AUROC, mean over labels and seeds, and the same in each resample of the patients."""
    rows = np.concatenate([part.rows for part in parts])
    ends = np.cumsum([0, *(len(part.rows) for part in parts)])
    places = [slice(*pair) for pair in pairwise(ends)]
    patients = None if data.test.patients is None else [data.test.patients[row] for row in rows]
    task, truth = data.task, data.test.labels[rows]
    needed = []
    for place in places:
        for mask in both_of(positives(task, truth[place]).values()):
            whole = np.zeros(len(rows), dtype=bool)
            whole[place] = mask
            needed.append(whole)
    means = [
        {
            arm: _mean_auroc(task, truth[at], [s[rows][at] for s in seeds], labels)
            for arm, seeds in probabilities.items()
        }
        for at in places
    ]
    draws: list[dict[str, list[np.ndarray]]] = [{arm: [] for arm in probabilities} for _ in places]
    for weights in resamples(units_of(len(rows), patients), needed):
        for at, into in zip(places, draws, strict=True):
            for arm, seeds in probabilities.items():
                found = [resample_aurocs(Scored(task, truth[at], s[rows][at]), weights[at]) for s in seeds]
                into[arm].append(np.mean([[seed[name] for name in labels] for seed in found], axis=(0, 1)))
    return means, [{arm: np.concatenate(values) for arm, values in found.items()} for found in draws]


def _mean_auroc(task: Task, labels: np.ndarray, seeds: list[np.ndarray], names: tuple[str, ...]) -> float:
    found = [per_class(task, labels, probabilities) for probabilities in seeds]
    return float(np.mean([[seed[name]["auroc"] for name in names] for seed in found]))


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
