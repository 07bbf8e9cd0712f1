"""How well each arm does in parts of the test set, such as the images of women."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from ..data.images import ImageData
from ..data.tasks import Task
from ..judging.intervals import LEVEL, bootstrap
from ..judging.metrics import per_class
from ..options import BASELINE
from ..runs.finished import FinishedRun
from ..runs.sections import Section
from .style import interval_text, number_text


def subgroup_section(run: FinishedRun, data: ImageData) -> Section:
    """A row per subgroup of the test set: its size, the macro AUROC of each arm, mean over seeds, and the differences.

    Labels that all or none of a subgroup's cases have are left out of its mean. The intervals are bootstrap intervals
    over the patients of the subgroup, or over its cases where patients are not known.
    """
    finished = {arm: [found.probabilities for found in seeds] for arm, seeds in run.predictions.items()}
    probabilities = run.each_seed(finished)
    unit = "cases" if data.test.patients is None else "patients"
    rows = [
        [f"{name}: {value}", *_cells(data, np.flatnonzero(np.array(values) == value), probabilities, run.other_arms)]
        for name, values in data.test.subgroups.items()
        for value in sorted(set(values) - {None})
    ]
    unknown = [
        f"{name} of {count:,} of {len(data.test):,} test cases"
        for name, values in data.test.subgroups.items()
        if (count := Counter(values)[None])
    ]
    return Section(
        title="Subgroups",
        text=(
            "AUROC on parts of the test set: the mean over the labels that some cases of the part have and others "
            "don't (how many these are stands in the table), and over the seeds. Means over different labels are not "
            f"comparable. After each difference: its {100 * LEVEL:.0f} % bootstrap interval over the {unit} of the "
            "part, which is test-set noise, given these models. With this many comparisons some intervals leave out 0 "
            "by chance." + (f"\n\nNot known, or not plausible, is the {', the '.join(unknown)}." if unknown else "")
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


def _cells(
    data: ImageData, rows: np.ndarray, probabilities: dict[str, list[np.ndarray | None]], others: list[str]
) -> list[str | None]:
    labels = data.test.labels[rows]
    patients = None if data.test.patients is None else [data.test.patients[row] for row in rows]
    part = {arm: [None if p is None else p[rows] for p in seeds] for arm, seeds in probabilities.items()}
    aurocs = {arm: [None if p is None else _aurocs(data.task, labels, p) for p in seeds] for arm, seeds in part.items()}
    means = {arm: _mean(filter(None, seeds)) for arm, seeds in aurocs.items()}
    resampled = bootstrap(data.task, labels, part, patients, metrics=["auroc"])
    differences = []
    for arm in others:
        pairs = zip(aurocs[arm], aurocs[BASELINE], strict=True)
        difference = _mean(np.subtract(*pair) for pair in pairs if all(pair))
        differences.append(interval_text(difference, resampled.interval(arm, BASELINE)))
    scored = next(len(found) for found in next(iter(aurocs.values())) if found is not None)
    return [
        f"{len(rows):,}",
        None if patients is None else f"{len(set(patients)):,}",
        str(scored),
        *(number_text(mean) for mean in means.values()),
        *differences,
    ]


def _aurocs(task: Task, labels: np.ndarray, probabilities: np.ndarray) -> list[float]:
    """Of the classes that some cases have and others don't."""
    found = per_class(task, labels, probabilities).values()
    return [figures["auroc"] for figures in found if figures["auroc"] is not None]


def _mean(of_seeds: Iterable[Sequence[float]]) -> float | None:
    """Over seeds and classes; None without any."""
    values = list(of_seeds)
    return float(np.mean(values)) if values else None
