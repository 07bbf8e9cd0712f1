"""A run that SIGKILL ends again and again, at ten random moments, ends with the files of one that was never killed."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import QUICK, assert_same

MOMENTS = {
    "a checkpoint": r"epoch_\d+/manifest",
    "a half-written checkpoint": r"epoch_\d+\.partial",
    "a stage": "result",
}
RECIPE = Path(__file__).parents[3] / "recipes" / "medmnist2d.py"
KILLS = 10
SETTINGS = ["--dataset", "digits", *QUICK, "--seeds", "0", "1", "--batch-size", "200", "--similarity-threshold", "-0.5"]


def start(run: Path, processes: int, workers: int, *arguments: str) -> subprocess.Popen[bytes]:
    """Start the recipe in a session of its own, so that all of its processes can be killed at once."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(RECIPE), *SETTINGS, "--workers", str(workers), "--output", str(run), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()[-3000:]


def listing(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*")} if run.exists() else set()


def wait_for(process: subprocess.Popen[bytes], run: Path, change: str) -> None:
    """Wait until a file or folder whose name matches appears, or the run ends."""
    before = listing(run)
    while process.poll() is None and not any(re.search(change, name) for name in listing(run) - before):
        time.sleep(0.002)


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 2)], ids=["one process", "two with loader workers"])
def test_a_run_killed_at_ten_random_moments_ends_as_one_that_was_never_killed(
    processes: int, workers: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    finish(start(tmp_path / "whole", processes, workers))
    # While a checkpoint is written, between two stages, and anywhere: in a step, an evaluation, at the start.
    chance, run, moments = random.Random(0), tmp_path / "killed", []
    while len(moments) < KILLS:
        process = start(run, processes, workers, "--resume")
        awaited = ["a checkpoint", "a half-written checkpoint", "a stage"][len(moments) % 3]
        wait_for(process, run, MOMENTS[awaited])
        delay = chance.uniform(0, 0.3) if awaited == "a checkpoint" else 0.0
        time.sleep(delay)
        assert process.poll() is None, "the run ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        left = max(name for name in listing(run) if re.search("|".join(MOMENTS.values()), name))
        moments.append(f"kill {len(moments) + 1:2}: {delay:.3f} s after {awaited}; newest by name: {left}")
    record_property("kills", "\n".join([f"{processes} process(es), {workers} loader workers", *moments]))
    finish(start(run, processes, workers, "--resume"))
    assert_same(run, tmp_path / "whole")
