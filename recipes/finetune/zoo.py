"""What a zoo's trials say together: expected against counted merges, one table, one picture."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import nn

from inmerge_optim import similarity_profile

from .data.images import ImageData
from .errors import InputError, damage_told
from .files import GENERATOR, check_written_here, read_json, storage_errors, write_csv, write_json, write_text
from .judging.formatting import bounds, percent, with_bounds
from .judging.intervals import LEVEL
from .judging.metrics import title_of
from .judging.pooling import Pooled, holm, pool
from .judging.summary import total_merges
from .options import BASELINE, Options
from .reports.style import (
    NO_DIFFERENCE,
    difference_legend,
    difference_rows,
    interval_text,
    new_figure,
    number_text,
    plain_text,
    range_text,
    write_figure,
)
from .runs.finished import FinishedRun, current_summary
from .runs.layout import BACKBONE, CONFIG, SUMMARY, TIMING, WEIGHTS
from .runs.sections import Section
from .training.arms import arm_of, merge_settings
from .training.models import load_model

TABLE, PAGE, PICTURE = "zoo.csv", "zoo.md", "zoo.png"
EXPECTED = "expected_merges.json"
FAMILY = "family.json"
POOLED = "pooled.json"
ERROR_SUFFIX = ".error.json"
_COLUMNS = (
    *("dataset", "model", "arm", "skip_layers", "seeds", "metric", "positive", "baseline", "value", "outcome"),
    *("difference", "low", "high", "p", "p_adjusted", "t_low", "t_high", "bootstrap_low", "bootstrap_high"),
    *("drawn", "merged", "merge_rate", "expected_merges", "cost"),
)
_FIGURES = ("mean", "standard_error", "low", "high", "p", "t_low", "t_high", "bootstrap_low", "bootstrap_high")
_HEADER = (
    *("data", "model", "arm", "baseline", "difference", "over seeds alone", "over the test set alone", "verdict"),
    *("Holm's p", "merge rate", "merged", "expected", "cost"),
)
_LEGEND = f"""\
On test, at the epoch that is best on validation. difference: arm minus baseline, mean over seeds, with its
{percent(LEVEL)} interval over seeds and test cases; beside it the paired t interval over seeds (training noise) and
the bootstrap interval over test cases (test-set noise). verdict: of that trial alone. Holm's p: within the comparisons
that the zoo was begun with, whatever else stands here. merged: pairs, over all seeds; expected: what the weights at the
start of the arm promise for as many draws; training changes them meanwhile. cost: time of the arm's training over the
baseline's.
"""


def declare_family(zoo: Path, members: Sequence[str]) -> None:
    """Record which comparisons share one error, once, before any of them is made; see `member`."""
    with FileLock(zoo / "zoo.lock"):
        if not (zoo / FAMILY).exists():
            write_json(zoo / FAMILY, list(members))


def member(dataset: str, model: str, arm: str) -> str:
    """The name of a comparison in the family."""
    return f"{dataset}-{model}-{arm}"


def count_expected_merges(run: FinishedRun, options: Options, data: ImageData) -> list[Section]:
    """Predict each arm's merges from the backbones' weights for the pairs that it drew; kept in EXPECTED as well."""
    expected: dict[str, dict[str, float]] = {}
    for seed in run.finished_seeds(BACKBONE):
        model = load_model(options, data, run.stage(seed, BACKBONE) / WEIGHTS)
        for arm in run.merging_arms:
            if arm not in run.results[seed]:
                continue
            if arm_of(arm).criterion == "dissimilar":
                continue
            shares = _expected_shares(model, merge_settings(arm_of(arm), options))
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


def check_zoo(zoo: Path) -> None:
    """Refuse a folder whose tables and picture are not a zoo's."""
    check_written_here(zoo / TABLE, ",".join(_COLUMNS[:3]).encode())
    check_written_here(zoo / PAGE)
    check_written_here(zoo / PICTURE)


def write_zoo(zoo: Path) -> str:
    """Make zoo.csv, zoo.md, zoo.png and pooled.json of all cells in a zoo's folder, whoever ran them; return zoo.md.

    One process at a time, so that the last of several jobs to end leaves the table of all of them. A cell that can't be
    read is named, and the others have their rows.
    """
    with storage_errors(zoo):
        zoo.mkdir(parents=True, exist_ok=True)
    with FileLock(zoo / "zoo.lock"):
        rows, notes = [], []
        for cell in (path.parent for path in sorted(zoo.glob(f"*/{CONFIG}"))):
            try:
                with damage_told(cell):
                    rows += _rows(cell)
            except InputError as error:
                notes.append(f"- {cell.name}: not in the table, {error}")
        _adjust(zoo, rows)
        write_csv(zoo / TABLE, _COLUMNS, [_cells(row) for row in rows])
        pooled = {arm: _pool([row for row in rows if row["arm"] == arm]) for arm in _unique(rows, "arm")}
        write_json(zoo / POOLED, {arm: asdict(p) for arm, p in pooled.items() if isinstance(p, Pooled)})
        text = _markdown(rows, [*notes, *_notes(zoo)], pooled)
        write_text(zoo / PAGE, text)
        if rows:
            _draw(zoo / PICTURE, rows)
    return text


def _adjust(zoo: Path, rows: list[dict[str, Any]]) -> None:
    """Put Holm's p into the rows: within the declared family, and none for what was added to it."""
    found = {member(row["dataset"], row["model"], row["arm"]): row for row in rows if row["outcome"] != "diverged"}
    declared = map(str, read_json(zoo / FAMILY, list)) if (zoo / FAMILY).exists() else []
    adjusted = holm({name: found[name]["difference"]["p"] if name in found else None for name in declared})
    for row in rows:
        row["p_adjusted"] = adjusted.get(member(row["dataset"], row["model"], row["arm"]))


def _pool(rows: list[dict[str, Any]]) -> Pooled | str:
    """One arm's difference over data sets, or why there is none."""
    metrics = _unique(rows, "metric")
    if len(metrics) > 1:
        return f"the trials have different primary metrics ({', '.join(metrics)})"
    broken = [f"{row['dataset']}-{row['model']}" for row in rows if row["outcome"] == "diverged"]
    if broken:
        return f"training diverged in {', '.join(broken)}, so that what is left is no fair sample"
    errors = [row["difference"]["standard_error"] for row in rows]
    if None in errors:
        return "some trials have one seed, or a test set that leaves the metric undefined"
    try:
        return pool([row["difference"]["mean"] for row in rows], errors, [row["dataset"] for row in rows])
    except ValueError as reason:
        return str(reason)


def _unique(rows: list[dict[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _rows(cell: Path) -> list[dict[str, Any]]:
    """A row per arm of a finished cell beside the baseline."""
    summary = current_summary(cell)
    if summary is None:
        return []
    run, metric = FinishedRun(cell), summary["rule"]["metric"]
    # Not there where another recipe has finished the trial.
    expected = read_json(cell / EXPECTED) if (cell / EXPECTED).exists() else {}
    arms = summary["arms"]
    rows = []
    for found in (found for found in summary["verdicts"] if found["reference"] == BASELINE):
        arm = found["arm"]
        difference = summary["differences"].get(arm, {}).get(metric, NO_DIFFERENCE)
        drawn, merged = total_merges(summary["merges"].get(arm, {})).values()
        rows.append(
            {
                "dataset": run.options["dataset"],
                "model": run.options["model"],
                "arm": arm,
                "skip_layers": run.options["skip_layers"],
                "seeds": len(summary["seeds"]),
                "metric": metric,
                "positive": summary["positive"],
                "baseline": _number(arms[BASELINE][metric]["mean"]) if BASELINE in arms else None,
                "value": _number(arms[arm][metric]["mean"]) if arm in arms else None,
                "outcome": found["outcome"],
                "difference": {name: _number(difference.get(name)) for name in _FIGURES}
                | {"values": [_number(value) for value in difference["values"]]},
                "drawn": drawn,
                "merged": merged,
                "merge_rate": merged / drawn if drawn else None,
                "expected_merges": sum(expected[arm].values()) if arm in expected else None,
                "cost": _cost(run, arm),
            }
        )
    return rows


def _number(value: float | None) -> float | None:
    """A figure of a summary that anyone may have written."""
    return None if value is None else float(value)


def _cost(run: FinishedRun, arm: str) -> float | None:
    """Time of an arm's training over the baseline's, which makes as many steps on the same images.

    Over the seeds that both finished; None without any.
    """
    seeds = set(run.finished_seeds(arm)) & set(run.finished_seeds(BASELINE))

    def seconds(stage: str) -> float:
        files = (run.stage(seed, stage) / TIMING for seed in seeds)
        return sum(sum(read_json(file)["training_seconds"]) for file in files)

    reference = seconds(BASELINE)
    return seconds(arm) / reference if reference else None


def _cells(row: dict[str, Any]) -> list[Any]:
    difference = row["difference"]
    flat = row | difference | {"difference": difference["mean"], "p_adjusted": row["p_adjusted"]}
    return [flat[column] for column in _COLUMNS]


def _markdown(rows: list[dict[str, Any]], notes: list[str], pooled: dict[str, Pooled | str]) -> str:
    metrics = ", ".join(title_of(metric) for metric in _unique(rows, "metric"))
    table = [_line(_HEADER), _line(["---"] * len(_HEADER)), *(_line(_texts(row)) for row in rows)]
    lines = [f"<!-- by {GENERATOR} -->", f"# Model zoo{f', {metrics}' if metrics else ''}", "", *table, ""]
    over_datasets = [f"- {arm}: {_pooled_text(found)}" for arm, found in pooled.items()]
    if over_datasets:
        over_datasets = ["## Over data sets", "", *over_datasets, ""]
    plain = [plain_text(note) for note in notes]
    return "\n".join([*lines, *plain, *([""] if notes else []), *over_datasets, _LEGEND])


def _notes(zoo: Path) -> list[str]:
    """What is to be said of cells that have no row: those that failed, and those that are not finished."""
    errors = errors_of(zoo)
    begun = (path.parent for path in sorted(zoo.glob(f"*/{CONFIG}")))
    unfinished = [cell.name for cell in begun if cell.name not in errors and not (cell / SUMMARY).exists()]
    return [
        *(f"- {name}: failed, {error}" for name, error in errors.items()),
        *(f"- {name}: begun, not finished" for name in unfinished),
    ]


def _pooled_text(found: Pooled | str) -> str:
    if isinstance(found, str):
        return f"not pooled, {found}"
    return (
        f"{with_bounds(found.mean, found.low, found.high)} over {found.datasets} data sets ({percent(LEVEL)}, Hartung "
        f"and Knapp); on one more data set {bounds(found.prediction_low, found.prediction_high)}; tau squared between "
        f"data sets {found.tau_squared:.2g}"
    )


def _line(cells: Iterable[str]) -> str:
    texts = [plain_text(cell).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(texts)} |"


def _texts(row: dict[str, Any]) -> list[str]:
    difference = row["difference"]
    dataset = f"{row['dataset']} (positive: {row['positive']})" if row["positive"] else row["dataset"]
    cells = [
        *(dataset, row["model"], row["arm"], number_text(row["baseline"], "{:.4f}")),
        interval_text(difference["mean"], (difference["low"], difference["high"])),
        range_text(difference["t_low"], difference["t_high"]),
        range_text(difference["bootstrap_low"], difference["bootstrap_high"]),
        row["outcome"],
        number_text(row["p_adjusted"], "{:.2g}"),
        None if row["merge_rate"] is None else percent(row["merge_rate"], 2),
        str(row["merged"]) if row["drawn"] else None,
        number_text(row["expected_merges"], "{:.0f}"),
        number_text(row["cost"], "{:.2f}"),
    ]
    return ["-" if cell is None else cell for cell in cells]


def _draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """The differences, a panel per data set."""
    datasets, several = _unique(rows, "dataset"), len(_unique(rows, "arm")) > 1
    grouped = {name: [row for row in rows if row["dataset"] == name] for name in datasets}
    heights = [len(group) + 0.6 for group in grouped.values()]
    figure, panels = new_figure(
        0.42 * sum(heights) + 1.2, len(datasets), 1, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axes, (name, group) in zip(panels.flat, grouped.items(), strict=True):
        labels = [f"{row['model']}, {row['arm']}" if several else row["model"] for row in group]
        difference_rows(axes, list(zip(labels, (row["difference"] for row in group), strict=True)))
        axes.set_title(name, fontsize="medium", loc="left")
    panels.flat[-1].set_xlabel(
        f"test {title_of(rows[0]['metric'])}, {'arm' if several else rows[0]['arm']} minus baseline"
    )
    difference_legend(figure)
    write_figure(path, figure)


def error_file(cell: Path) -> Path:
    """Where a cell's error is told: beside its folder, which may not be there."""
    return cell.with_name(cell.name + ERROR_SUFFIX)


def errors_of(zoo: Path) -> dict[str, str]:
    """The error of each failed cell, by the cell's name."""
    errors = {}
    for path in sorted(zoo.glob(f"*{ERROR_SUFFIX}")):
        try:
            reason = str(read_json(path)["error"])
        except (InputError, KeyError):
            reason = f"{path.name} can't be read"
        errors[path.name.removesuffix(ERROR_SUFFIX)] = reason
    return errors
