"""A zoo on a real Ray of two nodes, with processes killed and a node taken away: as one process alone, to the bit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import model_zoo
import pytest
import torch
from finetune import grid
from finetune.options import Options
from small_runs import content_of, run_recipe

RECIPES = Path(model_zoo.__file__).parent
GRID = ["--models", "test_resnet", "test_byobnet", "--datasets", "breastmnist", "pneumoniamnist", "--seeds", "0", "1"]
GRID += ["--no-pretrained", "--image-size", "32", "--epochs", "4", "--inmerge-epochs", "4", "--allow-modified"]
LIMIT = 1800

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning")]


def training_processes(zoo: Path) -> dict[int, Path]:
    """The processes of Ray that train, by the folder of their stage, in which an epoch is done and no result stands."""
    found = {}
    listed = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        task = re.match(r"\s*(\d+) ray::(\S+) \((\d+), '([\w-]+)'\)", line)
        if task:
            pid, cell, seed, stage = task.groups()
            folder = zoo / cell / f"seed_{seed}" / stage
            if (folder / "metrics.csv").exists() and not (folder / "result.json").exists():
                found[int(pid)] = folder
    return found


def wait_for_training(zoo: Path, run: subprocess.Popen) -> tuple[int, Path]:
    for _ in range(10 * LIMIT):
        assert run.poll() is None
        if found := training_processes(zoo):
            return next(iter(found.items()))
        time.sleep(0.1)
    raise AssertionError("nothing was trained")


def test_a_task_that_asks_for_no_gpu_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all tasks of a machine would share its first one."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install .[cluster]")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with grid._connected(Options(engine="ray")) as ray:
        seen = ray.remote(num_gpus=0)(lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))
        assert ray.get(seen.remote()) == ""


def test_killed_tasks_and_a_lost_node_change_no_bit(made_medmnist: Callable[..., Path], tmp_path: Path) -> None:
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed: pip install .[cluster]")
    torch.set_num_threads(1)
    for name in ("breastmnist", "pneumoniamnist"):
        data = made_medmnist(name, colour=False, classes=2, cases=400)
    arguments = [*GRID, "--data-dir", str(data)]
    run_recipe(*arguments, "--output", tmp_path / "alone", recipe=model_zoo.main, report=True)

    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    zoo = tmp_path / "zoo"
    command = [sys.executable, RECIPES / "model_zoo.py", *arguments, "--output", zoo]
    command += ["--engine", "ray", "--ray-address", cluster.address]
    environment = {**os.environ, "PYTHONPATH": str(RECIPES.parent), "OMP_NUM_THREADS": "1"}
    killed = []
    try:
        with (tmp_path / "log").open("w") as log:
            run = subprocess.Popen([*map(str, command)], env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(2):
                pid, folder = wait_for_training(zoo, run)
                os.kill(pid, signal.SIGKILL)
                killed.append(folder)
                time.sleep(2)
            wait_for_training(zoo, run)
            cluster.remove_node(second)
            assert run.wait(LIMIT) == 0, (tmp_path / "log").read_text()
        finally:
            run.kill()
            run.wait()
    finally:
        cluster.shutdown()

    log = (tmp_path / "log").read_text()
    done = Counter(re.findall(r"^(\S+: seed \d \S+) done$", log, re.MULTILINE))
    assert len(done) == 2 * 2 * 2 * 3
    assert set(done.values()) == {1}
    for cell in sorted(path.parent for path in (tmp_path / "alone").glob("*/config.yaml")):
        expected, found = content_of(cell), content_of(zoo / cell.name)
        assert expected.keys() == found.keys()
        assert [name for name in expected if expected[name] != found[name]] == []
        versions = json.loads((zoo / cell.name / "versions.json").read_text())
        assert versions["launch"]["threads"] == 1
    assert len(killed) == 2
    assert not list(zoo.rglob("inmerge.lock"))
