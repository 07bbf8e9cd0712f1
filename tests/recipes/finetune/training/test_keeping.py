"""Which epoch of an arm is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_runs import QUICK, run_recipe


def test_a_single_class_on_validation_keeps_by_loss(
    made_medmnist: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made_medmnist("breastmnist", colour=False, classes=2) / "breastmnist.npz"
    with np.load(path) as found:
        arrays = dict(found)
    arrays["val_labels"][:] = 1
    np.savez_compressed(path, **arrays)
    data = ["--dataset", "breastmnist", "--data-dir", path.parent, "--allow-modified", "--batch-size", "32"]
    run = tmp_path / "run"
    run_recipe(*data, *QUICK, "--inmerge-epochs", 5, "--lr", 0.05, "--arms", "baseline", "--output", run, report=True)
    assert "has a single class, which leaves AUROC undefined" in capsys.readouterr().out
    assert "lowest validation log loss" in (run / "report.md").read_text()
    losses = np.genfromtxt(run / "seed_0/baseline/metrics.csv", delimiter=",", names=True)["val_log_loss"]
    kept = json.loads((run / "seed_0/baseline/result.json").read_text())["epoch"]
    assert kept == 1 + losses.argmin()
    assert losses.argmin() != 0
