"""Failures under a launcher: survived where all processes tell of the same, and else the end of the launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import model_zoo
import pytest
import torch.distributed as dist
from finetune.training import peers
from finetune.training.peers import failed_alike

RECIPES = Path(model_zoo.__file__).parent
MODELS = ["dla46_c", "test_byobnet", "test_resnet"]
GRID = ["--datasets", "digits", "--models", *MODELS, "--no-pretrained", "--image-size", "16"]
GRID += ["--epochs", "1", "--inmerge-epochs", "1", "--limit-train", "200", "--batch-size", "100"]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The store of a launch of two processes, of which this one is the second."""
    made = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    for name, value in {"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": made.port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    monkeypatch.setattr(peers, "SILENCE", 0.5)
    return made


@pytest.mark.parametrize(("other", "alike"), [("too small", True), ("no memory", False), (None, False)])
def test_a_failure_is_alike_where_the_other_process_tells_of_the_same(
    store: dist.TCPStore, other: str | None, alike: bool
) -> None:
    if other is not None:
        store.set("inmerge_optim/failed/0/a cell/0", other)
    assert failed_alike("a cell", "too small") is alike
    assert store.get("inmerge_optim/failed/0/a cell/1") == b"too small"


def test_a_process_that_waits_for_the_others_word_gives_signs_of_life(
    store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they end the launch, as one is stopped, before it has written down what failed."""
    monkeypatch.setattr(peers, "BEAT", 0.02)
    assert not failed_alike("a cell", "too small")
    assert store.add("inmerge_optim/alive/1", 0) > 0


def test_one_process_alone_can_always_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert failed_alike("a cell", "too small")


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True])
def test_a_cell_that_fails_hangs_no_launch(tmp_path: Path, alone: bool) -> None:
    """dla46_c fails in both processes for want of pixels; the others, if asked to, in the second one as it trains.

    Those that don't fail share the launch: a trial leaves its process group to the next one.
    """
    script = tmp_path / "zoo.py"
    script.write_text(
        "import os, sys\n"
        "import finetune.training.stage as stage\n"
        "import model_zoo\n"
        "def fail(*_, **__):\n"
        "    raise MemoryError('no memory here')\n"
        f"if {alone} and os.environ['RANK'] == '1':\n"
        "    stage.train_epoch = fail\n"
        "model_zoo.main(sys.argv[1:])\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{RECIPES}{os.pathsep}{RECIPES.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *GRID]
    ended = subprocess.run(
        [*map(str, command), "--output", str(tmp_path / "zoo")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode != 0
    zoo = tmp_path / "zoo"
    assert json.loads((zoo / "digits-dla46_c.error.json").read_text())["error"].startswith(
        "--image-size 16 does not fit"
    )
    assert [(zoo / f"digits-{model}/summary.json").exists() for model in MODELS[1:]] == [not alone] * 2
    if alone:
        assert json.loads((zoo / "digits-test_byobnet.error.json").read_text())["error"] == "no memory here"
        assert "digits-test_byobnet failed: no memory here" in ended.stdout
    else:
        assert "| digits | test_resnet | inmerge |" in (zoo / "zoo.md").read_text()
