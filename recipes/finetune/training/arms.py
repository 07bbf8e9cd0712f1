"""What is compared. An arm is added here, and nowhere else."""

from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from inmerge_optim import InMergeOptimizer

from ..errors import InputError, near_names
from ..options import BASELINE, Options
from .averages import Average


@dataclass(frozen=True)
class Arm:
    """One way to spend the E2 epochs after the backbone stage.

    Attributes:
        criterion: which pairs are merged after each step; None: nothing is merged.
        average: the average of weights over training that is evaluated and kept; None: the weights as trained.
    """

    criterion: str | None = None
    average: Average | None = None


ARMS = {
    BASELINE: Arm(),
    "inmerge": Arm(criterion="similar"),
    "random-pairs": Arm(criterion="any"),
    "dissimilar": Arm(criterion="dissimilar"),
    "ema": Arm(average="ema"),
    "swa": Arm(average="swa"),
}


def check_arms(options: Options) -> None:
    """Refuse unknown and repeated arms, a comparison that has no baseline, and options that none of the arms needs."""
    names = options.arms
    for name in names:
        if name not in ARMS:
            hint = near_names(name, ARMS) or f": choose from {', '.join(ARMS)}"
            raise InputError(f"--arms names the unknown arm {name!r}{hint}")
    if len(set(names)) < len(names):
        raise InputError(f"--arms {' '.join(names)} names an arm twice")
    if BASELINE not in names:
        raise InputError(f"--arms must hold {BASELINE}, which the others are compared with")
    if options.cooldown_epochs and not any(ARMS[name].criterion for name in names):
        raise InputError(
            f"--cooldown-epochs has no effect on --arms {' '.join(names)}, which don't merge: leave it out"
        )


def wrap_optimizer(arm: Arm, optimizer: Optimizer, model: nn.Module, options: Options, seed: int) -> Optimizer:
    """The optimizer that an arm trains with; a merging one is wrapped before accelerate prepares it."""
    if arm.criterion is None:
        return optimizer
    try:
        return InMergeOptimizer(
            optimizer,
            model,
            skip_layers=options.skip_layers,
            merge_prob=options.merge_prob,
            merge_weight=options.merge_weight,
            similarity_threshold=options.similarity_threshold,
            criterion=arm.criterion,
            seed=seed,
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"{options.model} can't be merged with these options: {error}") from error
