"""Label noise changes a share of the training labels, the same for all arms, and nothing else."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from finetune.data.corruptions import case_generator
from finetune.data.images import ImageData, Split
from finetune.data.label_noise import noisy_labels, with_label_noise
from finetune.data.tasks import Task
from finetune.sources.digits import load_digits_data
from small_runs import run_digits

CASES = 4000


def generators(seed: int = 0) -> list[np.random.Generator]:
    return [case_generator(f"label noise {seed}", str(case)) for case in range(CASES)]


def test_classes_become_any_other_class_alike() -> None:
    task = Task("multi-class", tuple("abcd"))
    labels = np.arange(CASES) % 4
    noisy = noisy_labels(task, labels, 0.3, generators())
    assert (noisy != labels).mean() == pytest.approx(0.3, abs=0.03)
    counts = np.array([[np.sum((labels == i) & (noisy == j)) for j in range(4)] for i in range(4)])
    others = counts[~np.eye(4, dtype=bool)]
    assert others == pytest.approx(CASES * 0.3 / 12, rel=0.35)


def test_labels_are_turned_over_each_by_itself() -> None:
    labels = (np.arange(3 * CASES).reshape(CASES, 3) % 5 == 0).astype(np.int64)
    noisy = noisy_labels(Task("multi-label", ("a", "b", "c")), labels, 0.2, generators())
    turned = noisy != labels
    assert set(np.unique(noisy)) == {0, 1}
    assert turned.mean(axis=0) == pytest.approx(0.2, abs=0.025)
    assert np.corrcoef(turned.T)[0, 1] == pytest.approx(0, abs=0.06)


def test_training_labels_alone_are_changed_and_each_case_alike() -> None:
    data = load_digits_data(8, 0)
    noisy = with_label_noise(data, 0.25, 0)
    for part in ("val", "test"):
        assert noisy.splits[part] is data.splits[part]
    changed = noisy.train.labels != data.train.labels
    header, rows = noisy.tables["label_noise.csv"]
    assert header == ("case", "labels", "trained_with")
    assert [row[0] for row in rows] == [
        case for case, is_changed in zip(data.train.cases, changed, strict=True) if is_changed
    ]
    assert noisy.description["label_noise"] == {"rate": 0.25, "seed": 0, "cases_changed": int(changed.sum())}
    few = with_label_noise(replace(data, train=data.train.limited(200, 0)), 0.25, 0)
    whole = dict(zip(noisy.train.cases, noisy.train.labels.tolist(), strict=True))
    assert few.train.labels.tolist() == [whole[case] for case in few.train.cases]
    other = with_label_noise(data, 0.25, 1)
    assert not np.array_equal(other.train.labels, noisy.train.labels)
    assert with_label_noise(data, 0.0, 0) is data


def test_folds_train_on_the_same_noise_and_keep_what_they_test() -> None:
    images, labels = np.zeros((6, 1, 8, 8), dtype=np.uint8), np.array([0, 1, 0, 1, 0, 1])

    def part(rows: list[int]) -> Split:
        return Split(images[rows], labels[rows], [f"case {row}" for row in rows])

    rows = [[0, 1], [2, 3], [4, 5]]
    folds = tuple(
        ImageData("toy", Task("binary", ("no", "yes")), part(rows[k - 2]), part(rows[k - 1]), part(rows[k]))
        for k in range(3)
    )
    everything = part([0, 1, 2, 3, 4, 5])
    noisy = with_label_noise(replace(folds[0], train=everything, val=everything, test=everything, folds=folds), 0.6, 0)
    assert noisy.test.labels.tolist() == labels.tolist()
    found = {
        case: label for fold in noisy.folds for case, label in zip(fold.train.cases, fold.train.labels, strict=True)
    }
    changed = {row[0] for row in noisy.tables["label_noise.csv"][1]}
    assert changed == {case for case, label in found.items() if label != labels[int(case[-1])]}
    for before, after in zip(folds, noisy.folds, strict=True):
        assert after.val is before.val
        assert after.test is before.test


def test_a_run_records_its_noise_and_both_arms_see_it(tmp_path: Path) -> None:
    arguments = ["--epochs", "1", "--inmerge-epochs", "1", "--limit-train", "256", "--merge-prob", "0"]
    run = run_digits(tmp_path / "run", *arguments, "--label-noise", "0.4")
    noise = json.loads((run / "data.json").read_text())["label_noise"]
    with (run / "label_noise.csv").open() as file:
        assert len(list(csv.DictReader(file))) == noise["cases_changed"]
    assert noise["rate"] == 0.4
    baseline, inmerge = ((run / f"seed_0/{arm}/model.safetensors").read_bytes() for arm in ("baseline", "inmerge"))
    assert baseline == inmerge
    clean = run_digits(tmp_path / "clean", *arguments)
    assert (clean / "seed_0/baseline/model.safetensors").read_bytes() != baseline
    losses = []
    for folder in (run, clean):
        with (folder / "seed_0/baseline/metrics.csv").open() as file:
            losses.append(float(next(csv.DictReader(file))["train_loss"]))
    assert losses[0] > losses[1]
