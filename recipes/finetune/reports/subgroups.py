"""How well each arm does in parts of the test set, such as the images of women, and how far apart the parts are."""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..data.images import ImageData
from ..judging.formatting import percent
from ..judging.intervals import LEVEL, both_of, resamples, units_of
from ..judging.metrics import Scored, positives, resample_aurocs
from ..options import BASELINE
from ..runs.finished import FinishedRun
from ..runs.sections import Section
from .style import interval_text, number_text, range_text

FEWEST = 10  # positive and negative cases of a label in a part, below which its AUROC there says nothing


Probabilities = dict[str, list[np.ndarray | None]]  # per arm and seed, None where it diverged


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
    finished = {arm: [found.probabilities for found in seeds] for arm, seeds in run.predictions.items()}
    probabilities = run.each_seed(finished)
    unit = "cases" if data.test.patients is None else "patients"
    parts = {
        name: [
            _part(data, f"{name}: {value}", np.array(values) == value)
            for value in sorted({value for value in values if value is not None})
        ]
        for name, values in data.test.subgroups.items()
    }
    rows = [
        row
        for found in parts.values()
        for row in [
            *(_row(data, part, probabilities, run.other_arms) for part in found),
            *_gaps(data, found, probabilities, run.other_arms),
        ]
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


def _row(data: ImageData, part: _Part, probabilities: Probabilities, others: list[str]) -> list[str | None]:
    patients = None if data.test.patients is None else len({data.test.patients[row] for row in part.rows})
    sizes = [f"{len(part.rows):,}", None if patients is None else f"{patients:,}", str(len(part.labels))]
    if not part.labels:
        return [part.name, *sizes, *[None] * (len(probabilities) + len(others))]
    (found,) = _figures(data, [part], part.labels, probabilities)
    arms = [f"{number_text(_mean(found[arm]))} {range_text(*_interval(found[arm]))}" for arm in probabilities]
    return [part.name, *sizes, *arms, *(_difference_text(found[arm] - found[BASELINE]) for arm in others)]


def _gaps(
    data: ImageData, parts: list[_Part], probabilities: Probabilities, others: list[str]
) -> list[list[str | None]]:
    """Each part minus the largest one, where they have labels in common."""
    if not parts:
        return []
    largest = max(parts, key=lambda part: len(part.rows))
    rows = []
    for part in parts:
        labels = tuple(name for name in part.labels if name in largest.labels)
        if part is largest or not labels:
            continue
        here, there = _figures(data, [part, largest], labels, probabilities)
        cells = [_difference_text(here[arm] - there[arm]) for arm in probabilities]
        name = f"gap of {part.name} to {largest.name.partition(': ')[2]}"
        rows.append([name, None, None, str(len(labels)), *cells, *[None] * len(others)])
    return rows


def _figures(
    data: ImageData, parts: list[_Part], labels: tuple[str, ...], probabilities: Probabilities
) -> list[dict[str, np.ndarray]]:
    """Per part and arm the AUROC, mean over labels, (1 + resamples, seeds): first on the part itself.

    The resamples are of patients, and the same for all. NaN in the seeds in which an arm diverged.
    """
    rows = np.concatenate([part.rows for part in parts])
    places = [slice(*ends) for ends in pairwise(np.cumsum([0, *(len(part.rows) for part in parts)]))]
    patients = None if data.test.patients is None else [data.test.patients[row] for row in rows]
    truth = data.test.labels[rows]
    needed = []
    for place in places:
        for mask in both_of(positives(data.task, truth[place]).values()):
            whole = np.zeros(len(rows), dtype=bool)
            whole[place] = mask
            needed.append(whole)
    scored = [
        {
            arm: [None if seed is None else Scored(data.task, truth[at], seed[rows][at]) for seed in seeds]
            for arm, seeds in probabilities.items()
        }
        for at in places
    ]
    itself = np.ones((len(rows), 1), dtype=np.float32)
    found: list[dict[str, list[np.ndarray]]] = [{arm: [] for arm in probabilities} for _ in places]
    for weights in (itself, *resamples(units_of(len(rows), patients), needed)):
        for at, of_part, into in zip(places, scored, found, strict=True):
            for arm, seeds in of_part.items():
                into[arm].append(np.stack([_mean_auroc(seed, weights[at], labels) for seed in seeds], axis=1))
    return [{arm: np.concatenate(chunks) for arm, chunks in into.items()} for into in found]


def _mean_auroc(scored: Scored | None, weights: np.ndarray, labels: tuple[str, ...]) -> np.ndarray:
    """Over labels, in each resample."""
    if scored is None:
        return np.full(weights.shape[1], np.nan)
    found = resample_aurocs(scored, weights)
    return np.mean([found[name] for name in labels], axis=0)


def _over_seeds(figures: np.ndarray) -> np.ndarray:
    """The mean over the seeds that have a figure."""
    return figures[:, np.isfinite(figures[0])].mean(axis=1)


def _mean(figures: np.ndarray) -> float:
    return float(_over_seeds(figures)[0])


def _interval(figures: np.ndarray) -> tuple[float, float]:
    low, high = np.nanquantile(_over_seeds(figures)[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _difference_text(figures: np.ndarray) -> str | None:
    """Over the seeds that both have; None where that is none."""
    return interval_text(_mean(figures), _interval(figures)) if np.isfinite(figures[0]).any() else None
