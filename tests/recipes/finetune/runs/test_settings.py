"""Under which settings a run may go on: the weights it started from, and the versions of what its numbers depend on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from finetune.runs import settings
from safetensors.torch import save_file
from small_runs import run_digits

SHORT = ["--epochs", "0", "--inmerge-epochs", "1", "--limit-train", "300"]
MORE = ["--seeds", "0", "1", "--resume"]


def refusal(capsys: pytest.CaptureFixture[str], run: Path, *arguments: object) -> str:
    with pytest.raises(SystemExit, match="2"):
        run_digits(run, *SHORT, *arguments)
    return capsys.readouterr().err


def test_a_checkpoint_is_known_by_its_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = tmp_path / "first.safetensors", tmp_path / "other.safetensors"
    weights = timm.create_model("test_resnet").state_dict()
    save_file(weights, first)
    run = run_digits(tmp_path / "run", *SHORT, "--pretrained", "--checkpoint", first)
    shutil.copy(first, other)
    run_digits(run, *SHORT, "--pretrained", "--checkpoint", other, "--resume")
    weights["conv1.0.weight"] = torch.zeros_like(weights["conv1.0.weight"])
    save_file(weights, first)
    message = refusal(capsys, run, "--pretrained", "--checkpoint", first, "--resume")
    assert "was begun with a --checkpoint of sha256" in message
    assert message.count("\n") == 1
    assert "--pretrained True, not False" in refusal(capsys, run, "--resume")


def test_other_versions_are_refused_or_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_digits(tmp_path / "run", *SHORT)
    begun = json.loads((run / "versions.json").read_text())
    now = {**begun["packages"], "timm": "99.0"}
    monkeypatch.setattr(settings, "package_versions", lambda: now)
    run_digits(run, *SHORT, "--resume")  # prints the table; nothing is trained
    assert f"timm {begun['packages']['timm']}, not 99.0" in refusal(capsys, run, *MORE)
    assert json.loads((run / "versions.json").read_text()) == begun
    for _ in range(2):
        run_digits(run, *SHORT, *MORE, "--allow-other-versions")
        assert json.loads((run / "versions.json").read_text()) == {**begun, "resumed_with": [now]}
