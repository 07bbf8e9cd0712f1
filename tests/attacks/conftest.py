"""What attacks share: a recipe is run in this process on what it can't use, and must say so in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import medmnist2d
import pytest
from attacking import sentence, snapshot, time_limit
from recipe_fixtures import digits_run, made_medmnist  # noqa: F401
from small_runs import run_recipe


@pytest.fixture
def attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a recipe in tmp_path; it must end in one sentence with exit code 2, and change nothing. The sentence.

    `may_change` is a folder for whose content this doesn't hold.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def state(may_change: str | None) -> dict[str, object]:
        whole = snapshot(tmp_path)
        return {name: content for name, content in whole.items() if name.split("/")[0] != may_change}

    def run(
        *arguments: object, recipe: Callable[[list[str]], None] = medmnist2d.main, may_change: str | None = None
    ) -> str:
        before = state(may_change)
        capsys.readouterr()
        with time_limit(), pytest.raises(SystemExit) as exit_:
            run_recipe(*arguments, recipe=recipe)
        assert exit_.value.code == 2
        message = sentence(capsys.readouterr().err)
        assert state(may_change) == before
        return message

    return run
