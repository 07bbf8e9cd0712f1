"""A finished run as its folder tells it, for those who report on it."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from ..data.tasks import Task
from ..errors import InputError
from ..options import BASELINE
from .layout import CONFIG, CURVES, DATA, MERGES, VERSIONS, predictions_file, stage_folder
from .results import read_predictions
from .sections import Section, read_sections
from .summaries import read_summary


@dataclass(frozen=True)
class FinishedRun:
    """What a run folder holds, read when it is asked for."""

    folder: Path

    def __post_init__(self) -> None:
        if not (self.folder / CONFIG).exists():
            raise InputError(f"{self.folder} is no run folder: it has no {CONFIG}; give the --output of a recipe")
        if read_summary(self.folder) is None:
            raise InputError(f"the run in {self.folder} is not finished: go on with it by the recipe's --resume first")

    @cached_property
    def summary(self) -> dict[str, Any]:
        return read_summary(self.folder)

    @cached_property
    def options(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / CONFIG).read_text(encoding="utf-8"))

    @cached_property
    def versions(self) -> dict[str, Any]:
        return json.loads((self.folder / VERSIONS).read_text(encoding="utf-8"))

    @cached_property
    def description(self) -> dict[str, Any]:
        """What the run has recorded of its data, if anything."""
        path = self.folder / DATA
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @property
    def name(self) -> str:
        return f"{self.summary['data']}, {self.options['model']}"

    @property
    def task(self) -> Task:
        return Task(self.summary["task"], tuple(self.summary["classes"]))

    @property
    def seeds(self) -> list[int]:
        return self.summary["seeds"]

    @property
    def arms(self) -> list[str]:
        return list(self.summary["arms"])

    @property
    def other_arms(self) -> list[str]:
        return [arm for arm in self.arms if arm != BASELINE]

    @property
    def merging_arms(self) -> list[str]:
        return list(self.summary["merges"])

    @property
    def sections(self) -> list[Section]:
        return read_sections(self.folder)

    def stage(self, seed: int, name: str) -> Path:
        return stage_folder(self.folder, seed, name)

    def curves(self, stage: str) -> pd.DataFrame:
        """metrics.csv of a stage, "backbone" or an arm, a row per seed and epoch."""
        return self._tables(stage, CURVES)

    def merges(self, arm: str) -> pd.DataFrame:
        """merges.csv of an arm, a row per seed, epoch and selected layer; there is one where any arm merges."""
        return self._tables(arm, MERGES)

    def _tables(self, stage: str, file: str) -> pd.DataFrame:
        tables = {seed: pd.read_csv(self.stage(seed, stage) / file) for seed in self.seeds}
        return pd.concat(tables, names=["seed"]).reset_index("seed")

    @cached_property
    def predictions(self) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
        """Per arm the labels and probabilities on test of each seed, in their order; see read_predictions."""
        return {
            arm: [read_predictions(self.stage(seed, arm) / predictions_file("test")) for seed in self.seeds]
            for arm in self.arms
        }
