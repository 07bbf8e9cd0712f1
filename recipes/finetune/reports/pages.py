"""The report of a finished run, made from its folder alone: report.html, which stands by itself, and report.md.

A report is a list of sections; the templates know nothing of what is in them.
"""

import base64
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from ..files import write_text
from ..judging.metrics import METRIC_NAMES
from ..judging.summary import left_out, total_merges
from ..options import BASELINE, MARGIN_CHOSEN
from ..runs.finished import FinishedRun
from ..runs.layout import CARD, PLOTS, REPORT, WEIGHTS
from ..runs.sections import SIGNED, Section, interval_text, number_text, range_text
from .figures import (
    difference_legend,
    difference_rows,
    new_figure,
    write_figure,
    write_figures,
)
from .verdicts import RULE, judged_difference, looks_text, margin_text

_TEMPLATES = Path(__file__).with_name("templates")
_NOT_SETTINGS = {
    MARGIN_CHOSEN,
    "resume",
    "config",
    "output",
    "data_dir",
    "workers",
    "tracker",
    "prepared_dir",
    "prepare_workers",
}


def write_report(folder: Path) -> Path:
    """Write plots/, report.html, report.md and a model card per arm of a finished run; the path of report.html."""
    run = FinishedRun(folder)
    _write(folder / REPORT, f"{run.name}: does merging help here?", _sections(run, write_figures(run)))
    for seed in run.seeds:
        for arm in run.arms:
            card = _template("model_card.md.j2").render(_card(run, seed, arm))
            write_text(run.stage(seed, arm) / CARD, card)
    return folder / REPORT


def write_side_by_side(folders: Sequence[Path], path: Path) -> None:
    """Write one HTML file, and the same as Markdown, that sets several finished runs side by side."""
    runs = [FinishedRun(folder) for folder in folders]
    figure = _differences_of_runs(runs)
    picture = f"{PLOTS}/{path.stem}.png"
    write_figure(path.parent / picture, figure)
    sections = [
        Section(
            "Differences to the baseline on test",
            "Each run is a trial of its own: no test is made over them, and the more runs stand here, the likelier one "
            "of them differs by chance.",
            ("run", "arm", "metric", "baseline", "difference", "over seeds", "over the test set", "merged", "verdict"),
            [row for run in runs for row in _difference_rows_of(run)],
            [(picture, "Difference on test of every run and arm, with its intervals")],
        ),
        Section("Where the settings differ", "", ("setting", *_labels(runs)), _differing_settings(runs)),
    ]
    _write(path, "Runs side by side", sections)


def _sections(run: FinishedRun, figures: dict[str, tuple[str, str]]) -> list[Section]:
    def pictures(*names: str) -> list[tuple[str, str]]:
        return [figures[name] for name in names if name in figures]

    return [
        _verdict(run, pictures("differences")),
        _trial(run),
        _arms(run),
        _per_class(run),
        Section("Curves on test", figures=pictures("roc", "precision_recall", "reliability", "confusion")),
        _merges(run, pictures("merge_rates")),
        Section("Learning curves", figures=pictures("learning_curves")),
        *run.sections,
        _settings(run),
    ]


def _verdict(run: FinishedRun, figures: list[tuple[str, str]]) -> Section:
    summary, verdicts = run.summary, run.summary["verdicts"]
    metric = METRIC_NAMES[summary["rule"]["metric"]]
    sentences = [f"{found['sentence']}." for found in verdicts] or ["There is no arm beside the baseline."]
    kinds = [f"{words[0].upper()}{words[1:]}." for words in summary["intervals"].values() if words]
    notes = [RULE, margin_text(summary), looks_text(summary), " ".join(kinds)]
    header = (
        *(f"{metric} on test", "difference", "over seeds alone", f"over {summary['unit']} alone", "p", "Holm's p"),
        "smallest difference seen",
    )
    rows = []
    for found in verdicts:
        difference = judged_difference(summary, found)
        rows.append(
            [
                f"{found['arm']} - {found['reference']}",
                interval_text(difference["mean"], (difference["low"], difference["high"])),
                range_text(difference["t_low"], difference["t_high"]),
                range_text(difference["bootstrap_low"], difference["bootstrap_high"]),
                number_text(difference["p"], "{:.2g}"),
                number_text(difference["p_adjusted"], "{:.2g}"),
                number_text(found["smallest_detectable"], "{:.2g}"),
            ]
        )
    text = "\n\n".join([*sentences, *(note for note in notes if note)])
    if rows:
        text += (
            "\n\nThe smallest difference seen is the smallest true one that this trial finds four times out of five. "
            "Holm's p stands beside the verdicts and decides nothing."
        )
    return Section("Verdict", text, header, rows, figures)


def _trial(run: FinishedRun) -> Section:
    options, description = run.options, run.description
    seeds = f"{len(run.seeds)} seeds" if len(run.seeds) > 1 else "one seed"
    start = (
        f"weights from {Path(options['checkpoint']).name}"
        if options["checkpoint"]
        else "timm's pretrained weights"
        if options["pretrained"]
        else "random weights"
    )
    text = (
        f"For {seeds}, a backbone stage of {options['epochs']} epochs from {start}, then each arm for "
        f"{options['inmerge_epochs']} epochs from the backbone's last weights, on the same data in the same order. In "
        "each arm the epoch with the best validation AUROC is kept and scored on test; the last epoch stands beside it."
    )
    if options["recalibrate_bn"]:
        text += " Batch norm statistics were estimated anew on training images before each evaluation, in all arms."
    else:
        text += " Batch norm statistics were left as training had them (--recalibrate-bn was off)."
    if options["cooldown_epochs"]:
        text += f" The merging arms merged nothing in their last {options['cooldown_epochs']} epochs."
    if options["limit_train"]:
        text += f" Only {options['limit_train']} training images were used: this is a dry run."
    rows = [
        [part, f"{split['images']:,}", f"{split['patients']:,}"]
        for part, split in description.get("splits", {}).items()
    ]
    return Section("The trial", text, ("split", "images", "patients") if rows else (), rows)


def _arms(run: FinishedRun) -> Section:
    metrics = list(run.summary["arms"][BASELINE])
    header = ("arm", "epoch kept", *(METRIC_NAMES.get(metric, metric) for metric in metrics))
    rows = []
    for figures, last in ((run.summary, False), (run.summary["last"], True)):
        for arm, scores in figures["arms"].items():
            epochs = "last" if last else f"best ({', '.join(map(str, run.summary['epochs'][arm]))})"
            rows.append([arm, epochs, *(_mean(scores[metric]) for metric in metrics)])
        for arm, differences in figures["differences"].items():
            cells = (number_text(differences[metric]["mean"], SIGNED) for metric in metrics)
            rows.append([f"{arm} - {BASELINE}", "last" if last else "best", *cells])
    text = f"On test; {'mean ± standard deviation over seeds' if len(run.seeds) > 1 else 'one seed'}."
    absent = left_out(run.summary)
    if absent:
        text += f" Left out of the means, with one label only on test: {', '.join(absent)}."
    return Section("The arms", text, header, rows)


def _per_class(run: FinishedRun) -> Section:
    figures = run.summary["per_class"]
    metrics = ("auroc", "auprc", "f1")
    header = ["class", *(f"{METRIC_NAMES[metric]} {arm}" for metric in metrics for arm in run.arms)]
    header[1 + len(run.arms) : 1 + len(run.arms)] = [f"AUROC {arm} - {BASELINE}" for arm in run.other_arms]
    rows = []
    for name in figures[BASELINE]:
        cells = [[_mean(figures[arm][name][metric]) for arm in run.arms] for metric in metrics]
        differences = [figures[arm][name]["auroc"]["difference"] for arm in run.other_arms]
        cells[0] += [
            interval_text(found["mean"], (found["bootstrap_low"], found["bootstrap_high"])) for found in differences
        ]
        rows.append([name, *(cell for row in cells for cell in row)])
    of = "The positive class" if run.task.kind == "binary" else "Each label" if run.task.multi_label else "Each class"
    over = run.summary["intervals"]["bootstrap_low, bootstrap_high"]
    text = f"{of} on test, of the epochs kept. After a difference: the {over}, not adjusted for how many there are."
    return Section("Per class", text, header, rows)


def _merges(run: FinishedRun, figures: list[tuple[str, str]]) -> Section:
    if not run.merging_arms:
        return Section("Kernels merged", "No arm merges.")
    rows = []
    ranks = _effective_ranks(run, BASELINE)
    for arm in run.merging_arms:
        layers, table, own_ranks = run.summary["merges"][arm], run.merges(arm), _effective_ranks(run, arm)
        for layer, count in [*layers.items(), ("all", total_merges(layers))]:
            merged = table if layer == "all" else table[table["layer"] == layer]
            cosine = (merged["mean_cosine"] * merged["merged"]).sum() / count["merged"] if count["merged"] else None
            found = [number_text(values.get(layer), "{:.1f}") for values in (own_ranks, ranks)]
            counts = [f"{count['drawn']:,}", f"{count['merged']:,}", _share(count)]
            rows.append([arm, layer, *counts, number_text(cosine, "{:.3f}"), *found])
    text = (
        "Pairs of kernels drawn and merged in the arms' epochs, over all seeds, and the mean cosine of those merged. "
        "The effective rank of a layer's kernels is that after the arm's last epoch, beside the baseline's: merging "
        "that draws kernels together lowers it."
    )
    totals = [total_merges(run.summary["merges"][arm]) for arm in run.merging_arms]
    if all(1000 * count["merged"] < count["drawn"] for count in totals):
        text += " Fewer than one in a thousand merged: these runs are nearly plain baselines."
    header = ("arm", "layer", "drawn", "merged", "share", "mean cosine", "effective rank", f"{BASELINE}'s rank")
    return Section("Kernels merged", text, header, rows, figures)


def _effective_ranks(run: FinishedRun, arm: str) -> dict[str, float]:
    """Per layer after the last epoch of an arm, mean over seeds."""
    table = run.merges(arm)
    last = table[table["epoch"] == table["epoch"].max()]
    return last.groupby("layer")["effective_rank"].mean().to_dict()


def _settings(run: FinishedRun) -> Section:
    rows = [[name, value] for name, value in _settings_of(run).items()]
    rows += [[f"{package} version", version] for package, version in run.versions["packages"].items()]
    rows += [["Python version", run.versions["python"]]]
    rows += [[f"checksum of {name}", checksum] for name, checksum in run.versions["data"].items()]
    return Section("Settings and versions", "", ("setting", "value"), rows)


def _settings_of(run: FinishedRun) -> dict[str, str]:
    """What the figures depend on beside data and versions: the options, and how the run was launched."""
    options = {name: value for name, value in run.options.items() if name not in _NOT_SETTINGS}
    flags = {f"--{name.replace('_', '-')}": _plain(value) for name, value in options.items()}
    return flags | {name: str(value) for name, value in run.versions["launch"].items()}


def _card(run: FinishedRun, seed: int, arm: str) -> dict[str, Any]:
    """What the model card's template asks for."""
    scores, place = run.summary["arms"][arm], run.seeds.index(seed)
    return {
        "run": run,
        "arm": arm,
        "seed": seed,
        "weights": WEIGHTS,
        "size": run.options["image_size"] or run.options.get("source_size"),
        "epoch": run.summary["epochs"][arm][place],
        "scores": [
            (METRIC_NAMES.get(metric, metric), number_text(figure["values"][place]), _mean(figure))
            for metric, figure in scores.items()
        ],
        "verdicts": [
            found["sentence"] for found in run.summary["verdicts"] if arm in (found["arm"], found["reference"])
        ],
    }


def _difference_rows_of(run: FinishedRun) -> list[list[str | None]]:
    rows = []
    for found in _to_baseline(run):
        difference = judged_difference(run.summary, found)
        layers = run.summary["merges"].get(found["arm"])
        rows.append(
            [
                run.name,
                found["arm"],
                METRIC_NAMES[found["metric"]],
                _mean(run.summary["arms"][BASELINE][found["metric"]]),
                interval_text(difference["mean"], (difference["low"], difference["high"])),
                range_text(difference["t_low"], difference["t_high"]),
                range_text(difference["bootstrap_low"], difference["bootstrap_high"]),
                _share(total_merges(layers)) if layers else None,
                found["outcome"],
            ]
        )
    return rows


def _to_baseline(run: FinishedRun) -> list[dict[str, Any]]:
    return [found for found in run.summary["verdicts"] if found["reference"] == BASELINE]


def _differences_of_runs(runs: Sequence[FinishedRun]) -> Figure:
    rows = [
        (f"{label}\n{found['arm']}", judged_difference(run.summary, found))
        for label, run in zip(_labels(runs), runs, strict=True)
        for found in _to_baseline(run)
    ]
    figure, axes = new_figure(1.0 + 0.6 * len(rows))
    difference_rows(axes, rows)
    axes.set_xlabel("difference on test, arm minus baseline")
    difference_legend(figure)
    return figure


def _labels(runs: Sequence[FinishedRun]) -> list[str]:
    """The runs' names, with their folders where names are shared."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({run.folder.name})" for name, run in zip(names, runs, strict=True)
    ]


def _differing_settings(runs: Sequence[FinishedRun]) -> list[list[str]]:
    settings = [_settings_of(run) for run in runs]
    rows = [
        [name, *(found.get(name, "-") for found in settings)] for name in dict.fromkeys(k for s in settings for k in s)
    ]
    return [row for row in rows if any(left != right for left, right in pairwise(row[1:]))]


def _write(path: Path, title: str, sections: Sequence[Section]) -> None:
    """The same sections as HTML, with the pictures inside, and as Markdown, which refers to them."""

    def embedded(picture: str) -> str:
        return base64.b64encode((path.parent / picture).read_bytes()).decode("ascii")

    content = {"title": title, "sections": sections, "embedded": embedded}
    write_text(path, _template("report.html.j2").render(content))
    write_text(path.with_suffix(".md"), _template("report.md.j2").render(content))


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=name.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name)


def _share(count: dict[str, int]) -> str | None:
    return f"{count['merged'] / count['drawn']:.2%}" if count["drawn"] else None


def _mean(figure: dict[str, Any]) -> str | None:
    if figure["mean"] is None:
        return None
    return number_text(figure["mean"]) + ("" if figure["std"] is None else f" ± {figure['std']:.4f}")


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
