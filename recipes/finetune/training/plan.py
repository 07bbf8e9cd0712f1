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
        start: the weights it starts from; None: a new model, pretrained if the options say so.
    """

    kind: Literal["backbone", "arm"]
    arm: Arm
    seed: int
    epochs: int
    lr: float
    folder: Path
    start: Path | None = None

    @property
    def title(self) -> str:
        return f"seed {self.seed} {self.folder.name}"

    @property
    def keeps_best(self) -> bool:
        """An arm keeps its best epoch on validation; the backbone hands its last one on."""
        return self.kind == "arm"


def backbone_stage(options: Options, run: Path, seed: int) -> Stage:
    return Stage("backbone", ARMS[BASELINE], seed, options.epochs, options.lr, stage_folder(run, seed, BACKBONE))


def arm_stage(options: Options, run: Path, seed: int, arm: str) -> Stage:
    lr = last_rate(options) if options.inmerge_lr is None else options.inmerge_lr
    start = stage_folder(run, seed, BACKBONE) / WEIGHTS
    return Stage("arm", ARMS[arm], seed, options.inmerge_epochs, lr, stage_folder(run, seed, arm), start)
