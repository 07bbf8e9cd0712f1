"""Score the kept weights of a finished run on corrupted test images; nothing is trained.

Of each arm and seed one model at a time is scored, under every corruption. Its logits are kept as it goes, so that a
stopped call goes on by the same command, and a run that gained seeds is scored on these alone.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .data import tasks
from .data.corrupted import Block, blocks, corrupted
from .data.corruptions import CORRUPTIONS, NOT_MADE, SEVERITIES, SMALLEST_SIDE, Suite, suite_for
from .data.images import ImageData, Split
from .errors import InputError, near_names
from .files import write_csv, write_json
from .judging.robustness import FIGURES, Cell, Clean, figures_of, summarise_robustness
from .judging.summary import difference_of
from .options import BASELINE, Options
from .runs.finished import FinishedRun
from .runs.kept_logits import logits_file, read_logits, write_logits
from .runs.layout import CONFIG, FIGURES_TABLE, FOLDS, ROBUSTNESS, SUMMARY, WEIGHTS
from .sources.reopened import reopened
from .training.attacks import ATTACKS, attack
from .training.batches import crop
from .training.inference import KeptModel, load_kept_model

CLEAN = "clean"
SCHEMA = 2
_LARGEST_DEVIATION = 0.01  # of probabilities on clean images, mean over cases, from those that the run recorded


@dataclass(frozen=True)
class Wanted:
    """What a run is to be scored on.

    Attributes:
        corruptions: their names; none: all that fit the data.
        attack_levels: how many of 255 grey levels an attack may change a pixel by; none: no attacks.
        elsewhere: options of the run that say where its files lie, where they have moved.
        keep_in: the folder of all corrupted images; None: they are made anew for each model.
    """

    corruptions: tuple[str, ...] = ()
    attack_levels: tuple[float, ...] = ()
    elsewhere: dict[str, Path | None] | None = None
    keep_in: Path | None = None


def check_wanted(wanted: Wanted) -> None:
    """Refuse what can be known to be wrong without any data."""
    for name in wanted.corruptions:
        if name in NOT_MADE:
            raise InputError(f"--corruptions {name} is not made here: {NOT_MADE[name]}; leave it out")
        if name not in CORRUPTIONS:
            hint = near_names(name, CORRUPTIONS) or f": choose from {', '.join(CORRUPTIONS)}"
            raise InputError(f"--corruptions names the unknown corruption {name!r}{hint}")
    for name, values in (("corruptions", wanted.corruptions), ("attack-levels", wanted.attack_levels)):
        if len(set(values)) < len(values):
            raise InputError(f"--{name} {' '.join(map(str, values))} names one twice")
    for levels in wanted.attack_levels:
        if not 0 < levels <= 255:
            raise InputError(f"--attack-levels {levels:g} must be above 0 and at most 255, the grey levels of a pixel")


def check_weights(run: FinishedRun) -> None:
    """Refuse a run that has lost the weights of a stage."""
    if not run.arms:
        raise InputError(f"all arms of the run in {run.folder} diverged in all seeds: there is nothing to score")
    for seed, arm in _stages(run):
        for path in run.weights(seed, arm):
            if not path.is_file():
                raise InputError(f"{path} is not there, by which the run would be scored: put it back, or train anew")


def _stages(run: FinishedRun) -> list[tuple[int, str]]:
    """Seeds and arms, without those that diverged."""
    return [(seed, arm) for seed in run.seeds for arm in run.arms if seed in run.finished_seeds(arm)]


def open_data(run: FinishedRun, wanted: Wanted) -> tuple[Options, ImageData]:
    """The data that the run was trained on, as they are now; others are refused."""
    options, data = reopened(run.folder / CONFIG, run.options, wanted.elsewhere or {})
    begun = run.versions["data"]
    if data.files != begun:
        raise InputError(
            f"{run.folder} was trained on the files {begun}, not {data.files} (by checksum): say where its own data lie"
        )
    test = run.predictions[run.arms[0]][0]
    if data.test.cases != test.cases or not np.array_equal(data.test.labels, test.labels):
        raise InputError(
            f"{run.folder} was tested on {len(test.cases)} cases that are not the {len(data.test)} found now: say "
            "where its own data lie"
        )
    return options, data


@dataclass(frozen=True)
class RunScorer:
    """Scores the models of a run."""

    run: FinishedRun
    options: Options
    data: ImageData
    wanted: Wanted

    @cached_property
    def suite(self) -> Suite:
        """What is wanted of the corruptions that fit the data."""
        fitting = suite_for(self.data.suite, self.data.channels)
        if self.data.size < SMALLEST_SIDE:
            raise InputError(
                f"{self.run.folder} has images of {self.data.size} pixels, and blurs need {SMALLEST_SIDE}: train on "
                "larger ones"
            )
        if not self.wanted.corruptions:
            return fitting
        for name in self.wanted.corruptions:
            if name not in fitting.severities:
                known = ", ".join(fitting.severities)
                raise InputError(f"--corruptions {name} is none that fits {self.data.name}: choose from {known}")
        return Suite({name: fitting.severities[name] for name in self.wanted.corruptions}, fitting.left_out)

    @cached_property
    def folder(self) -> Path | None:
        """Where corrupted images of these data are kept."""
        root = self.wanted.keep_in
        return root and root / f"{self.data.name}-{self.data.size}px-corrupted"

    @property
    def tests(self) -> list[Split]:
        """What is tested, each by a model of its own: the test split, or that of each fold."""
        return [part.test for part in self.data.folds or [self.data]]

    @cached_property
    def clean_digest(self) -> str:
        digests = [block.digest for test in self.tests for block in self.clean_blocks(test)]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def clean_blocks(self, test: Split) -> Iterator[Block]:
        """The images as the model sees them."""
        for rows in blocks(len(test)):
            images = crop(torch.from_numpy(test.images[list(rows)]), self.data.size).numpy()
            yield Block(rows.start, images, test.cases[rows.start : rows.stop])

    def changes(self) -> dict[str, tuple[Any, ...]]:
        """What is done to the images, by name, with the parameters of its severities."""
        levels = self.wanted.attack_levels
        return {CLEAN: (None,), **self.suite.severities, **(dict.fromkeys(ATTACKS, levels) if levels else {})}

    def score(self) -> None:
        """Make the logits that are not there yet."""
        changes = self.changes()
        stages = _stages(self.run)
        with tqdm(total=len(stages) * len(changes), unit=" changes", disable=None) as bar:
            for seed, arm in stages:
                kept: list[KeptModel] = []
                for name, parameters in changes.items():
                    bar.set_description(f"seed {seed} {arm} {name}")
                    if self._found(seed, arm, name) is None:
                        kept = kept or self._kept_models(seed, arm)
                        logits = torch.stack([self._logits(kept, name, parameter) for parameter in parameters])
                        write_logits(
                            logits_file(self.run.folder, seed, arm, name), logits, self._made_from(seed, arm, name)
                        )
                    if name == CLEAN:
                        self._check_clean(seed, arm)
                    bar.update()

    def by_severity(self, name: str) -> Iterator[dict[str, list[np.ndarray | None]]]:
        """For each severity of a change, per arm and seed what is predicted, (N, outputs); None where it diverged."""
        kept = {(seed, arm): self._found(seed, arm, name) for seed, arm in _stages(self.run)}
        for place in range(len(self.changes()[name])):
            found = {stage: tasks.probabilities(self.data.task, logits[place]) for stage, logits in kept.items()}
            yield {arm: [found.get((seed, arm)) for seed in self.run.seeds] for arm in self.run.arms}

    def cells(self) -> Iterator[Cell]:
        for name in self.suite.severities:
            for severity, probabilities in zip(SEVERITIES, self.by_severity(name), strict=True):
                yield name, severity, probabilities

    def _kept_models(self, seed: int, arm: str) -> list[KeptModel]:
        versions = self.run.versions
        paths = self.run.weights(seed, arm)
        return [
            load_kept_model(self.options, self.data, path, versions["launch"], versions.get("model")) for path in paths
        ]

    def _made_from(self, seed: int, arm: str, name: str) -> str:
        weights = self.run.results[seed][arm]["files"][FOLDS if self.run.folds else WEIGHTS]
        return hashlib.sha256(f"{weights} {self.clean_digest} {name} {self.changes()[name]}".encode()).hexdigest()

    def _found(self, seed: int, arm: str, name: str) -> torch.Tensor | None:
        return read_logits(logits_file(self.run.folder, seed, arm, name), self._made_from(seed, arm, name))

    def _logits(self, models: Sequence[KeptModel], name: str, parameter: Any) -> torch.Tensor:
        """Of all test images after a change, (N, outputs)."""
        parts = []
        for kept, test in zip(models, self.tests, strict=True):
            for block in self.clean_blocks(test):
                if name == CLEAN:
                    images = block.images
                elif name in ATTACKS:
                    labels = test.labels[block.start : block.start + len(block.images)]
                    images = attack(kept, self.data.task, name, parameter, block.images, labels, block.cases)
                else:
                    images = corrupted(block, name, parameter, self.folder)
                parts.append(kept.logits(images))
        return torch.cat(parts)

    def _check_clean(self, seed: int, arm: str) -> None:
        """Refuse weights that don't predict what the run says that they do."""
        place = self.run.finished_seeds(arm).index(seed)
        recorded = self.run.predictions[arm][place].probabilities
        found = tasks.probabilities(self.data.task, self._found(seed, arm, CLEAN)[0])
        if not np.abs(found - recorded).mean() <= _LARGEST_DEVIATION:
            raise InputError(
                f"the weights of seed {seed} {arm} in {self.run.folder} don't predict what the run recorded of its "
                "test images: install the versions of versions.json, or train the run again"
            )


def summarise_run(scorer: RunScorer) -> dict[str, Any]:
    """Judge what was scored, and write robustness/summary.json and figures.csv."""
    run, data, suite = scorer.run, scorer.data, scorer.suite
    rule = run.rule
    clean = Clean(
        predictions=run.each_seed(run.predictions),
        chosen=run.each_seed(run.chosen),
        metric=rule.metric,
        margin=rule.margin,
        compared=[arm for arm in run.asked_arms if arm != BASELINE],
        differences={arm: difference_of(run.summary["differences"][arm][rule.metric]) for arm in run.other_arms},
        identical={arm for arm, other in run.identical if other == BASELINE},
        diverged={arm: len(seeds) for arm, seeds in run.diverged.items()},
    )
    summary = {
        "schema": SCHEMA,
        "data": data.name,
        "suite": data.suite,
        "size": data.size,
        "seeds": run.seeds,
        "arms": run.arms,
        "severities": {name: [str(value) for value in values] for name, values in suite.severities.items()},
        "chosen": bool(scorer.wanted.corruptions),
        "left_out": suite.left_out,
        **summarise_robustness(run.task, data.suite, clean, scorer.cells()),
        "attacks": _attacks(scorer, clean),
    }
    _write_table(run, summary)
    write_json(run.folder / ROBUSTNESS / SUMMARY, summary)
    return summary


def _attacks(scorer: RunScorer, clean: Clean) -> dict[str, Any]:
    """Per kind of attack, grey levels and arm the figures of each seed."""
    labels = scorer.data.test.labels
    return {
        kind: {
            f"{levels:g}": {
                arm: [figures_of(scorer.run.task, labels, *pair) for pair in zip(seeds, clean.chosen[arm], strict=True)]
                for arm, seeds in probabilities.items()
            }
            for levels, probabilities in zip(scorer.wanted.attack_levels, scorer.by_severity(kind), strict=True)
        }
        for kind in (ATTACKS if scorer.wanted.attack_levels else ())
    }


def _write_table(run: FinishedRun, summary: dict[str, Any]) -> None:
    """A row per corruption, severity, arm and seed; severity 0 is the clean image."""
    cells: list[tuple[str, str, Any]] = [("none", "0", summary["clean"])]
    for name, severities in summary["by_severity"].items():
        cells += [(name, severity, figures) for severity, figures in severities.items()]
    rows: list[Sequence[Any]] = [
        [name, severity, arm, seed, *(figures[arm][figure]["values"][place] for figure in FIGURES)]
        for name, severity, figures in cells
        for arm in summary["arms"]
        for place, seed in enumerate(summary["seeds"])
    ]
    write_csv(run.folder / ROBUSTNESS / FIGURES_TABLE, ["corruption", "severity", "arm", "seed", *FIGURES], rows)
