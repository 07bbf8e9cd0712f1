"""Which epoch of an arm is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_runs import QUICK, run_digits, run_recipe


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


def test_the_lowest_loss_is_kept_and_started_from_where_that_is_asked_for(tmp_path: Path) -> None:
    """The backbone keeps its best epoch as well, and the arms go on from it at the rate that it had."""
    arguments = ["--epochs", 3, "--inmerge-epochs", 2, "--lr", 0.5, "--limit-train", 200, "--batch-size", 50]
    arguments += ["--sched", "multistep", "--decay-milestones", 1, "--start-from", "kept", "--keep-by", "loss"]
    run = run_digits(tmp_path / "run", *arguments, "--arms", "baseline")
    curves, results = {}, {}
    for stage in ("backbone", "baseline"):
        curves[stage] = np.genfromtxt(run / f"seed_0/{stage}/metrics.csv", delimiter=",", names=True)
        results[stage] = json.loads((run / f"seed_0/{stage}/result.json").read_text())
        assert results[stage]["epoch"] == 1 + curves[stage]["val_log_loss"].argmin()
        kept = results[stage]["kept"]["val"]["log_loss"]
        assert kept == pytest.approx(curves[stage]["val_log_loss"].min())
    rates = curves["backbone"]["lr"]
    assert list(rates) == [0.5, 0.05, 0.05]
    assert curves["baseline"]["lr"][0] == rates[results["backbone"]["epoch"] - 1]
