"""A finished run as a pilot: the seeds that another one needs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import report
from finetune.errors import InputError
from finetune.judging.obuchowski_rockette import precision
from finetune.judging.power import seeds_needed
from finetune.judging.summary import difference_of
from finetune.reports.plan import plan_text
from small_runs import run_digits


def run_of(seed_variance: float, case_variance: float, seeds: int = 3) -> SimpleNamespace:
    error, df = precision(seed_variance, case_variance, seeds)
    found = {"mean": 0.0, "values": [0.0] * seeds, "seed_variance": seed_variance, "case_variance": case_variance}
    found |= {"standard_error": error, "df": df} if seeds > 1 else dict.fromkeys(("standard_error", "df"))
    summary = {"rule": {"metric": "auroc", "margin": 0.005}, "differences": {"inmerge": {"auroc": found}}}
    return SimpleNamespace(
        summary=summary, other_arms=["inmerge"], folder=Path("runs/x"), seeds=[0] * seeds, name="breastmnist, resnet18"
    )


def test_seeds_follow_from_the_pilots_variances() -> None:
    run = run_of(0.005**2, 1e-8)
    needed = seeds_needed(difference_of(run.summary["differences"]["inmerge"]["auroc"]), 0.005)
    heading, _, row, *_ = plan_text(run).splitlines()
    assert heading == "Seeds for a margin of 0.005 AUROC (80 % power), from the 3 seeds of breastmnist, resnet18"
    assert row.split()[:3] == ["inmerge", str(needed.difference), str(needed.equivalence)]
    assert int(plan_text(run, margin=0.01).splitlines()[2].split()[1]) < needed.difference


def test_no_number_of_seeds_makes_up_for_a_small_test_set() -> None:
    text = plan_text(run_of(0.005**2, 0.01**2))
    assert text.splitlines()[2].split()[1:3] == ["none", "none"]
    assert "none: the test set is too small for it" in text


def test_one_seed_plans_nothing() -> None:
    with pytest.raises(InputError, match="the run in runs/x shows no spread over seeds to plan by"):
        plan_text(run_of(0.0, 0.0, seeds=1))


def test_report_plans_from_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_digits(
        tmp_path / "run", "--epochs", "1", "--inmerge-epochs", "1", "--limit-train", "300", "--seeds", "0", "1"
    )
    capsys.readouterr()
    report.main(["--plan", str(run), "--margin", "0.02"])
    assert capsys.readouterr().out.startswith(
        "Seeds for a margin of 0.02 AUROC (80 % power), from the 2 seeds of digits"
    )
    for arguments, message in (
        (["--margin", "0.02"], "--margin has no effect without --plan"),
        (["--plan", str(run), "--margin", "0"], "--margin must be above 0, not 0"),
        ([], "no run folder is given"),
    ):
        with pytest.raises(SystemExit, match="2"):
            report.main(arguments)
        assert message in capsys.readouterr().err
