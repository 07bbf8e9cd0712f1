"""The stages of a trial: what each does, and where."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..options import BASELINE, Options
from ..runs.layout import BACKBONE, WEIGHTS, stage_folder
from .arms import ARMS, Arm
from .optim import last_rate


@dataclass(frozen=True)
class Stage:
    """What a stage does, and where.

    Attributes:
        kind: keys the random numbers; it is "arm" for every arm, so that all of them see the same.
        arm: how it trains; the backbone does so as the baseline does.
        folder: where the stage keeps its files.
        fold: of cross-validation, which fold it tests.
        start: the weights it starts from; None: a new model, pretrained if the options say so.
    """

    kind: Literal["backbone", "arm"]
    arm: Arm
    seed: int
    epochs: int
    lr: float
    folder: Path
    fold: int | None = None
    start: Path | None = None

    @property
    def title(self) -> str:
        fold = "" if self.fold is None else f"fold {self.fold} "
        return f"seed {self.seed} {fold}{self.folder.name}"

    @property
    def keeps_best(self) -> bool:
        """An arm keeps its best epoch on validation; the backbone hands its last one on."""
        return self.kind == "arm"


def backbone_stage(options: Options, run: Path, seed: int, fold: int | None = None) -> Stage:
    folder = stage_folder(run, seed, BACKBONE, fold)
    return Stage("backbone", ARMS[BASELINE], seed, options.epochs, options.lr, folder, fold)


def arm_stage(options: Options, run: Path, seed: int, arm: str, fold: int | None = None) -> Stage:
    lr = last_rate(options) if options.inmerge_lr is None else options.inmerge_lr
    start = stage_folder(run, seed, BACKBONE, fold) / WEIGHTS
    folder = stage_folder(run, seed, arm, fold)
    return Stage("arm", ARMS[arm], seed, options.inmerge_epochs, lr, folder, fold, start)
