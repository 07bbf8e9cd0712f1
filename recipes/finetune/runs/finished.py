"""A run whose arms are all finished, as its folder tells it, for those who judge it and report on it."""

from dataclasses import dataclass
from functools import cached_property
from itertools import permutations, product
from pathlib import Path
from typing import Any

import pandas as pd

from ..data.tasks import Predictions, Task
from ..errors import InputError
from ..files import check_links, read_json, read_yaml
from ..judging.intervals import Bootstrap, bootstrap
from ..judging.metrics import choose_thresholds
from ..judging.summary import SCHEMA, Results, Rule, scored_anew, summarise
from ..options import BASELINE, MARGIN, MARGIN_CHOSEN
from .layout import (
    CONFIG,
    CURVES,
    DATA,
    FOLDS,
    MERGES,
    RESULT,
    ROBUSTNESS,
    SUMMARY,
    VERSIONS,
    WEIGHTS,
    stage_folder,
)
from .looks import read_looks
from .results import read_predictions, read_whole_result
from .sections import Section, read_sections
from .summaries import read_summary


@dataclass(frozen=True)
class FinishedRun:
    """What a run folder holds and what follows from it, each read or computed once, when it is asked for."""

    folder: Path

    def __post_init__(self) -> None:
        if not (self.folder / CONFIG).exists():
            raise InputError(f"{self.folder} is no run folder: it has no {CONFIG}; give the --output of a recipe")
        check_links(self.folder)
        if not all((self.stage(seed, arm) / RESULT).exists() for seed in self.asked_seeds for arm in self.asked_arms):
            raise InputError(f"the run in {self.folder} is not finished: go on with it by the recipe's --resume first")

    @cached_property
    def options(self) -> dict[str, Any]:
        return read_yaml(self.folder / CONFIG)

    @cached_property
    def versions(self) -> dict[str, Any]:
        return self._json(VERSIONS)

    @cached_property
    def description(self) -> dict[str, Any]:
        """What the run has recorded of its data."""
        recorded = self._json(DATA) if (self.folder / DATA).exists() else {}
        if "classes" in recorded:
            return recorded
        # Runs of inmerge_optim 0.1 tell the task in their summary alone.
        if not (self.folder / SUMMARY).exists():
            raise InputError(f"{self.folder} doesn't say what was learnt: {DATA} and {SUMMARY} of its run are missing")
        summary = self._json(SUMMARY)
        return {"name": summary["data"], "task": summary["task"], "classes": summary["classes"], **recorded}

    @property
    def name(self) -> str:
        return f"{self.description['name']}, {self.options['model']}"

    @property
    def task(self) -> Task:
        # Runs that don't say which class is positive were scored by class 1.
        return Task(self.description["task"], tuple(self.description["classes"]), self.description.get("positive", 1))

    @property
    def folds(self) -> int | None:
        """Of cross-validation how many there are; the stages of a seed are then joined of those of its folds."""
        return self.description.get("folds")

    @cached_property
    def looks(self) -> list[dict[str, Any]]:
        """What the run was judged on each time that it was."""
        return read_looks(self.folder)

    @cached_property
    def diverged(self) -> dict[str, dict[int, int]]:
        """Per arm that diverged the seeds in which it did, and in which epoch."""
        found: dict[str, dict[int, int]] = {}
        for arm, seed in product(self.asked_arms, self.asked_seeds):
            result = read_json(self.stage(seed, arm) / RESULT)
            if "diverged" in result:
                found.setdefault(arm, {})[seed] = result["diverged"]
        return found

    @cached_property
    def _scored(self) -> tuple[list[int], list[str]]:
        """The seeds in which all of the arms came to an end, without the arms that would leave no such seed."""
        arms = list(self.asked_arms)
        while True:
            broken = {seed for arm in arms for seed in self.diverged.get(arm, ())}
            seeds = [seed for seed in self.asked_seeds if seed not in broken]
            others = [arm for arm in arms if arm in self.diverged and arm != BASELINE]
            if seeds:
                return seeds, arms
            if not others:
                raise InputError(
                    f"the {BASELINE} of the run in {self.folder} diverged in all seeds, so that there is nothing to "
                    "compare with: choose a smaller learning rate and another --output"
                )
            arms.remove(max(others, key=lambda arm: len(self.diverged[arm])))

    @property
    def seeds(self) -> list[int]:
        """Those that are scored: all, unless an arm diverged."""
        return self._scored[0]

    @property
    def arms(self) -> list[str]:
        """Those that are scored: all, unless one diverged in every seed."""
        return self._scored[1]

    @property
    def asked_seeds(self) -> list[int]:
        """Those that the run was begun with and those that were added, as it was last judged."""
        return (self.looks[-1] if self.looks else self.options)["seeds"]

    @property
    def asked_arms(self) -> list[str]:
        return (self.looks[-1] if self.looks else self.options)["arms"]

    @property
    def rule(self) -> Rule:
        """What the run is judged by, as it was fixed before it began; runs of inmerge_optim 0.1 fixed nothing."""
        options = self.options
        return Rule(
            options.get("primary_metric", Rule.metric),
            options.get("margin", MARGIN),
            options.get(MARGIN_CHOSEN, False),
            options.get("planned_seeds"),
        )

    @property
    def other_arms(self) -> list[str]:
        return [arm for arm in self.arms if arm != BASELINE]

    @property
    def merging_arms(self) -> list[str]:
        return list(self.summary["merges"])

    @property
    def sections(self) -> list[Section]:
        """What the recipe added to the report, and robustness.py after it."""
        return [*read_sections(self.folder), *read_sections(self.folder, ROBUSTNESS)]

    def stage(self, seed: int, name: str) -> Path:
        return stage_folder(self.folder, seed, name)

    def curves(self, stage: str) -> pd.DataFrame:
        """metrics.csv of a stage, "backbone" or an arm, a row per seed and epoch."""
        return self._tables(stage, CURVES)

    def merges(self, arm: str) -> pd.DataFrame:
        """merges.csv of an arm, a row per seed, epoch and selected layer; there is one where any arm merges."""
        return self._tables(arm, MERGES)

    @cached_property
    def predictions(self) -> dict[str, list[Predictions]]:
        """Per arm those on test by the kept weights of each seed, in the order of the seeds."""
        return self._predictions("test")

    @cached_property
    def validation(self) -> dict[str, list[Predictions]]:
        """The same on validation."""
        return self._predictions("val")

    @cached_property
    def results(self) -> Results:
        """Per seed and arm the result of the stage, with the figures of its kept epoch scored anew."""
        return {
            seed: {
                arm: scored_anew(
                    self.task,
                    read_whole_result(self.stage(seed, arm)),
                    self.validation[arm][place],
                    self.predictions[arm][place],
                )
                for arm in self.arms
            }
            for place, seed in enumerate(self.seeds)
        }

    @cached_property
    def resampled_test(self) -> Bootstrap:
        """The bootstrap over the test set."""
        test = self.predictions[BASELINE][0]
        probabilities = {arm: [found.probabilities for found in seeds] for arm, seeds in self.predictions.items()}
        thresholds = {
            arm: [choose_thresholds(self.task, found.labels, found.probabilities) for found in seeds]
            for arm, seeds in self.validation.items()
        }
        return bootstrap(self.task, test.labels, probabilities, test.patients, thresholds=thresholds)

    @cached_property
    def identical(self) -> set[tuple[str, str]]:
        """Pairs of arms whose weights are equal to the bit in every seed."""
        of_stage = FOLDS if self.folds else WEIGHTS
        weights = {arm: [self.results[seed][arm]["files"][of_stage] for seed in self.seeds] for arm in self.arms}
        return {pair for pair in permutations(self.arms, 2) if weights[pair[0]] == weights[pair[1]]}

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json: a function of the run folder alone, by the metrics and rules of today."""
        looks = max(1, len(self.looks))
        return summarise(
            self.description["name"],
            self.task,
            self.results,
            self.resampled_test,
            self.rule,
            self.identical,
            looks,
            self.diverged,
        )

    def _predictions(self, part: str) -> dict[str, list[Predictions]]:
        return {arm: [read_predictions(self.stage(seed, arm), part) for seed in self.seeds] for arm in self.arms}

    def _tables(self, stage: str, file: str) -> pd.DataFrame:
        tables = {seed: pd.read_csv(self.stage(seed, stage) / file) for seed in self.seeds}
        return pd.concat(tables, names=["seed"]).reset_index("seed")

    def _json(self, name: str) -> dict[str, Any]:
        return read_json(self.folder / name)


def current_summary(run: Path) -> dict[str, Any] | None:
    """The summary of a finished run, made anew where another version has written it; None where there is none yet."""
    summary = read_summary(run)
    if summary is None or summary.get("schema") == SCHEMA:
        return summary
    return FinishedRun(run).summary
