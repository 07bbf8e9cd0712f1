"""The stages of a trial: what each does, and where."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..files import read_json
from ..options import BASELINE, Options
from ..runs.layout import BACKBONE, CURVES, RESULT, WEIGHTS, stage_folder
from .arms import Arm, arm_of


@dataclass(frozen=True)
class Stage:
    """What a stage does, and where.

    Attributes:
        kind: keys the random numbers; it is "arm" for every arm, so that all of them see the same.
        arm: how it trains; the backbone does so as the baseline does.
        folder: where the stage keeps its files.
        keeps_best: whether it keeps its best epoch on validation, as arms do; else it hands its last one on.
        start: the weights it starts from; None: a new model, pretrained if the options say so.
    """

    kind: Literal["backbone", "arm"]
    arm: Arm
    seed: int
    epochs: int
    lr: float
    folder: Path
    keeps_best: bool
    start: Path | None = None

    @property
    def title(self) -> str:
        return f"seed {self.seed} {self.folder.name}"


def backbone_stage(options: Options, run: Path, seed: int) -> Stage:
    folder, keeps_best = stage_folder(run, seed, BACKBONE), options.start_from == "kept"
    return Stage("backbone", arm_of(BASELINE), seed, options.epochs, options.lr, folder, keeps_best)


def arm_stage(options: Options, run: Path, seed: int, arm: str) -> Stage:
    """The stage of an arm, once its backbone is done."""
    backbone = stage_folder(run, seed, BACKBONE)
    lr = options.lr if options.inmerge_lr is None else options.inmerge_lr
    if options.start_from == "kept" and options.inmerge_lr is None:
        lr = _rate_of_kept_epoch(backbone)
    folder = stage_folder(run, seed, arm)
    return Stage("arm", arm_of(arm), seed, options.inmerge_epochs, lr, folder, True, backbone / WEIGHTS)


def _rate_of_kept_epoch(backbone: Path) -> float:
    """The learning rate that the backbone had reached at the epoch that it kept; 0 if it diverged."""
    with (backbone / CURVES).open(newline="", encoding="utf-8") as file:
        rates = {int(row["epoch"]): float(row["lr"]) for row in csv.DictReader(file)}
    return rates.get(read_json(backbone / RESULT).get("epoch"), 0.0)
