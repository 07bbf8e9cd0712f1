"""The report says what the run folder holds, stands by itself, and can be made anew; models leave with a card."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import report
import torch
from finetune.errors import InputError
from finetune.reports.style import interval_text
from finetune.runs.finished import FinishedRun, current_summary
from finetune.runs.results import read_predictions
from finetune.runs.sections import Section, write_sections
from huggingface_hub import ModelCard
from PIL import Image
from scipy.special import softmax
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score
from small_runs import QUICK, run_digits, run_recipe

SHORT = ["--epochs", "1", "--inmerge-epochs", "2", "--limit-train", "400", "--similarity-threshold", "-0.5"]
ARMS = ["--arms", "baseline", "inmerge", "random-pairs"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("report") / "run"
    return run_digits(folder, *SHORT, *ARMS, "--seeds", "0", "1", report=True)


def tables_of(markdown: str) -> dict[str, list[dict[str, str]]]:
    """The tables of a report, as rows keyed by their headers, by the heading of their section."""
    tables = {}
    for section in re.split(r"^## ", markdown, flags=re.MULTILINE)[1:]:
        lines = [line for line in section.splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        if cells:
            tables[section.splitlines()[0]] = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    return tables


class Page(HTMLParser):
    """Tags with their attributes, and the text in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_figure_of_the_arms_follows_from_the_predictions(run: Path) -> None:
    tables = tables_of((run / "report.md").read_text())
    kept = {row[""]: row for row in tables["The arms"] if row[""] != "minus baseline"}
    per_class = {(row["class"], row["metric"]): row for row in tables["Per class"]}
    for arm in ("baseline", "inmerge", "random-pairs"):
        found = [read_predictions(run / f"seed_{seed}/{arm}", "test") for seed in (0, 1)]
        seeds = [(test.labels, test.probabilities) for test in found]
        accuracy = [np.mean(labels == scores.argmax(1)) for labels, scores in seeds]
        aurocs = [roc_auc_score(labels, scores, multi_class="ovr") for labels, scores in seeds]
        assert kept["accuracy"][arm] == f"{np.mean(accuracy):.4f} ± {np.std(accuracy, ddof=1):.4f}"
        assert kept["AUROC"][arm] == f"{np.mean(aurocs):.4f} ± {np.std(aurocs, ddof=1):.4f}"
        for name, score in (("AUROC", roc_auc_score), ("AUPRC", average_precision_score)):
            figures = [score(labels == 3, scores[:, 3]) for labels, scores in seeds]
            assert per_class["3", name][arm].startswith(f"{np.mean(figures):.4f} ± ")
        right = [(scores.argmax(1) == labels)[labels == 3].mean() for labels, scores in seeds]
        calls = {(row["class"], row["arm"]): row for row in tables["Sensitivity and specificity"]}
        assert calls["3", arm]["sensitivity"].startswith(f"{100 * np.mean(right):.1f} % [")
    splits = {row[""]: row for row in tables["The trial"]}
    assert splits["images"]["train"] == "400"
    assert splits["of 3"]["test"] == str(int((found[0].labels == 3).sum()))


def test_the_answer_comes_first(run: Path) -> None:
    """One plain sentence, then the picture that it rests on; each stage's time, and what a checklist asks for."""
    text = (run / "report.md").read_text()
    answer, verdict = text.split("## ")[1:3]
    assert answer.startswith("Answer\n\nMerging is not judged: ")
    assert "![" in answer
    assert verdict.startswith("Verdict")
    tables = tables_of(text)
    assert [row["stage"] for row in tables["Time per stage"]] == ["backbone", "baseline", "inmerge", "random-pairs"]
    items = {row["item"]: row["this run"] for row in tables["Checklist"]}
    assert items["initialisation"] == "random weights"
    assert items["funding"] == "not known to this run"
    assert "%" in text
    assert not re.search(r"\d%", text)


def test_verdicts_and_merges_are_those_of_the_summary(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    text = (run / "report.md").read_text()
    for found in summary["verdicts"]:
        assert found["sentence"] in text
    rows = {(row["arm"], row["layer"]): row for row in tables_of(text)["What merging did to the weights"]}
    for arm, layers in summary["merges"].items():
        for layer, count in layers.items():
            assert rows[arm, layer]["merged"] == f"{count['merged']:,}"
            for figure, title in (("norm", "norm"), ("effective_rank", "rank")):
                mean = np.mean(summary["kernels"][arm][layer][figure]["values"])
                assert rows[arm, layer][f"{title} over baseline's"] == f"{mean:.3f}"
    assert "--recalibrate-bn was off" in text


def test_calibration_is_told_as_predicted_and_scaled(run: Path) -> None:
    """By the temperatures fitted on validation, which stand in the summary; the test set has no part in them."""
    summary, text = json.loads((run / "summary.json").read_text()), (run / "report.md").read_text()
    tables = tables_of(text)
    for arm in ("baseline", "inmerge", "random-pairs"):
        found = summary["temperatures"][arm]["all classes"]
        for seed, temperature in zip((0, 1), found["values"], strict=True):
            val, test = (read_predictions(run / f"seed_{seed}/{arm}", part) for part in ("val", "test"))
            around = temperature * np.array([0.99, 1, 1.01])
            losses = [log_loss(val.labels, softmax(np.log(val.probabilities) / value, axis=1)) for value in around]
            assert min(losses) == losses[1]
            scaled = log_loss(test.labels, softmax(np.log(test.probabilities) / temperature, axis=1))
            assert summary["arms"][arm]["log_loss_scaled"]["values"][seed] == pytest.approx(scaled)
        row = next(row for row in tables["Calibration"] if row["arm"] == arm)
        assert row["temperature"] == f"{found['mean']:.2f} ± {found['std']:.2f}"
    assert {"log loss, scaled", "ECE, scaled"} <= {row[""] for row in tables["The arms"]}
    difference = summary["differences"]["inmerge"]["log_loss_scaled"]
    assert "inmerge minus baseline: log loss " in text
    assert f", scaled {interval_text(difference['mean'], (difference['low'], difference['high']))}; ECE" in text


def test_what_the_splits_share_is_told(run: Path) -> None:
    """Of every data set; here 400 training images of scikit-learn's digits."""
    text = (run / "report.md").read_text()
    recorded = json.loads((run / "data.json").read_text())
    assert recorded["leaks"] == []
    assert "No image lies in two splits by its pixels" in text
    assert recorded["near_twins"].partition(",")[0] in text
    with (run / "near_twins.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["split", "case", "other_split", "other_case", "bits", "mirrored"]
    assert f"{len(rows):,} of the" in recorded["near_twins"]


def test_html_stands_by_itself_and_says_what_the_markdown_says(run: Path) -> None:
    page = Page((run / "report.html").read_text())
    markdown = (run / "report.md").read_text()
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 8
    for picture in pictures:
        assert picture["src"].startswith("data:image/png;base64,")
        assert picture["alt"]
    assert not [tag for tag, attributes in page.tags if tag in ("script", "link") or "href" in attributes]
    assert "http" not in (run / "report.html").read_text()
    for rows in tables_of(markdown).values():
        for cell in (cell for row in rows for cell in row.values()):
            assert cell.replace("\\|", "|") in page.text
    for path in re.findall(r"!\[.*\]\((.*)\)", markdown):
        assert (run / path).stat().st_size > 5000


def test_report_is_made_anew_from_the_folder_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = Path(shutil.copytree(run, tmp_path / "moved"))
    made = (moved.glob(pattern) for pattern in ("report.*", "summary.*", "plots/*", "seed_*/*/README.md"))
    for path in (path for paths in made for path in paths):
        path.unlink()
    report.main([str(moved)])
    assert capsys.readouterr().out == f"{moved / 'report.html'}\n"
    for path in (path for path in run.rglob("*") if path.is_file()):
        assert (moved / path.relative_to(run)).read_bytes() == path.read_bytes(), path


def test_a_run_of_the_first_version_is_judged_anew(run: Path, tmp_path: Path) -> None:
    """It tells its task in its summary alone, which has no schema; the recipe's --resume prints the table of today."""
    old = Path(shutil.copytree(run, tmp_path / "old"))
    (old / "data.json").unlink()
    summary = json.loads((run / "summary.json").read_text())
    (old / "summary.json").write_text(json.dumps({key: summary[key] for key in ("data", "task", "classes")}))
    assert current_summary(old) == summary
    report.main([str(old)])
    assert (old / "summary.json").read_bytes() == (run / "summary.json").read_bytes()
    (old / "summary.json").unlink()
    with pytest.raises(InputError, match=r"doesn't say what was learnt: data.json and summary.json .* missing"):
        FinishedRun(old).task  # noqa: B018


def test_sections_of_a_recipe_are_shown(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    picture = ("plots/roc.png", "a < b")
    rows = [["sex | F", None], ["<b>", "0.5"]]
    write_sections(folder, [Section("Parts of <it>", "Of all.\n\nMore.", ("part", "AUROC"), rows, [picture])])
    report.main([str(folder)])
    page = Page((folder / "report.html").read_text())
    assert "Parts of <it>" in page.text
    assert "<b>" in page.text
    assert tables_of((folder / "report.md").read_text())["Parts of \\<it>"][0] == {"part": "sex \\| F", "AUROC": "–"}


def test_runs_stand_side_by_side(run: Path, tmp_path: Path) -> None:
    other = run_digits(tmp_path / "other", *SHORT, "--lr", "0.02", "--merge-prob", "0")
    report.main([str(run), str(other), "--output", str(tmp_path / "both.html")])
    tables = tables_of((tmp_path / "both.md").read_text())
    differences = tables["Differences to the baseline on test"]
    assert [row["arm"] for row in differences] == ["inmerge", "random-pairs", "inmerge"]
    assert (differences[2]["difference"], differences[2]["over seeds"]) == ("0.0000", "–")
    assert {row["setting"] for row in tables["Where the settings differ"]} == {
        "--lr",
        "--merge-prob",
        "--seeds",
        "--arms",
    }
    assert "data:image/png" in (tmp_path / "both.html").read_text()


@pytest.mark.parametrize(
    ("classes", "labels", "name"), [(2, 14, "chestmnist"), (2, 1, "breastmnist"), (5, 1, "retinamnist")]
)
def test_every_kind_of_task_has_a_report(
    made_medmnist: Callable[..., Path], tmp_path: Path, classes: int, labels: int, name: str
) -> None:
    data = made_medmnist(name, colour=name == "retinamnist", classes=classes, labels=labels, size=28)
    arguments = ["--data-dir", data, "--allow-modified", "--batch-size", "32", "--inmerge-epochs", "1"]
    run_recipe("--dataset", name, *QUICK, *arguments, "--epochs", "0", "--output", tmp_path / "run", report=True)
    rows = tables_of((tmp_path / "run/report.md").read_text())["Per class"]
    assert len(rows) == 4 * (1 if name == "breastmnist" else max(labels, classes))
    kappa = "weighted kappa (quadratic)" if name == "retinamnist" else "Cohen's kappa"
    assert f"| {kappa} |" in (tmp_path / "run/report.md").read_text()


def test_model_leaves_with_a_card_whose_lines_run(run: Path, tmp_path: Path) -> None:
    folder = run / "seed_1/inmerge"
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "timm"
    accuracy = json.loads((run / "summary.json").read_text())["arms"]["inmerge"]["accuracy"]["values"][1]
    assert f"| accuracy | {accuracy:.4f} |" in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    rates = "0.01 in the backbone stage, 0.01 at the start of the arm"
    assert f"learning rate {rates}" in card.text
    place = shutil.copytree(folder, tmp_path / "left")
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(place / "image.png")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", f"{code}\nassert probabilities.shape == (10,)"], cwd=place, env=environment, check=True
    )


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        report.main([str(argument) for argument in arguments])
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_what_is_no_finished_run_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{tmp_path} is no run folder" in refusal(capsys, tmp_path)
    unfinished = Path(shutil.copytree(run, tmp_path / "unfinished"))
    (unfinished / "seed_1/inmerge/result.json").unlink()
    assert "is not finished: go on with it" in refusal(capsys, unfinished)
    assert "must end in .html" in refusal(capsys, run, "--output", tmp_path / "x.txt")
