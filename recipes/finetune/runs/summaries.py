"""summary.json and summary.csv."""

from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json, write_csv, write_json
from ..judging.summary import metrics_of
from .layout import SUMMARY, SUMMARY_TABLE


def write_summary(run: Path, summary: dict[str, Any]) -> None:
    """summary.csv, a row per arm, finished seed and scored epoch; then summary.json, by which the run is finished."""
    rows = []
    metrics = metrics_of(summary)
    for epoch, figures in (("best", summary), ("last", summary["last"])):
        for arm, scores in figures["arms"].items():
            for k, seed in enumerate(summary["seeds"]):
                if summary["epochs"][arm][k] is None:
                    continue  # it diverged
                rows.append([arm, seed, epoch, *(scores[metric]["values"][k] for metric in metrics)])
    write_csv(run / SUMMARY_TABLE, ["arm", "seed", "epoch", *metrics], rows)
    write_json(run / SUMMARY, summary)


def read_summary(run: Path) -> dict[str, Any] | None:
    """The summary of a finished run, or None."""
    path = run / SUMMARY
    try:
        return read_json(path) if path.exists() else None
    except InputError as error:
        raise InputError(f"{error}: delete it, and --resume makes it anew") from error
