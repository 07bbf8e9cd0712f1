"""The recipe from its command line to its run folder."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import finetune.training.evaluation
import numpy as np
import pytest
import timm
import torch
from finetune.runs.results import read_predictions
from finetune.sources.digits import load_digits_data
from finetune.training.batches import channel_statistics, model_input
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score
from small_runs import run_digits, run_recipe

from inmerge_optim import kernel_layers, kernel_ranks


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def test_run_folder_has_its_form(digits_run: Path) -> None:
    """Every file of the run folder is there, and nothing half-written."""
    found = {str(path.relative_to(digits_run)) for path in digits_run.rglob("*") if path.is_file()}
    stage = {"metrics.csv", "model.safetensors", "predictions_val.csv", "result.json", "timing.json"}
    expected = {"config.yaml", "versions.json", "looks.json", "data.json", "near_twins.csv"}
    expected |= {"summary.json", "summary.csv"}
    expected |= {f"seed_0/backbone/{name}" for name in stage}
    for arm in ("baseline", "inmerge"):
        expected |= {f"seed_0/{arm}/{name}" for name in stage | {"predictions_test.csv", "merges.csv"}}
    assert found == expected


def test_summary_has_its_form(digits_run: Path) -> None:
    """Figures per arm, differences arm minus baseline, the last epoch beside, and the merges per layer."""
    summary = summary_of(digits_run)
    assert summary["task"] == "multi-class"
    assert summary["seeds"] == [0]
    for figures in (summary, summary["last"]):
        assert set(figures["arms"]) == {"baseline", "inmerge"}
        assert set(figures["differences"]) == {"inmerge"}
        for metric in ("accuracy", "balanced_accuracy", "auroc"):
            values = {arm: figures["arms"][arm][metric]["values"] for arm in figures["arms"]}
            difference = figures["differences"]["inmerge"][metric]
            assert {"mean", "low", "high", "p", "values", "t_low", "t_high", "bootstrap_low"} <= set(difference)
            assert difference["p"] is difference["low"] is difference["t_low"] is None
            assert difference["values"] == [values["inmerge"][0] - values["baseline"][0]]
    assert set(summary["merges"]) == {"inmerge"}
    merged = sum(layer["merged"] for layer in summary["merges"]["inmerge"].values())
    drawn = sum(layer["drawn"] for layer in summary["merges"]["inmerge"].values())
    assert 0 < merged <= drawn
    kernels = summary["kernels"]["inmerge"]
    assert set(kernels) == set(summary["merges"]["inmerge"])
    assert all(found[figure]["values"][0] < 1 for found in kernels.values() for figure in found)
    with (digits_run / "seed_0/inmerge/merges.csv").open() as file:
        assert sum(int(row["merged"]) for row in csv.DictReader(file)) == merged


def rows_of(run: Path, arm: str) -> list[dict[str, str]]:
    with (run / f"seed_0/{arm}/merges.csv").open() as file:
        return list(csv.DictReader(file))


def test_mean_cosine_and_effective_rank_of_each_layer_and_epoch(digits_run: Path) -> None:
    """At a threshold of -0.5 the mean cosine is near 0; the ranks of the last epoch are those of the weights kept."""
    rows, plain = rows_of(digits_run, "inmerge"), rows_of(digits_run, "baseline")
    assert [(row["epoch"], row["layer"]) for row in rows] == [(row["epoch"], row["layer"]) for row in plain]
    assert {row["epoch"] for row in rows} == {"1", "2"}
    assert all(-0.5 < float(row["mean_cosine"]) < 0.5 for row in rows)
    assert {(row["drawn"], row["merged"], row["mean_cosine"]) for row in plain} == {("0", "0", "")}
    ranks, plain_ranks = ([float(row["effective_rank"]) for row in arm] for arm in (rows, plain))
    assert all(np.less(ranks, plain_ranks)), "merging draws kernels together"
    assert all(0 < float(row["displacement"]) < 1 for row in rows)
    assert {row["displacement"] for row in plain} == {""}
    epoch = json.loads((digits_run / "seed_0/inmerge/result.json").read_text())["epoch"]
    model = timm.create_model(
        "test_resnet", num_classes=10, checkpoint_path=str(digits_run / "seed_0/inmerge/model.safetensors")
    )
    kept = {row["layer"]: float(row["effective_rank"]) for row in rows if row["epoch"] == str(epoch)}
    assert kept == pytest.approx(kernel_ranks(model, kernel_layers(model)))


@pytest.mark.parametrize("arm", ["baseline", "inmerge"])
def test_figures_follow_from_the_predictions(digits_run: Path, arm: str) -> None:
    """What scikit-learn computes from predictions_test.csv is what the summary says, exactly."""
    test = read_predictions(digits_run / f"seed_0/{arm}", "test")
    labels, probabilities = test.labels, test.probabilities
    figures = {metric: values["values"][0] for metric, values in summary_of(digits_run)["arms"][arm].items()}
    assert figures["accuracy"] == accuracy_score(labels, probabilities.argmax(1))
    assert figures["balanced_accuracy"] == balanced_accuracy_score(labels, probabilities.argmax(1))
    assert figures["auroc"] == pytest.approx(roc_auc_score(labels, probabilities, multi_class="ovr"), abs=1e-12)


def test_saved_model_loads_in_timm_and_predicts_the_same(digits_run: Path) -> None:
    """model.safetensors is the kept epoch's model, without a word on its arm."""
    path = digits_run / "seed_0/inmerge/model.safetensors"
    with safe_open(path, "pt") as file:
        assert not file.metadata()
    model = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(path)).eval()
    test = load_digits_data(16, split_seed=0).test
    with torch.no_grad():
        logits = model(model_input(torch.from_numpy(test.images), *channel_statistics(model.pretrained_cfg, 3)))
    found = read_predictions(path.parent, "test")
    np.testing.assert_array_equal(found.labels, test.labels)
    np.testing.assert_allclose(logits.double().softmax(1).numpy(), found.probabilities, atol=1e-5)


def test_best_epoch_is_the_first_with_the_best_validation_auroc(digits_run: Path) -> None:
    for arm in ("baseline", "inmerge"):
        with (digits_run / f"seed_0/{arm}/metrics.csv").open() as file:
            aurocs = [float(row["val_auroc"]) for row in csv.DictReader(file)]
        assert summary_of(digits_run)["epochs"][arm] == [aurocs.index(max(aurocs)) + 1]
        val = read_predictions(digits_run / f"seed_0/{arm}", "val")
        assert roc_auc_score(val.labels, val.probabilities, multi_class="ovr") == pytest.approx(max(aurocs), abs=1e-12)


def test_an_earlier_epoch_is_kept_when_no_later_one_is_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ties throughout, an arm of two epochs keeps the weights that an arm of one epoch ends with."""
    real = finetune.training.evaluation.score
    monkeypatch.setattr(finetune.training.evaluation, "score", lambda *args: {**real(*args), "auroc": 0.5})
    settings = ["--epochs", "0", "--batch-size", "400"]
    two = run_digits(tmp_path / "two", *settings, "--inmerge-epochs", "2")
    one = run_digits(tmp_path / "one", *settings, "--inmerge-epochs", "1")
    for arm in ("baseline", "inmerge"):
        for name in ("model.safetensors", "predictions_test.csv"):
            assert (two / "seed_0" / arm / name).read_bytes() == (one / "seed_0" / arm / name).read_bytes()
    kept, last = (figures["arms"]["inmerge"]["accuracy"] for figures in (summary_of(two), summary_of(two)["last"]))
    assert summary_of(two)["epochs"] == {"baseline": [1], "inmerge": [1]}
    assert kept == summary_of(one)["arms"]["inmerge"]["accuracy"]
    assert kept != last


def test_arms_are_equal_to_the_bit_without_merges(tmp_path: Path) -> None:
    """With merge_prob 0 the arms differ in nothing: weights, curves and predictions."""
    run = run_digits(tmp_path / "run", "--merge-prob", "0", "--hflip", "0.5", "--inmerge-epochs", "1")
    for name in ("model.safetensors", "metrics.csv", "predictions_val.csv", "predictions_test.csv"):
        baseline, inmerge = ((run / "seed_0" / arm / name).read_bytes() for arm in ("baseline", "inmerge"))
        assert baseline == inmerge, name
    for difference in summary_of(run)["differences"]["inmerge"].values():
        assert difference["values"] == [0]


def test_merges_make_the_difference(digits_run: Path) -> None:
    weights = [(digits_run / "seed_0" / arm / "model.safetensors").read_bytes() for arm in ("baseline", "inmerge")]
    assert weights[0] != weights[1]


def test_no_epochs_at_all_score_the_initial_weights(tmp_path: Path) -> None:
    run = run_digits(tmp_path / "run", "--epochs", "0", "--inmerge-epochs", "0")
    weights = {(run / "seed_0" / arm / "model.safetensors").read_bytes() for arm in ("backbone", "baseline", "inmerge")}
    assert len(weights) == 1


@pytest.mark.parametrize(
    ("name", "colour", "classes", "labels"),
    [
        ("chestmnist", False, 2, 14),
        ("retinamnist", True, 5, 1),
        ("dermamnist", True, 7, 1),
        ("breastmnist", False, 2, 1),
    ],
)
def test_every_kind_of_task_agrees_with_the_evaluator_of_medmnist(
    made_medmnist, tmp_path: Path, name: str, colour: bool, classes: int, labels: int
) -> None:
    """Multi-label, ordinal, multi-class and binary: our AUROC and accuracy are medmnist's AUC and ACC."""
    folder = made_medmnist(name, colour=colour, classes=classes, labels=labels)
    quick = [
        "--model",
        "test_resnet",
        "--no-pretrained",
        "--epochs",
        "0",
        "--inmerge-epochs",
        "1",
        "--batch-size",
        "32",
    ]
    run = tmp_path / "run"
    run_recipe(
        "--dataset", name, "--data-dir", folder, "--allow-modified", *quick, "--image-size", "16", "--output", run
    )
    for figures in (summary_of(run)["arms"], summary_of(run)["last"]["arms"]):
        for arm in figures.values():
            assert arm["medmnist_auc"]["mean"] == pytest.approx(arm["auroc"]["mean"], abs=1e-12)
            assert arm["medmnist_acc"]["mean"] == pytest.approx(arm["accuracy"]["mean"], abs=1e-12)


def test_grey_images_can_stay_grey(tmp_path: Path) -> None:
    run = run_digits(tmp_path / "run", "--in-chans", "1", "--epochs", "0", "--inmerge-epochs", "0")
    weights = load_file(run / "seed_0/inmerge/model.safetensors")
    assert next(weight for weight in weights.values() if weight.ndim == 4).shape[1] == 1


def test_training_options_take_effect_in_both_arms_alike(tmp_path: Path) -> None:
    """Accumulation, clipping, warm-up, a schedule and another optimizer still leave unmerged arms equal."""
    options = ["--opt", "adamw", "--lr", "1e-3", "--inmerge-lr", "5e-4", "--grad-accum-steps", "2", "--clip-grad", "1"]
    options += ["--sched", "cosine", "--warmup-epochs", "1", "--merge-prob", "0"]
    run = run_digits(tmp_path / "run", *options)
    with (run / "seed_0/backbone/metrics.csv").open() as file:
        assert [float(row["lr"]) for row in csv.DictReader(file)] == pytest.approx([1e-5, 5e-4])
    with (run / "seed_0/inmerge/metrics.csv").open() as file:
        assert [float(row["lr"]) for row in csv.DictReader(file)] == pytest.approx([5e-4, 2.5e-4])
    baseline, inmerge = ((run / "seed_0" / arm / "model.safetensors").read_bytes() for arm in ("baseline", "inmerge"))
    assert baseline == inmerge


def test_real_images_with_given_weights(shared_file, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """BreastMNIST with a local checkpoint runs to its table, and merges some kernels of pretrained weights."""
    data, weights = shared_file("data/medmnist/breastmnist.npz"), shared_file("weights/efficientnet_lite0.safetensors")
    run = tmp_path / "run"
    arguments = ["--dataset", "breastmnist", "--data-dir", data.parent, "--model", "efficientnet_lite0"]
    arguments += ["--checkpoint", weights, "--epochs", "1", "--inmerge-epochs", "1", "--batch-size", "64"]
    run_recipe(*arguments, "--image-size", "32", "--output", run)
    assert sum(layer["merged"] for layer in summary_of(run)["merges"]["inmerge"].values()) > 0
    table = capsys.readouterr().out
    for word in ("accuracy", "auroc", "balanced_accuracy", "medmnist_auc", "inmerge - baseline", "Kernels merged"):
        assert word in table


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "resnet18", "--no-pretrained", "--image-size", "28"],
        [
            "--model",
            "efficientnet_lite0",
            "--checkpoint",
            "weights/efficientnet_lite0.safetensors",
            "--image-size",
            "64",
        ],
    ],
    ids=["resnet18 from scratch", "efficientnet_lite0 pretrained"],
)
def test_pneumonia_is_learnt(shared_file, tmp_path: Path, arguments: list[str]) -> None:
    """On PneumoniaMNIST both arms reach a test AUROC above .93."""
    data = shared_file("data/medmnist/pneumoniamnist.npz")
    arguments = [str(shared_file(word)) if word.startswith("weights/") else word for word in arguments]
    run = tmp_path / "run"
    run_recipe(
        *("--dataset", "pneumoniamnist", "--data-dir", data.parent, *arguments),
        *("--epochs", "8", "--inmerge-epochs", "4", "--output", run),
    )
    for arm in ("baseline", "inmerge"):
        test = read_predictions(run / f"seed_0/{arm}", "test")
        auroc = roc_auc_score(test.labels, test.probabilities[:, 1])
        assert auroc > 0.93
        assert summary_of(run)["arms"][arm]["auroc"]["values"] == [pytest.approx(auroc, abs=1e-12)]
