"""What is compared. An arm is added to ARMS, and nowhere else."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from inmerge_optim import InMergeOptimizer

from ..errors import InputError, check_names
from ..options import BASELINE, Options
from .averages import Average

SETTINGS = ("skip_layers", "merge_prob", "merge_weight", "similarity_threshold")


@dataclass(frozen=True)
class Arm:
    """One way to spend the E2 epochs after the backbone stage.

    Attributes:
        criterion: which pairs are merged after each step; None: nothing is merged.
        average: the average of weights over training that is evaluated and kept; None: the weights as trained.
        settings: of SETTINGS those that the arm has for its own, in place of the options'; so a sweep is one trial.
    """

    criterion: str | None = None
    average: Average | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.settings) - set(SETTINGS))
        if unknown:
            raise ValueError(f"an arm can't set {unknown[0]} for itself: expected any of {', '.join(SETTINGS)}")
        if self.settings and self.criterion is None:
            raise ValueError(f"an arm that merges nothing has no use for {', '.join(self.settings)}: leave it out")


ARMS = {
    BASELINE: Arm(),
    "inmerge": Arm(criterion="similar"),
    "random-pairs": Arm(criterion="random_pairs"),
    "dissimilar": Arm(criterion="dissimilar"),
    "ema": Arm(average="ema"),
    "swa": Arm(average="swa"),
}


def check_arms(options: Options) -> None:
    """Refuse unknown and repeated arms, a comparison that has no baseline, and options that none of the arms needs."""
    names = options.arms
    check_names("--arms", "arm", names, ARMS)
    if BASELINE not in names:
        raise InputError(f"--arms must hold {BASELINE}, which the others are compared with")
    if options.cooldown_epochs and not merging_arms(options):
        raise InputError(
            f"--cooldown-epochs has no effect on --arms {' '.join(names)}, which don't merge: leave it out"
        )


def merging_arms(options: Options) -> list[Arm]:
    """Those of the trial's arms that merge."""
    return [ARMS[name] for name in options.arms if ARMS[name].criterion]


def merge_settings(arm: Arm, options: Options) -> dict[str, Any]:
    """What an arm merges with: the options, but for the settings of its own."""
    return {name: getattr(options, name) for name in SETTINGS} | dict(arm.settings)


def wrap_optimizer(arm: Arm, optimizer: Optimizer, model: nn.Module, options: Options, seed: int) -> Optimizer:
    """The optimizer that an arm trains with; a merging one is wrapped before accelerate prepares it."""
    if arm.criterion is None:
        return optimizer
    settings = merge_settings(arm, options)
    try:
        return InMergeOptimizer(optimizer, model, **settings, criterion=arm.criterion, seed=seed)
    except (ValueError, TypeError) as error:
        raise InputError(f"{options.model} can't be merged with these options: {error}") from error
