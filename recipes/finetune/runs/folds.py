"""Cross-validation in the run folder: the stages of a seed's folds, joined into one that judging and reports read."""

import csv
from pathlib import Path
from typing import Any

import pandas as pd

from ..data.tasks import Task
from ..files import read_json, write_csv
from ..judging.metrics import choose, score
from .layout import BACKBONE, CURVES, FOLDS, MERGES, TIMING, WEIGHTS, last_part, predictions_file, stage_folder
from .results import Progress, read_predictions, read_whole_result, write_curves, write_result

PARTS = ("val", "test")


def join_folds(run: Path, seed: int, stage: str, folds: int, task: Task) -> None:
    """Make of the finished stages of all folds the stage of their seed.

    Its predictions are those of all folds on what each held out, its scores those of these predictions together, its
    curves the means over the folds, and its merges their sums. It has no weights but those of its folds, whose
    checksums it holds. What is written depends on the folds alone, so that a run killed in between writes it again.
    """
    stages = [stage_folder(run, seed, stage, fold) for fold in range(folds)]
    joined = stage_folder(run, seed, stage)
    joined.mkdir(parents=True, exist_ok=True)
    results = [read_whole_result(folder) for folder in stages]
    diverged = [result["diverged"] for result in results if "diverged" in result]
    if diverged:
        write_result(joined, None, {"diverged": diverged[0]})
        return
    write_curves(joined, _progress(stages))
    checksums = [[fold, result["files"][WEIGHTS]] for fold, result in enumerate(results)]
    write_csv(joined / FOLDS, ("fold", "weights_sha256"), checksums)
    if stage == BACKBONE:
        return
    for part in (*PARTS, *map(last_part, PARTS)):
        _join_tables([folder / predictions_file(part) for folder in stages], joined / predictions_file(part))
    result = {
        "epoch": [result["epoch"] for result in results],
        "kept": _scores(joined, task, *PARTS),
        "last": _scores(joined, task, *map(last_part, PARTS)),
        "merges": _summed([result["merges"] for result in results]),
    }
    write_result(joined, None, result)


def _scores(folder: Path, task: Task, val_part: str, test_part: str) -> dict[str, dict[str, float | None]]:
    val, test = read_predictions(folder, val_part), read_predictions(folder, test_part)
    chosen = choose(task, val.labels, val.probabilities)
    return {
        part: score(task, found.labels, found.probabilities, chosen)
        for part, found in zip(PARTS, (val, test), strict=True)
    }


def _join_tables(paths: list[Path], joined: Path) -> None:
    """The rows of all, one table after the other, as they are written."""
    tables = []
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            tables.append(list(csv.reader(file)))
    write_csv(joined, tables[0][0], [row for table in tables for row in table[1:]])


def _progress(stages: list[Path]) -> Progress:
    seconds = [read_json(folder / TIMING)["training_seconds"] for folder in stages]
    return Progress(
        metrics=_rows(pd.concat([pd.read_csv(folder / CURVES) for folder in stages]).groupby("epoch").mean()),
        merges=_merges([pd.read_csv(folder / MERGES) for folder in stages if (folder / MERGES).exists()]),
        seconds=[sum(of_epoch) for of_epoch in zip(*seconds, strict=True)],
    )


def _merges(tables: list[pd.DataFrame]) -> list[list[Any]]:
    if not tables:
        return []
    table = pd.concat(tables)
    table["cosines"] = table["mean_cosine"] * table["merged"]  # not known where nothing merged
    of_layer = table.groupby(["epoch", "layer"], sort=False)
    joined = of_layer[["drawn", "merged"]].sum()
    joined["mean_cosine"] = of_layer["cosines"].sum() / joined["merged"].where(joined["merged"] > 0)
    joined[["effective_rank", "displacement"]] = of_layer[["effective_rank", "displacement"]].mean()
    return _rows(joined)


def _rows(table: pd.DataFrame) -> list[list[Any]]:
    """The rows of a table with its index, without what is not known."""
    plain = table.reset_index().astype(object)
    return plain.where(plain.notna(), None).to_numpy().tolist()


def _summed(merges: list[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    return {
        layer: {kind: sum(found[layer][kind] for found in merges) for kind in counts}
        for layer, counts in merges[0].items()
    }
