"""summary.json and summary.csv."""

from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json, write_csv, write_json
from ..options import BASELINE
from .layout import SUMMARY, SUMMARY_TABLE


def write_summary(run: Path, summary: dict[str, Any]) -> None:
    """summary.csv, a row per arm, seed and epoch scored; then summary.json, which marks the run as finished."""
    rows = []
    metrics = list(summary["arms"][BASELINE])
    for epoch, figures in (("best", summary), ("last", summary["last"])):
        for arm, scores in figures["arms"].items():
            for k, seed in enumerate(summary["seeds"]):
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
