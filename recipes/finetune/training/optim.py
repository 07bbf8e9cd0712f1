"""The optimizer and the schedule of a stage, from timm's factories."""

import inspect
from collections.abc import Sequence
from typing import Any

import timm.optim
import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from ..errors import InputError, near_names
from ..options import Options

_PLATEAU_RATE = 0.1  # what the learning rate is multiplied by, as at a milestone


def create_optimizer(options: Options, model: nn.Module, lr: float) -> Optimizer:
    """The timm optimizer of that name on all parameters of the model."""
    known = timm.optim.list_optimizers()
    if options.opt not in known:
        raise InputError(f"--opt {options.opt} is unknown to timm{near_names(options.opt, known)}")
    try:
        optimizer = timm.optim.create_optimizer_v2(
            model,
            options.opt,
            lr=lr,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            **_fused(options.opt),
        )
    except (ImportError, AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"timm can't build --opt {options.opt} here ({error}): choose another one") from error
    if getattr(optimizer, "is_second_order", False):
        raise InputError(
            f"--opt {options.opt} needs second derivatives, which the trial doesn't compute: choose another"
        )
    optimizer._step_supports_amp_scaling = False  # fused ones would handle overflows in a way that merging arms can't
    return optimizer


def _fused(name: str) -> dict[str, Any]:
    """One kernel for all of a parameter's update, where torch has it: several times as fast on the CPU."""
    optimizer = timm.optim.get_optimizer_class(name, bind_defaults=False)
    from_torch = optimizer.__module__.startswith("torch.optim.")
    return {"fused": True} if from_torch and "fused" in inspect.signature(optimizer).parameters else {}


def create_schedule(options: Options, optimizer: Optimizer, stage: str, epochs: int) -> Scheduler:
    """The schedule over the epochs of one stage; the arms start from trained weights and have no warm-up.

    All of these depend on the number of the epoch alone, so that a resumed run needs no state of theirs; plateau is
    constant here, see follow_plateau.
    """
    milestones = options.decay_milestones if options.sched == "multistep" else ()
    schedule, _ = create_scheduler_v2(
        optimizer,
        "cosine" if options.sched == "cosine" else "multistep",  # the oldest timm has no constant one
        num_epochs=max(epochs, 1),
        decay_milestones=[epoch + 1 for epoch in sorted(milestones)],  # timm decays one epoch early
        warmup_epochs=options.warmup_epochs if stage == "backbone" else 0,
    )
    return schedule


def follow_plateau(optimizer: Optimizer, losses: Sequence[float], patience: int) -> None:
    """Set the learning rate of the next epoch by the validation losses so far; where it has just fallen, start afresh.

    A function of the losses alone, so that a resumed run needs no state of it.
    """
    falls = _falls(losses, patience)
    for group in optimizer.param_groups:
        group["lr"] *= _PLATEAU_RATE**falls
    if falls > _falls(losses[:-1], patience):
        optimizer.state.clear()


def _falls(losses: Sequence[float], patience: int) -> int:
    """How often the rate fell: after each epoch with a higher loss than the best, if that is `patience` epochs old."""
    best, best_epoch, falls = float("inf"), 0, 0
    for epoch, loss in enumerate(losses):
        if loss < best:
            best, best_epoch = loss, epoch
        elif loss > best and epoch - best_epoch >= patience:
            falls += 1
    return falls


def last_rate(options: Options) -> float:
    """The learning rate of the backbone's last epoch, which the arms go on at."""
    if not options.epochs:
        return options.lr
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=options.lr)
    create_schedule(options, optimizer, "backbone", options.epochs).step(options.epochs - 1)
    return optimizer.param_groups[0]["lr"]
