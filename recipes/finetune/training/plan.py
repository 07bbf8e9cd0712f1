"""The stages of a trial: what each does, and where."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..files import read_json
from ..options import BASELINE, Options
from ..runs.layout import BACKBONE, CURVES, LAST_WEIGHTS, RESULT, WEIGHTS, stage_folder
from .arms import COMPACT, Arm, arm_of, needed_stage
from .optim import last_rate


@dataclass(frozen=True)
class Stage:
    """What a stage does, and where.

    Attributes:
        kind: keys the random numbers; it is "arm" for every arm, so that all of them see the same.
        arm: how it trains; the backbone does so as the baseline does.
        folder: where the stage keeps its files.
        keeps_best: whether it keeps its best epoch on validation, as arms do; else it hands its last one on.
        fold: of cross-validation, which fold it tests.
        start: the weights it starts from; None: a new model, pretrained if the options say so.
        size_of: the folder of the stage to whose size its model is made smaller, if it is and the arm doesn't say.
    """

    kind: Literal["backbone", "arm"]
    arm: Arm
    seed: int
    epochs: int
    lr: float
    folder: Path
    keeps_best: bool
    fold: int | None = None
    start: Path | None = None
    size_of: Path | None = None

    @property
    def needs(self) -> list[Path]:
        """The folders of the stages that it can't do without."""
        return [folder for folder in (self.start and self.start.parent, self.size_of) if folder]

    @property
    def title(self) -> str:
        fold = "" if self.fold is None else f"fold {self.fold} "
        return f"seed {self.seed} {fold}{self.folder.name}"


def backbone_stage(options: Options, run: Path, seed: int, fold: int | None = None) -> Stage:
    folder, keeps_best = stage_folder(run, seed, BACKBONE, fold), options.start_from == "kept"
    return Stage("backbone", arm_of(BASELINE), seed, options.epochs, options.lr, folder, keeps_best, fold)


def arm_stage(options: Options, run: Path, seed: int, arm: str, fold: int | None = None) -> Stage:
    """The stage of an arm, once its backbone is done."""
    backbone, folder = (stage_folder(run, seed, name, fold) for name in (BACKBONE, arm))
    if options.inmerge_lr is not None:
        lr = options.inmerge_lr
    elif options.start_from == "kept" or options.sched == "plateau":
        lr = _rate_of_start(options, backbone)
    else:
        lr = last_rate(options)
    found, needed = arm_of(arm), stage_folder(run, seed, needed_stage(arm), fold)
    if found.smaller and found.smaller.way == COMPACT:  # trained already: what its arm has merged longest
        return Stage("arm", found, seed, 0, lr, folder, True, fold, needed / LAST_WEIGHTS)
    size_of = needed if found.smaller else None
    return Stage("arm", found, seed, options.inmerge_epochs, lr, folder, True, fold, backbone / WEIGHTS, size_of)


def _rate_of_start(options: Options, backbone: Path) -> float:
    """The learning rate of the epoch of the backbone whose weights it handed on; --lr where there is no such epoch."""
    with (backbone / CURVES).open(newline="", encoding="utf-8") as file:
        rates = {int(row["epoch"]): float(row["lr"]) for row in csv.DictReader(file)}
    return rates.get(read_json(backbone / RESULT).get("epoch"), options.lr)
