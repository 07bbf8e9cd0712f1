"""Finished runs are scored on corrupted images: figures, verdicts, what is kept, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import medmnist2d
import numpy as np
import pytest
import report
import robustness
import torch
from finetune.data.corruptions import CORRUPTIONS, NOT_MADE, SUITES, corrupt
from finetune.data.tasks import probabilities
from finetune.errors import CheckpointWarning
from finetune.runs.kept_logits import read_logits
from finetune.runs.results import read_predictions
from finetune.sources.digits import load_digits_data
from finetune.training.inference import KeptModel
from safetensors import safe_open
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score
from small_runs import Killed, run_digits, run_recipe

SHORT = ["--epochs", "2", "--inmerge-epochs", "1", "--similarity-threshold", "-0.5"]
CHOSEN = ["--corruptions", "gaussian_noise", "contrast_down"]


@pytest.fixture(scope="module", autouse=True)
def few_resamples() -> Iterator[None]:
    """A tenth of the resamples, which take most of the time, and of which nothing here depends."""
    with mock.patch("finetune.judging.intervals.RESAMPLES", 200):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return run_digits(tmp_path_factory.mktemp("robustness") / "run", *SHORT, "--seeds", "0", "1", "2")


@pytest.fixture(scope="module")
def scored(trained: Path) -> Path:
    """A copy of the run with two corruptions and one attack scored, and its report."""
    run = Path(shutil.copytree(trained, trained.parent / "scored"))
    score(run, *CHOSEN, "--attack-levels", "4", "16", with_report=True)
    return run


def score(run: Path, *arguments: object, with_report: bool = False) -> None:
    with nullcontext() if with_report else mock.patch("finetune.reports.pages.write_report"):
        run_recipe(run, "--corrupted-dir", run.parent / "corrupted", *arguments, recipe=robustness.main)


def summary_of(run: Path) -> dict:
    return json.loads((run / "robustness/summary.json").read_text())


def logits_of(path: Path) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("logits")


def test_figures_follow_from_what_the_models_said(scored: Path) -> None:
    summary, test = summary_of(scored), load_digits_data(16, 0).test
    with (scored / "robustness/figures.csv").open() as file:
        rows = {(row["corruption"], row["severity"], row["arm"], row["seed"]): row for row in csv.DictReader(file)}
    assert len(rows) == 2 * 3 * (1 + 2 * 5)
    (found,) = json.loads((scored / "summary.json").read_text())["temperatures"]["inmerge"].values()
    temperature = found["values"][1]
    assert temperature != 1
    aurocs = []
    for name in ("gaussian_noise", "contrast_down"):
        found = logits_of(scored / f"robustness/seed_1/inmerge/{name}.safetensors")
        assert found.shape == (5, len(test), 10)
        for severity, logits in enumerate(found, 1):
            row = rows[name, str(severity), "inmerge", "1"]
            scores = logits.double().softmax(1).numpy()
            aurocs.append(roc_auc_score(test.labels, scores, multi_class="ovr"))
            assert float(row["auroc"]) == pytest.approx(aurocs[-1])
            assert float(row["balanced_error"]) == pytest.approx(
                1 - balanced_accuracy_score(test.labels, scores.argmax(1))
            )
            scaled = (logits.double() / temperature).softmax(1).numpy()  # by what clean validation chose
            assert float(row["log_loss_scaled"]) == pytest.approx(log_loss(test.labels, scaled), rel=1e-4)
    assert summary["corrupted"]["inmerge"]["auroc"]["values"][1] == pytest.approx(np.mean(aurocs))
    change = summary["change"]["inmerge"]["auroc"]["values"][1]
    assert change == pytest.approx(np.mean(aurocs) - summary["clean"]["inmerge"]["auroc"]["values"][1])


def test_models_see_what_corrupt_makes(scored: Path) -> None:
    """The clean images give the run's own predictions to the bit, and corrupted ones those of corrupt's images."""
    test = load_digits_data(16, 0).test
    folder = scored / "seed_0/baseline"
    clean = probabilities(
        load_digits_data(16, 0).task, logits_of(scored / "robustness/seed_0/baseline/clean.safetensors")[0]
    )
    np.testing.assert_array_equal(clean, read_predictions(folder, "test").probabilities)
    cached = sorted((scored.parent / "corrupted/digits-16px-corrupted").glob("contrast_down-*.safetensors"))
    assert len(cached) == 5
    images = [safe_open(path, framework="np").get_tensor("images") for path in cached]
    expected = [
        corrupt(test.images, test.cases, "contrast_down", factor) for factor in SUITES["general"]["contrast_down"]
    ]
    assert {found.tobytes() for found in images} == {found.tobytes() for found in expected}


def test_both_endpoints_are_judged_as_one_family(scored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {verdict["endpoint"]: verdict for verdict in summary_of(scored)["verdicts"]}
    assert list(found) == ["clean AUROC", "mean corrupted AUROC"]
    difference = json.loads((scored / "summary.json").read_text())["verdicts"][0]
    assert found["clean AUROC"]["mean"] == difference["mean"]
    half = [verdict["high"] - verdict["low"] for verdict in (found["clean AUROC"], difference)]
    assert half[0] > half[1]  # one of two comparisons, in place of one of one
    assert (
        "97.5 % interval" in found["mean corrupted AUROC"]["sentence"]
        or found["mean corrupted AUROC"]["outcome"] == "equivalent"
    )


def test_attacks_harm_the_more_the_further_they_may_go_and_more_than_noise(scored: Path) -> None:
    summary = summary_of(scored)
    for arm in ("baseline", "inmerge"):
        clean = summary["clean"][arm]["log_loss"]["mean"]
        losses = {
            kind: [
                np.mean([seed["log_loss"] for seed in summary["attacks"][kind][level][arm]]) for level in ("4", "16")
            ]
            for kind in ("fgsm", "pgd", "noise")
        }
        for kind in ("fgsm", "pgd"):
            assert clean < losses[kind][0] < losses[kind][1]
            assert losses[kind][1] - clean > 3 * abs(losses["noise"][1] - clean)
        assert losses["pgd"][1] > losses["fgsm"][1] * 0.9


def test_report_shows_it_and_report_py_keeps_it(scored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (scored / "report.md").read_text()
    for heading in ("Robustness", "Robustness by corruption", "What the corruptions look like", "Adversarial changes"):
        assert f"## {heading}" in text
    for verdict in summary_of(scored)["verdicts"]:
        assert verdict["sentence"] in text
    for name in ("severity", "corruptions", "examples"):
        assert (scored / f"robustness/{name}.png").stat().st_size > 5000
        assert f"robustness/{name}.png" in text
    assert "saturate, as it needs colours" in text
    assert "2 corruptions (chosen by name from the general set, as MedMNIST-C defines each)" in text
    report.main([str(scored)])
    assert (scored / "report.md").read_text() == text


def content_of(run: Path) -> dict[str, bytes]:
    files = (path for path in (run / "robustness").rglob("*") if path.is_file())
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def test_a_second_call_scores_nothing_and_a_killed_one_goes_on_to_the_same(trained: Path, tmp_path: Path) -> None:
    run, killed = (Path(shutil.copytree(trained, tmp_path / name)) for name in ("run", "killed"))
    score(run, "--corruptions", "impulse_noise")
    before = content_of(run)
    with mock.patch.object(KeptModel, "logits", side_effect=AssertionError("scored again")):
        score(run, "--corruptions", "impulse_noise")
    assert content_of(run) == before

    real, calls = KeptModel.logits, []

    def until(self: KeptModel, images: np.ndarray) -> torch.Tensor:
        calls.append(None)
        if len(calls) == 9:
            raise Killed
        return real(self, images)

    with mock.patch.object(KeptModel, "logits", until), pytest.raises(Killed):
        score(killed, "--corruptions", "impulse_noise")
    kept = {name for name in content_of(killed) if name.endswith(".safetensors")}
    assert kept == {
        f"robustness/seed_0/{name}.safetensors"
        for name in ("baseline/clean", "baseline/impulse_noise", "inmerge/clean")
    }
    score(killed, "--corruptions", "impulse_noise")
    assert content_of(killed) == before


def test_what_is_damaged_is_made_anew(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    score(run, "--corruptions", "brightness_up")
    before = content_of(run)
    logits = run / "robustness/seed_2/inmerge/brightness_up.safetensors"
    (image,) = list((tmp_path / "corrupted/digits-16px-corrupted").glob("brightness_up-*"))[:1]
    for path in (logits, image):
        spoiled = bytearray(path.read_bytes())
        spoiled[-9] ^= 1
        path.write_bytes(spoiled)
    with pytest.warns(CheckpointWarning) as found:
        score(run, "--corruptions", "brightness_up")
    assert {"scored anew" in str(warning.message) or "made anew" in str(warning.message) for warning in found} == {True}
    assert len({str(warning.message) for warning in found}) == 2
    assert content_of(run) == before
    assert read_logits(logits, "something else") is None


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        run_recipe(*arguments, recipe=robustness.main)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_a_run_that_can_not_be_scored_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = Path(shutil.copytree(trained, tmp_path / "bare"))
    (bare / "seed_1/inmerge/model.safetensors").unlink()
    assert "model.safetensors is not there, by which the run would be scored" in refusal(capsys, bare)
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    versions = json.loads((other / "versions.json").read_text())
    (other / "versions.json").write_text(json.dumps({**versions, "data": {"x.npz": "12"}}))
    assert "was trained on the files {'x.npz': '12'}, not {} (by checksum)" in refusal(capsys, other)
    assert "is no run folder" in refusal(capsys, tmp_path)
    assert not (bare / "robustness").exists()
    assert not (other / "robustness").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--corruptions", "gausian_noise"],
            "names the unknown corruption 'gausian_noise': did you mean gaussian_noise",
        ),
        (["--corruptions", "characters"], f"characters is not made here: {NOT_MADE['characters']}"),
        (["--corruptions", "zoom_blur"], "zoom_blur is none that fits digits: choose from pixelate"),
        (["--corruptions", "pixelate", "pixelate"], "names one twice"),
        (["--attack-levels", "0"], "must be above 0 and at most 255"),
        (["--no-keep", "--corrupted-dir", "x"], "--corrupted-dir has no effect with --no-keep"),
    ],
)
def test_what_can_not_be_scored_is_refused(
    trained: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refusal(capsys, trained, *arguments)
    assert not (trained / "robustness").exists()


def test_no_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run folder is given" in refusal(capsys)


@pytest.mark.slow
def test_all_corruptions_of_a_set_are_scored_by_default(made_medmnist: Callable[..., Path], tmp_path: Path) -> None:
    """On a coloured set, from its file, with what it leaves out named."""
    data = made_medmnist("bloodmnist", colour=True, classes=8, cases=40)
    arguments = ["--dataset", "bloodmnist", "--data-dir", data, "--allow-modified", "--model", "test_resnet"]
    arguments += ["--no-pretrained", "--epochs", "0", "--inmerge-epochs", "1", "--batch-size", "20"]
    run_recipe(*arguments, "--output", tmp_path / "run", recipe=medmnist2d.main)
    score(tmp_path / "run")
    summary = summary_of(tmp_path / "run")
    assert list(summary["by_severity"]) == [name for name in SUITES["bloodmnist"] if name in CORRUPTIONS]
    assert list(summary["left_out"]) == ["stain_deposit"]
    assert set(summary["relative"]) == {"baseline", "inmerge"}
    assert summary["ill_conditioned"] == ["saturate"]
    errors = summary["relative"]["inmerge"]["by_corruption"]["bubble"]
    error, clean = (summary[kind]["inmerge"]["balanced_error"]["mean"] for kind in ("corrupted", "clean"))
    own = summary["by_corruption"]["bubble"]["inmerge"]["balanced_error"]["mean"]
    assert errors == {"be": pytest.approx(own / 0.1290), "rbe": pytest.approx((own - clean) / (0.1290 - 0.0184))}
    assert 0 <= error <= 1
