"""What people expect of training beyond the trial: weights of classes, smoothing, compile, checkpointing, trackers."""

from __future__ import annotations

import json
from functools import partialmethod
from pathlib import Path

import finetune.training.epoch
import numpy as np
import pytest
import timm
import torch
from finetune.data.tasks import Task, balanced_weights, loss
from safetensors.torch import load_file
from sklearn.utils.class_weight import compute_class_weight
from small_runs import run_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CLASSES = Task("multi-class", ("a", "b", "c"))
LABELS = Task("multi-label", ("a", "b", "c"))
SHORT = ["--epochs", "1", "--inmerge-epochs", "1", "--limit-train", "256"]


def test_class_weights_are_scikit_learns() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert balanced_weights(CLASSES, labels).numpy() == pytest.approx(expected)
    assert balanced_weights(CLASSES, labels[:5]).tolist() == pytest.approx([5 / 9, 5 / 6, 1])


def test_positive_weights_balance_each_label() -> None:
    labels = np.array([[1, 0, 0], [0, 0, 1], [0, 0, 1], [0, 0, 1]])
    assert balanced_weights(LABELS, labels).tolist() == pytest.approx([3, 1, 1 / 3])
    # With them the positives of a label weigh as much as its negatives.
    logits = torch.zeros(4, 3)
    weighted = loss(LABELS, logits, torch.from_numpy(labels), balanced_weights(LABELS, labels))
    assert weighted.item() == pytest.approx(np.log(2) * (6 / 4 + 1 + 2 / 4) / 3)


def test_smoothing_is_torchs() -> None:
    logits, labels = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1, 0])
    expected = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1)(logits, labels)
    torch.testing.assert_close(loss(CLASSES, logits, labels, torch.tensor([1.0, 2.0, 3.0]), 0.1), expected)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return run_digits(tmp_path_factory.mktemp("plain") / "run", *SHORT)


@pytest.mark.parametrize(
    "option", [["--smoothing", "0.1"], ["--class-weights", "balanced"]], ids=lambda words: words[0]
)
def test_options_of_the_loss_reach_training(option: list[str], plain: Path, tmp_path: Path) -> None:
    run = run_digits(tmp_path / "run", *SHORT, *option)
    found, expected = (load_file(folder / "seed_0/backbone/model.safetensors") for folder in (run, plain))
    assert not all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace and guard as torch.compile does, but leave out the C++ compiler, which takes minutes."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compile_, backend="eager"))


@pytest.mark.parametrize("option", ["--grad-checkpointing", "--compile"])
@pytest.mark.usefixtures("quick_compiler")
def test_savings_of_memory_and_time_leave_the_figures(option: str, plain: Path, tmp_path: Path) -> None:
    assert_learns_the_same(run_digits(tmp_path / "run", *SHORT, option), plain)


@pytest.mark.slow
def test_the_default_compiler_leaves_the_figures(plain: Path, tmp_path: Path) -> None:
    assert_learns_the_same(run_digits(tmp_path / "run", *SHORT, "--compile"), plain)


def assert_learns_the_same(run: Path, plain: Path) -> None:
    """The same parameters but for rounding, under timm's names.

    Batch norm's running statistics are updated in the repeated forward pass too, so they are not compared.
    """
    path = run / "seed_0/inmerge/model.safetensors"
    found, expected = load_file(path), load_file(plain / "seed_0/inmerge/model.safetensors")
    assert found.keys() == expected.keys()
    for name in (name for name in expected if "running" not in name and "batches" not in name):
        torch.testing.assert_close(found[name], expected[name], rtol=0.02, atol=0.02)
    timm.create_model("test_resnet", num_classes=10, checkpoint_path=path)


def test_a_dry_run_trains_on_few_images_and_scores_all(plain: Path) -> None:
    lines = (plain / "seed_0/inmerge/predictions_test.csv").read_text().splitlines()
    assert len(lines) - 1 == 270
    assert json.loads((plain / "summary.json").read_text())["arms"]["baseline"]["accuracy"]["values"][0] is not None


def test_tensorboard_gets_every_epoch_and_layer(tmp_path: Path) -> None:
    run = run_digits(
        tmp_path / "run", "--limit-train", "256", "--tracker", "tensorboard", "--similarity-threshold", "-0.5"
    )
    for stage in ("backbone", "baseline", "inmerge"):
        events = EventAccumulator(str(run / "tensorboard/seed_0" / stage)).Reload()
        tags = events.Tags()["scalars"]
        assert {"lr", "train_loss", "val/auroc", "val/ece"} <= set(tags)
        assert [event.step for event in events.Scalars("train_loss")] == [1, 2]
        rates = [tag for tag in tags if tag.startswith("merge_rate/")]
        assert bool(rates) == (stage == "inmerge")
        for rate in rates:
            assert 0 <= events.Scalars(rate)[0].value <= 1
    logged = EventAccumulator(str(run / "tensorboard/seed_0/inmerge")).Reload().Scalars("val/auroc")
    written = np.genfromtxt(run / "seed_0/inmerge/metrics.csv", delimiter=",", names=True)["val_auroc"]
    assert [event.value for event in logged] == pytest.approx(written.tolist())


def test_progress_bar_shows_loss_rate_speed_and_merges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finetune.training.epoch, "_SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    run_digits(tmp_path / "run", *SHORT, "--similarity-threshold", "-1")
    shown = capsys.readouterr().err
    for figure in ("loss=", "lr=0.01", "images/s=", "merges/step="):
        assert figure in shown
