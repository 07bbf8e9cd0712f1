"""The schedules of the learning rate."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from finetune.options import Options
from finetune.training.optim import create_optimizer, create_schedule, follow_plateau
from finetune.training.plan import arm_stage


@pytest.mark.parametrize("milestones", [(1, 3), (3, 1), (2,)])
def test_the_rate_falls_after_its_milestones(milestones: tuple[int, ...]) -> None:
    """As with torch's MultiStepLR, the first `milestone` epochs are trained at the rate before it."""
    options = Options(sched="multistep", decay_milestones=milestones)
    ours, theirs = (torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1) for _ in range(2))
    schedule = create_schedule(options, ours, "arm", epochs=5)
    expected = torch.optim.lr_scheduler.MultiStepLR(theirs, milestones)
    for epoch in range(5):
        schedule.step(epoch)
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"]), f"epoch {epoch + 1}"
        theirs.step()
        expected.step()


def test_plateau_falls_when_the_loss_has_not_improved_and_begins_with_a_fresh_optimizer() -> None:
    """After the fourth and the fifth epoch the best one is two epochs old or more; the sixth improves on it."""
    losses = [1.0, 0.8, 0.9, 0.9, 0.85, 0.7, 0.75]
    options = Options(sched="plateau", patience_epochs=2)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = create_schedule(options, optimizer, "arm", epochs=8)
    rates, fresh = [], []
    for epoch in range(8):
        optimizer.state["momentum"] = {"of": "the epoch before"}
        schedule.step(epoch)
        follow_plateau(optimizer, losses[:epoch], options.patience_epochs)
        rates.append(optimizer.param_groups[0]["lr"])
        fresh.append(not optimizer.state)
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.01, 0.001, 0.001, 0.001])
    assert fresh == [False, False, False, False, True, True, False, False]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 0.01),
        ({"sched": "multistep", "decay_milestones": (10, 15), "epochs": 20}, 1e-4),
        ({"sched": "multistep", "decay_milestones": (10, 15), "epochs": 20, "inmerge_lr": 0.003}, 0.003),
        ({"sched": "cosine", "epochs": 20}, 0.01 * (1 + math.cos(math.pi * 19 / 20)) / 2),
        ({"sched": "multistep", "decay_milestones": (10,), "epochs": 0}, 0.01),
    ],
)
def test_arms_go_on_at_the_rate_that_the_backbone_ends_with(settings: dict[str, object], expected: float) -> None:
    stage = arm_stage(Options(**settings), Path("run"), 0, "inmerge")
    assert stage.lr == pytest.approx(expected)


@pytest.mark.parametrize(("name", "fused"), [("sgd", True), ("momentum", True), ("adamw", True), ("lamb", None)])
def test_torchs_optimizers_update_by_fused_kernels(name: str, fused: bool | None) -> None:
    optimizer = create_optimizer(Options(opt=name), torch.nn.Linear(2, 2), 0.1)
    assert optimizer.param_groups[0].get("fused") is fused


@pytest.mark.parametrize(("name", "nesterov"), [("sgd", True), ("momentum", False)])
def test_momentum_is_plain_and_sgd_is_nesterovs(name: str, nesterov: bool) -> None:
    assert create_optimizer(Options(opt=name), torch.nn.Linear(2, 2), 0.1).param_groups[0]["nesterov"] is nesterov
