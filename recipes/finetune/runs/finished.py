"""A run whose arms are all finished, as its folder tells it, for those who judge it and report on it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations, product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from ..data.tasks import Predictions, Task
from ..errors import InputError
from ..files import check_links, read_json
from ..judging.intervals import Bootstrap, bootstrap
from ..judging.metrics import Chosen, choose
from ..judging.summary import SCHEMA, Results, Rule, scored_anew, summarise
from ..options import BASELINE, MARGIN, MARGIN_CHOSEN
from .config import read_config
from .kernels import OfLayers, compare_kernels
from .layout import (
    BACKBONE,
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

Found = TypeVar("Found")


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
        return read_config(self.folder)

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
    def _broken(self) -> dict[tuple[str, int], int]:
        """The epoch in which "backbone" or an arm diverged in a seed, where it did."""
        files = {
            (stage, seed): self.stage(seed, stage) / RESULT
            for stage, seed in product((BACKBONE, *self.asked_arms), self.asked_seeds)
        }
        # A backbone that folds are joined in has none.
        results = {key: read_json(file) for key, file in files.items() if file.exists()}
        return {key: result["diverged"] for key, result in results.items() if "diverged" in result}

    @cached_property
    def diverged(self) -> dict[str, dict[int, int]]:
        """Per arm that diverged the seeds in which it did, and in which epoch."""
        found: dict[str, dict[int, int]] = {}
        for (stage, seed), epoch in self._broken.items():
            if stage != BACKBONE:
                found.setdefault(stage, {})[seed] = epoch
        return found

    @property
    def seeds(self) -> list[int]:
        return self.asked_seeds

    @cached_property
    def arms(self) -> list[str]:
        """Those that are scored: all but those that diverged in every seed."""
        return [arm for arm in self.asked_arms if self.finished_seeds(arm)]

    def finished_seeds(self, stage: str) -> list[int]:
        """Those in which a stage, "backbone" or an arm, came to an end instead of diverging."""
        return [seed for seed in self.seeds if (stage, seed) not in self._broken]

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
        """Those that are set against the baseline: that finished a seed which it finished as well."""
        return list(self.summary["differences"])

    @property
    def merging_arms(self) -> list[str]:
        return list(self.summary["merges"])

    @property
    def sections(self) -> list[Section]:
        """What the recipe added to the report, and robustness.py after it."""
        return [*read_sections(self.folder), *read_sections(self.folder, ROBUSTNESS)]

    def stage(self, seed: int, name: str) -> Path:
        return stage_folder(self.folder, seed, name)

    def weights(self, seed: int, arm: str) -> list[Path]:
        """The kept models of an arm: one, or in cross-validation one of each fold."""
        folds = [None] if self.folds is None else range(self.folds)
        return [stage_folder(self.folder, seed, arm, fold) / WEIGHTS for fold in folds]

    def curves(self, stage: str) -> pd.DataFrame:
        """metrics.csv of a stage, "backbone" or an arm, a row per seed that it finished and epoch."""
        return self._tables(stage, CURVES)

    def merges(self, arm: str) -> pd.DataFrame:
        """merges.csv of an arm, a row per seed, epoch and selected layer; there is one where any arm merges."""
        return self._tables(arm, MERGES)

    @cached_property
    def predictions(self) -> dict[str, list[Predictions]]:
        """Per arm those on test by the kept weights of each seed that it finished, in the order of the seeds."""
        return self._predictions("test")

    @cached_property
    def validation(self) -> dict[str, list[Predictions]]:
        """The same on validation."""
        return self._predictions("val")

    @cached_property
    def chosen(self) -> dict[str, list[Chosen]]:
        """Likewise what is chosen on validation."""
        return {
            arm: [choose(self.task, found.labels, found.probabilities) for found in seeds]
            for arm, seeds in self.validation.items()
        }

    def each_seed(self, found: Mapping[str, Sequence[Found]]) -> dict[str, list[Found | None]]:
        """Per arm what was found of each seed, from what was found of those that it finished; None for the others."""
        places = {arm: {seed: place for place, seed in enumerate(self.finished_seeds(arm))} for arm in found}
        return {
            arm: [of_arm[places[arm][seed]] if seed in places[arm] else None for seed in self.seeds]
            for arm, of_arm in found.items()
        }

    @cached_property
    def results(self) -> Results:
        """Per seed and arm that finished it the result of the stage, with the figures of its kept epoch scored anew."""
        results: Results = {seed: {} for seed in self.seeds}
        for arm in self.arms:
            found = zip(self.finished_seeds(arm), self.validation[arm], self.predictions[arm], strict=True)
            for seed, val, test in found:
                results[seed][arm] = scored_anew(self.task, read_whole_result(self.stage(seed, arm)), val, test)
        return results

    @cached_property
    def resampled_test(self) -> Bootstrap | None:
        """The bootstrap over the test set; None where no arm has predicted it."""
        if not self.arms:
            return None
        test = self.predictions[self.arms[0]][0]
        probabilities = {arm: [found.probabilities for found in seeds] for arm, seeds in self.predictions.items()}
        return bootstrap(
            self.task,
            test.labels,
            self.each_seed(probabilities),
            test.patients,
            chosen=self.each_seed(self.chosen),
        )

    @cached_property
    def identical(self) -> set[tuple[str, str]]:
        """Pairs of arms whose weights are equal to the bit in every seed."""
        of_stage = FOLDS if self.folds else WEIGHTS
        weights = {
            arm: [found.get(arm) and found[arm]["files"][of_stage] for found in self.results.values()]
            for arm in self.arms
        }
        return {pair for pair in permutations(self.arms, 2) if weights[pair[0]] == weights[pair[1]]}

    @cached_property
    def kernels(self) -> dict[str, list[OfLayers | None]]:
        """Per merging arm and seed what merging did to the kernels; None where it or the baseline diverged."""
        return {
            arm: [self._compared_kernels(seed, arm, found) for seed, found in self.results.items()]
            for arm in self.arms
            if any(arm in found and found[arm]["merges"] for found in self.results.values())
        }

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
            self.kernels,
        )

    def _compared_kernels(self, seed: int, arm: str, finished: Collection[str]) -> OfLayers | None:
        if not {arm, BASELINE} <= set(finished):
            return None
        return compare_kernels(*([file.parent for file in self.weights(seed, stage)] for stage in (arm, BASELINE)))

    def _predictions(self, part: str) -> dict[str, list[Predictions]]:
        """Of all arms and the seeds that each finished, on the same cases, as pairs are compared."""
        found = {
            arm: [read_predictions(self.stage(seed, arm), part) for seed in self.finished_seeds(arm)]
            for arm in self.arms
        }
        for arm, of_arm in found.items():
            first = found[self.arms[0]][0]
            for seed, own in zip(self.finished_seeds(arm), of_arm, strict=True):
                if own.cases != first.cases or not np.array_equal(own.labels, first.labels):
                    raise InputError(
                        f"{self.stage(seed, arm)} is damaged: its predictions of {part} are not on the cases of the "
                        "others"
                    )
        return found

    def _tables(self, stage: str, file: str) -> pd.DataFrame:
        tables = {seed: pd.read_csv(self.stage(seed, stage) / file) for seed in self.finished_seeds(stage)}
        return pd.concat(tables, names=["seed"]).reset_index("seed")

    def _json(self, name: str) -> dict[str, Any]:
        return read_json(self.folder / name)


def current_summary(run: Path) -> dict[str, Any] | None:
    """The summary of a finished run, made anew where another version has written it; None where there is none yet."""
    summary = read_summary(run)
    if summary is None or summary.get("schema") == SCHEMA:
        return summary
    return FinishedRun(run).summary
