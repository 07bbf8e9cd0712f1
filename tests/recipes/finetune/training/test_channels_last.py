"""Channels last in memory: faster on many devices, and otherwise the same trial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import finetune.training.stage
import pytest
import torch
from accelerate import Accelerator
from small_runs import assert_same, run_digits
from torch import nn

SETTINGS = ["--batch-size", "400", "--epochs", "0", "--channels-last", "--similarity-threshold", "-0.5"]


def test_weights_and_images_have_their_channels_last_and_a_stopped_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, seen = finetune.training.stage.train_epoch, []

    def until(accelerator: Accelerator, model: nn.Module, *args: Any) -> float:
        if len(seen) == 3:
            raise KeyboardInterrupt
        loader, as_input = args[1:3]
        tensors = [as_input(next(iter(loader))), *model.parameters()]
        seen.append(all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors if t.ndim == 4))
        return real(accelerator, model, *args)

    whole = run_digits(tmp_path / "whole", *SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(finetune.training.stage, "train_epoch", until)
        with pytest.raises(KeyboardInterrupt):
            run_digits(tmp_path / "run", *SETTINGS)
    assert seen == [True] * 3
    run_digits(tmp_path / "run", *SETTINGS, "--resume")
    assert_same(tmp_path / "run", whole)
