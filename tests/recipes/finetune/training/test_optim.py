"""The schedules of the learning rate."""

from __future__ import annotations

import pytest
import torch
from finetune.options import Options
from finetune.training.optim import create_schedule


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
