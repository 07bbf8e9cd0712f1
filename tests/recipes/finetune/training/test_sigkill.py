"""A run that SIGKILL ends again and again, ends with the files of one that was never killed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import QUICK, assert_same

RECIPES = Path(__file__).parents[4] / "recipes"
KILLED = Path(__file__).with_name("killed_recipe.py")
SETTINGS = ["--dataset", "digits", *QUICK, "--seeds", "0", "1", "--batch-size", "200", "--similarity-threshold", "-0.5"]
CURVES = ("metrics.csv", "timing.json")  # written after each epoch
# Where the clock starts: a function of finetune, and which of its calls.
MOMENTS = {
    "in a step of the next epoch": ("training.stage", "train_epoch", 2),
    "in a checkpoint's write": ("training.checkpoints", "write_json", 2),
    "in an evaluation": ("training.evaluation", "predict", 1),
    "at the end of a stage": ("training.stage", "write_result", 1),
    "between two stages": ("training.stage", "write_result", 2),
}
TWO_MOMENTS = ["in a checkpoint's write", "in an evaluation"]
COMPACT = ["--compact", "--final-rounds", "50"]
# Of a run that makes smaller models as well, with merge_channels on in its merging arm.
SMALLER_MOMENTS = {
    "in an epoch that merges channels": ("training.stage", "train_epoch", 6),
    "while channels are taken out": ("training.smaller", "compact", 1),
    "while the smaller model is exported": ("training.leaving", "_write_program", 1),
    "at the end of its stage": ("training.leaving", "_latencies", 1),
}


def launch(processes: int, script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{RECIPES}{os.pathsep}{RECIPES.parent}"}
    return subprocess.run(
        [*command, str(script), *map(str, arguments)], env=environment, timeout=600, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("processes", "workers", "moments", "options"),
    [
        pytest.param(1, 0, TWO_MOMENTS, [], id="two moments"),
        pytest.param(1, 0, [*MOMENTS] * 2, [], id="ten moments", marks=pytest.mark.slow),
        pytest.param(2, 2, [*MOMENTS] * 2, [], id="ten moments, two with loader workers", marks=pytest.mark.slow),
        pytest.param(1, 0, [*SMALLER_MOMENTS], COMPACT, id="smaller models", marks=pytest.mark.slow),
        pytest.param(2, 0, [*SMALLER_MOMENTS], COMPACT, id="smaller models, two processes", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_random_moments_ends_as_one_that_was_never_killed(
    processes: int,
    workers: int,
    moments: list[str],
    options: list[str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    if options:
        pytest.importorskip("torch_pruning", reason="torch-pruning is not installed (extra compact)")
    arguments, run = [*SETTINGS, *options, "--workers", workers, "--output"], tmp_path / "killed"
    whole = launch(processes, RECIPES / "medmnist2d.py", *arguments, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    chance, log = random.Random(0), [f"{processes} process(es), {workers} loader workers"]
    for moment in moments:
        module, function, call = (MOMENTS | SMALLER_MOMENTS)[moment]
        seconds = round(chance.uniform(0, 0.1), 3)
        killed = launch(processes, KILLED, "medmnist2d", module, function, call, seconds, *arguments, run, "--resume")
        assert killed.returncode != 0, f"the run ended before it could be killed {moment}"
        assert not killed.stderr.startswith("error:"), killed.stderr
        left = sorted(str(path.relative_to(run)) for path in run.glob("seed_*/*/*") if path.name not in CURVES)
        log.append(f"kill {len(log):2}: {seconds:.3f} s after the call of {function}, {moment}; left {left[-1:]}")
    record_property("kills", "\n".join(log))
    resumed = launch(processes, RECIPES / "medmnist2d.py", *arguments, run, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_same(run, tmp_path / "whole")
