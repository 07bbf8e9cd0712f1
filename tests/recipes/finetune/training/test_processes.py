"""The recipe in two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from finetune.runs.results import read_predictions
from small_runs import run_recipe

RECIPE = Path(__file__).parents[4] / "recipes" / "medmnist2d.py"
COMMON = ["--dataset", "digits", "--image-size", "16", "--model", "test_resnet", "--no-pretrained"]
COMMON += ["--batch-size", "400"]


def run_two_processes(*arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(RECIPE)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *COMMON, *map(str, arguments)], env=environment, check=check, capture_output=True, text=True
    )


def test_two_processes_score_as_one(tmp_path: Path) -> None:
    """The same weights: the same cases, in order, none twice, and the same figures."""
    arguments = ["--epochs", "0", "--inmerge-epochs", "0"]
    run_two_processes(*arguments, "--output", tmp_path / "two")
    run_recipe(*COMMON, *arguments, "--output", tmp_path / "one")
    one, two = (read_predictions(tmp_path / name / "seed_0/inmerge", "test") for name in ("one", "two"))
    np.testing.assert_array_equal(one.labels, two.labels)
    np.testing.assert_allclose(one.probabilities, two.probabilities, atol=1e-6)
    figures = [json.loads((tmp_path / name / "summary.json").read_text())["arms"]["inmerge"] for name in ("one", "two")]
    for metric in figures[0]:
        assert figures[0][metric]["mean"] == pytest.approx(figures[1][metric]["mean"], abs=1e-6)


def test_two_processes_train_and_the_main_one_speaks(tmp_path: Path) -> None:
    """Arms that must not differ are equal to the bit in two processes as well, and every line is printed once.

    Those are an arm without merges, and an average over a single epoch; a moving average over its steps differs.
    """
    run = tmp_path / "run"
    arms = ("baseline", "inmerge", "swa", "ema")
    short = ["--epochs", "1", "--inmerge-epochs", "1", "--merge-prob", "0", "--recalibrate-bn", "--arms", *arms]
    done = run_two_processes(*short, "--output", run)
    weights = [(run / "seed_0" / arm / "model.safetensors").read_bytes() for arm in arms]
    assert weights[0] == weights[1] == weights[2]
    assert weights[0] != weights[3]
    assert done.stdout.count("seed 0 backbone epoch 1/1") == 1
    refused = run_two_processes("--output", run, "--batch-size", "401", check=False)
    assert refused.returncode == 1
    assert refused.stderr.count("choose a multiple of 2") == 1


@pytest.mark.slow
def test_two_processes_break_alike(tmp_path: Path) -> None:
    """A learning rate that really breaks the arms: one word for each, and no process waits for another."""
    arguments = ["--epochs", "1", "--inmerge-epochs", "1", "--inmerge-lr", "1e30", "--output", tmp_path / "run"]
    done = run_two_processes(*arguments)
    for arm in ("baseline", "inmerge"):
        assert done.stdout.count(f"seed 0 {arm} diverged: ") == 1
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["diverged"] == {"baseline": {"0": 1}, "inmerge": {"0": 1}}
    assert summary["verdicts"][0]["outcome"] == "diverged"
    assert "inmerge diverged in 1 of 1 seeds" in (tmp_path / "run/report.md").read_text()
