"""A stage that diverges is an outcome, and the others go on."""

from __future__ import annotations

import json
from pathlib import Path

import finetune.training.stage
import pytest
from finetune.errors import Diverged
from small_runs import run_digits

SHORT = ["--epochs", "1", "--inmerge-epochs", "1", "--limit-train", "300"]


@pytest.mark.parametrize(
    ("broken", "count"), [(["seed 1 inmerge"], 1), (["seed 0 inmerge", "seed 1 inmerge"], 2), (["seed 1 backbone"], 1)]
)
def test_a_diverging_arm_is_an_outcome(
    broken: list[str], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = finetune.training.stage.train_epoch

    def train(*args: object) -> float:
        if any(title in str(args[7]) for title in broken):
            raise Diverged("the training loss is nan")
        return real(*args)

    monkeypatch.setattr(finetune.training.stage, "train_epoch", train)
    run = run_digits(tmp_path / "run", *SHORT, "--seeds", "0", "1", report=True)
    words = f"inmerge diverged in {count} of 2 seeds"
    assert words in capsys.readouterr().out
    assert words in (run / "report.md").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert [verdict["outcome"] for verdict in summary["verdicts"]] == ["diverged"]
    assert json.loads((run / "seed_1/inmerge/result.json").read_text())["diverged"] == int("inmerge" in broken[-1])
    (run / "summary.json").unlink()
    monkeypatch.setattr(finetune.training.stage, "train_epoch", None)  # nothing is trained again
    run_digits(run, *SHORT, "--seeds", "0", "1", "--resume")
    assert json.loads((run / "summary.json").read_text()) == summary
