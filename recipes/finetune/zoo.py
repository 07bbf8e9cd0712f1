"""What a zoo's trials say together: expected against counted merges, one table, one picture."""

import json
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import nn

from inmerge_optim import similarity_profile

from .data.images import ImageData
from .files import write_csv, write_json, write_text
from .judging.intervals import LEVEL, holm
from .judging.summary import total_merges
from .options import BASELINE, Options
from .reports.style import (
    SIGNED,
    difference_legend,
    difference_rows,
    new_figure,
    number_text,
    range_text,
    write_figure,
)
from .runs.finished import FinishedRun, current_summary
from .runs.layout import BACKBONE, CONFIG, SUMMARY, TIMING, WEIGHTS
from .runs.sections import Section
from .training.arms import ARMS, merge_settings
from .training.models import load_model

EXPECTED = "expected_merges.json"
ERROR_SUFFIX = ".error.json"
_COLUMNS = (
    *("dataset", "model", "arm", "skip_layers", "seeds", "baseline_auroc", "auroc"),
    *("difference", "low", "high", "p", "p_adjusted", "bootstrap_low", "bootstrap_high"),
    *("drawn", "merged", "merge_rate", "expected_merges", "cost"),
)
_HEADER = (
    *("data", "model", "arm", "baseline AUROC", "difference", "over seeds", "over the test set", "adjusted p"),
    *("merge rate", "merged", "expected", "cost"),
)
_LEGEND = f"""\
Test AUROC at the epoch that is best on validation. difference: arm minus baseline, mean over seeds, with its
{LEVEL:.0%} paired t interval over seeds (training noise) and its bootstrap interval over test cases (test-set noise).
adjusted p: of the t test, by Holm over all rows. merged: pairs, over all seeds; expected: what the weights at the start
of the arm promise for as many draws; training changes them meanwhile. cost: time of the arm's training over the
baseline's.
"""


def count_expected_merges(run: FinishedRun, options: Options, data: ImageData) -> list[Section]:
    """Predict each arm's merges from the backbones' weights for the pairs that it drew; kept in EXPECTED as well."""
    expected: dict[str, dict[str, float]] = {}
    for seed in run.seeds:
        model = load_model(options, data, run.stage(seed, BACKBONE) / WEIGHTS)
        for arm in run.merging_arms:
            if ARMS[arm].criterion == "dissimilar":
                continue
            shares = _expected_shares(model, merge_settings(ARMS[arm], options))
            layers = expected.setdefault(arm, {})
            for layer, count in run.results[seed][arm]["merges"].items():
                layers[layer] = layers.get(layer, 0.0) + count["drawn"] * shares.get(layer, 0.0)
    write_json(run.folder / EXPECTED, expected)
    rows = [
        [arm, layer, *map(str, run.summary["merges"][arm][layer].values()), f"{value:.1f}"]
        for arm, layers in expected.items()
        for layer, value in layers.items()
    ]
    text = "Expected is what the weights at the start of the arms promise for as many draws, over all seeds."
    header = ("arm", "layer", "drawn", "merged", "expected")
    return [Section("Expected and counted merges", text, header, rows)] if rows else []


def _expected_shares(model: nn.Module, settings: dict[str, Any]) -> dict[str, float]:
    """Per layer what share of the drawn pairs would merge, by the weights as they are."""
    wanted = ("skip_layers", "merge_prob", "similarity_threshold")
    profiles = similarity_profile(model, **{name: settings[name] for name in wanted})
    return {found.name: found.expected_merges / found.expected_draws for found in profiles if found.expected_draws}


def write_zoo(zoo: Path) -> str:
    """Make zoo.csv, zoo.md and zoo.png of all cells in a zoo's folder, whoever ran them, and return zoo.md.

    One process at a time, so that the last of several jobs to end leaves the table of all of them.
    """
    with FileLock(zoo / "zoo.lock"):
        rows = [row for cell in sorted(zoo.glob(f"*/{CONFIG}")) for row in _rows(cell.parent)]
        adjusted = holm({str(place): row["difference"]["p"] for place, row in enumerate(rows)})
        for place, row in enumerate(rows):
            row["p_adjusted"] = adjusted[str(place)]
        write_csv(zoo / "zoo.csv", _COLUMNS, [_cells(row) for row in rows])
        text = _markdown(zoo, rows)
        write_text(zoo / "zoo.md", text)
        if rows:
            _draw(zoo / "zoo.png", rows)
    return text


def _rows(cell: Path) -> list[dict[str, Any]]:
    """A row per arm of a finished cell beside the baseline."""
    summary = current_summary(cell)
    if summary is None:
        return []
    run = FinishedRun(cell)
    # Not there where another recipe has finished the trial.
    expected = json.loads((cell / EXPECTED).read_text(encoding="utf-8")) if (cell / EXPECTED).exists() else {}
    rows = []
    for arm in run.other_arms:
        drawn, merged = total_merges(summary["merges"].get(arm, {})).values()
        rows.append(
            {
                "dataset": run.options["dataset"],
                "model": run.options["model"],
                "arm": arm,
                "skip_layers": run.options["skip_layers"],
                "seeds": len(run.seeds),
                "baseline_auroc": summary["arms"][BASELINE]["auroc"]["mean"],
                "auroc": summary["arms"][arm]["auroc"]["mean"],
                "difference": summary["differences"][arm]["auroc"],
                "drawn": drawn,
                "merged": merged,
                "merge_rate": merged / drawn if drawn else None,
                "expected_merges": sum(expected[arm].values()) if arm in expected else None,
                "cost": _cost(run, arm),
            }
        )
    return rows


def _cost(run: FinishedRun, arm: str) -> float | None:
    """Time of an arm's training over the baseline's, which makes as many steps on the same images."""

    def seconds(stage: str) -> float:
        files = (run.stage(seed, stage) / TIMING for seed in run.seeds)
        return sum(sum(json.loads(file.read_text(encoding="utf-8"))["training_seconds"]) for file in files)

    reference = seconds(BASELINE)
    return seconds(arm) / reference if reference else None


def _cells(row: dict[str, Any]) -> list[Any]:
    difference = row["difference"]
    flat = row | difference | {"difference": difference["mean"], "p_adjusted": row["p_adjusted"]}
    return [flat[column] for column in _COLUMNS]


def _markdown(zoo: Path, rows: list[dict[str, Any]]) -> str:
    lines = ["# Model zoo", "", _line(_HEADER), _line(["---"] * len(_HEADER)), *(_line(_texts(row)) for row in rows)]
    notes = [f"- {name}: failed, {error}" for name, error in errors_of(zoo).items()]
    failed = set(errors_of(zoo))
    begun = (cell.parent for cell in sorted(zoo.glob(f"*/{CONFIG}")))
    notes += [
        f"- {cell.name}: begun, not finished"
        for cell in begun
        if cell.name not in failed and not (cell / SUMMARY).exists()
    ]
    return "\n".join([*lines, "", *notes, *([""] if notes else []), _LEGEND])


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _texts(row: dict[str, Any]) -> list[str]:
    difference = row["difference"]
    cells = [
        *(row["dataset"], row["model"], row["arm"], number_text(row["baseline_auroc"], "{:.4f}")),
        number_text(difference["mean"], SIGNED),
        range_text(difference["low"], difference["high"]),
        range_text(difference["bootstrap_low"], difference["bootstrap_high"]),
        number_text(row["p_adjusted"], "{:.2g}"),
        number_text(row["merge_rate"], "{:.2%}"),
        str(row["merged"]) if row["drawn"] else None,
        number_text(row["expected_merges"], "{:.0f}"),
        number_text(row["cost"], "{:.2f}"),
    ]
    return ["-" if cell is None else cell for cell in cells]


def _draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """The differences, a panel per data set."""
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    several = len({row["arm"] for row in rows}) > 1
    grouped = {name: [row for row in rows if row["dataset"] == name] for name in datasets}
    heights = [len(group) + 0.6 for group in grouped.values()]
    figure, panels = new_figure(
        0.42 * sum(heights) + 1.2, len(datasets), 1, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axes, (name, group) in zip(panels.flat, grouped.items(), strict=True):
        labels = [f"{row['model']}, {row['arm']}" if several else row["model"] for row in group]
        difference_rows(axes, list(zip(labels, (row["difference"] for row in group), strict=True)))
        axes.set_title(name, fontsize="medium", loc="left")
    panels.flat[-1].set_xlabel(f"test AUROC, {'arm' if several else rows[0]['arm']} minus baseline")
    difference_legend(figure)
    write_figure(path, figure)


def error_file(cell: Path) -> Path:
    """Where a cell's error is told: beside its folder, which may not be there."""
    return cell.with_name(cell.name + ERROR_SUFFIX)


def errors_of(zoo: Path) -> dict[str, str]:
    """The error of each failed cell, by the cell's name."""
    return {
        path.name.removesuffix(ERROR_SUFFIX): json.loads(path.read_text(encoding="utf-8"))["error"]
        for path in sorted(zoo.glob(f"*{ERROR_SUFFIX}"))
    }
