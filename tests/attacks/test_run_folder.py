"""What lies in a run folder, whoever put it there: recipes go on only with what they have written themselves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import finetune.runs.config
import finetune.runs.settings
import finetune.training.stage
import pytest
from small_runs import assert_same, run_digits, run_digits_until

RUN = ["--dataset", "digits", "--model", "test_resnet", "--no-pretrained", "--image-size", "16", "--hflip", "0.5"]
RUN += ["--epochs", "2", "--inmerge-epochs", "2", "--similarity-threshold", "-0.5", "--output", "run"]


@pytest.fixture
def run(digits_run: Path, tmp_path: Path) -> Path:
    """A finished run, of which attacks may damage this copy."""
    return Path(shutil.copytree(digits_run, tmp_path / "run"))


def test_files_of_others_are_not_taken_for_a_run(attack: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for name in ("summary.csv", "seed_0/baseline/state/epoch_0001/notes.txt", "seed_0/baseline/model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    for resume in ([], ["--resume"]):
        assert "run is not empty, and holds no run, as it has no config.yaml" in attack(*RUN, *resume)


def test_a_run_that_lost_its_settings_does_not_go_on(attack: Callable[..., str], run: Path) -> None:
    (run / "versions.json").unlink()
    assert "run has lost its versions.json: put it back" in attack(*RUN, "--resume")
    (run / "config.yaml").unlink()
    assert "run is not empty, and holds no run" in attack(*RUN, "--resume", "--lr", "0.3")


@pytest.mark.parametrize("call", [1, 2], ids=["after config.yaml", "after versions.json"])
def test_killed_while_it_writes_its_settings_a_run_goes_on(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """At that moment the folder holds some of the settings, and what the kill has left of others."""
    arguments = ["--similarity-threshold", "-0.5", "--hflip", "0.5"]
    module, function = [(finetune.runs.settings, "write_json"), (finetune.training.stage, "train_epoch")][call - 1]
    run_digits_until(monkeypatch, tmp_path / "run", module, function, 1, *arguments)
    (tmp_path / "run" / "versions.json.partial").write_text("{")
    run_digits(tmp_path / "run", *arguments, "--resume")
    (tmp_path / "run" / "versions.json.partial").unlink(missing_ok=True)
    assert_same(tmp_path / "run", digits_run)


def test_config_is_never_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even by a launch that found the folder empty a moment ago, where locks failed."""
    real = finetune.runs.config.write_new

    def after_another(path: Path, content: bytes) -> None:
        path.write_text("another's")
        real(path, content)

    monkeypatch.setattr(finetune.runs.config, "write_new", after_another)
    with pytest.raises(SystemExit, match="2"):
        run_digits(tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").read_text() == "another's"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]
