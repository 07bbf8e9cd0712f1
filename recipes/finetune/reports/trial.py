"""The sections that the report of every trial has. One is added to SECTIONS, and nowhere else."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..data.label_noise import NOISE_FILE
from ..data.twins import LEAK_FILE
from ..files import read_json
from ..judging.formatting import percent
from ..judging.metrics import has_auroc, title_of
from ..judging.summary import left_out, metric_in_words, metrics_of
from ..options import BASELINE, MARGIN_CHOSEN
from ..runs.finished import FinishedRun
from ..runs.layout import BACKBONE, TIMING
from ..runs.sections import Section
from .calls import calibration_section, calls_section
from .figures import CEILING, at_ceiling, pictures
from .merges import merges_section
from .smaller import smaller_section
from .style import SIGNED, interval_text, mean_text, number_text, range_text
from .sweep import sweep_section
from .verdicts import RULE, epochs_text, judged_difference, looks_text, margin_text, origin_text, plain_sentence

TIMES = "Time per stage"  # the one section that differs when a run is repeated, but for the times of smaller models

_NOT_SETTINGS = {
    MARGIN_CHOSEN,
    "resume",
    "config",
    "output",
    "data_dir",
    "workers",
    "tracker",
    "allow_other_versions",
    "prepared_dir",
    "prepare_workers",
    "engine",
    "ray_address",
    "cpus_per_task",
    "gpus_per_task",
}


def _answer(run: FinishedRun) -> Section:
    """One plain sentence on an arm, inmerge where there is one, the outcomes of the others, and the picture of all."""
    verdicts = sorted(run.summary["verdicts"], key=lambda found: found["arm"] != "inmerge")
    if not verdicts:
        return Section("Answer", "There is no arm beside the baseline.")
    by_outcome: dict[str, list[str]] = {}
    for found in verdicts[1:]:
        against = "" if found["reference"] == BASELINE else f" against {found['reference']}"
        by_outcome.setdefault(found["outcome"], []).append(f"{found['arm']}{against}")
    others = [f"{outcome}: {', '.join(arms)}" for outcome, arms in by_outcome.items()]
    text = plain_sentence(verdicts[0]) + (f"\n\nOf the others {'; '.join(others)}." if others else "")
    return Section("Answer", text, figures=pictures(run, "primary_difference"))


def _verdict(run: FinishedRun) -> Section:
    summary, verdicts = run.summary, run.summary["verdicts"]
    metric = metric_in_words(summary)
    sentences = [f"{found['sentence']}." for found in verdicts]
    kinds = [f"{words[0].upper()}{words[1:]}." for words in summary["intervals"].values() if words]
    notes = [RULE, margin_text(summary), looks_text(summary), " ".join(kinds)]
    header = (
        *(f"{metric} on test", "difference", "over seeds alone", f"over {summary['unit']} alone", "p", "Holm's p"),
        "smallest difference seen",
    )
    rows = []
    for found in verdicts:
        difference = judged_difference(summary, found)
        if difference is None:
            continue
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
    return Section("Verdict", text, header, rows)


def _trial(run: FinishedRun) -> Section:
    options, description = run.options, run.description
    seeds = f"{len(run.seeds)} seeds" if len(run.seeds) > 1 else "one seed"
    kept_by = "lowest validation loss" if options.get("keep_by") == "loss" else "best validation AUROC"
    if run.arms and not has_auroc(run.task, run.validation[run.arms[0]][0].labels):
        kept_by = "lowest validation log loss (validation has a single class, which leaves AUROC undefined)"
    text = (
        f"For {seeds}, a backbone stage of {options['epochs']} epochs from {origin_text(run)}, then each arm for "
        f"{options['inmerge_epochs']} epochs from the backbone's {options.get('start_from', 'last')} weights, on the "
        "same data in the same order. In "
        f"each arm the epoch with the {kept_by} is kept and scored on test; the last epoch stands beside it."
    )
    if run.folds:
        text += (
            f" This is done {run.folds} times, with other models each time: one fold is tested, the next chooses the "
            "epoch, and the others are trained on. The folds are the same for every seed. What the models predicted on "
            "the folds they were tested on is scored together, so that each seed scores every case; intervals and "
            "verdicts take this parting of the cases as given."
        )
    if options["recalibrate_bn"]:
        text += " Batch norm statistics were estimated anew on training images before each evaluation, in all arms."
    else:
        text += " Batch norm statistics were left as training had them (--recalibrate-bn was off)."
    if options["cooldown_epochs"]:
        text += f" The merging arms merged nothing in their last {options['cooldown_epochs']} epochs."
    if options["limit_train"]:
        text += f" Only {options['limit_train']:,} training images were used."
    if options.get("label_noise"):
        text += (
            f" Of the training labels {percent(options['label_noise'])} were replaced at random ({NOISE_FILE}); "
            "validation and test have their own."
        )
    return Section("The trial", text, *_split_table(description.get("splits", {})))


def _split_table(splits: dict[str, dict[str, Any]]) -> tuple[Sequence[str], list[list[str | None]]]:
    """A row for images, patients where they are known, and each class or label; a column per split."""
    counts = {"images": [split["images"] for split in splits.values()]}
    counts |= {"patients": [split["patients"] for split in splits.values()]}
    for name in dict.fromkeys(name for split in splits.values() for name in split.get("labels", {})):
        counts[f"of {name}"] = [split["labels"].get(name) for split in splits.values()]
    rows = [
        [name, *(None if number is None else f"{number:,}" for number in numbers)]
        for name, numbers in counts.items()
        if any(number is not None for number in numbers)
    ]
    return (("", *splits), rows) if splits else ((), [])


def _leaks(run: FinishedRun) -> Section | None:
    """What the splits share; runs that began before this was looked for in every data set say nothing."""
    description = run.description
    if "near_twins" not in description:
        return None
    none = "No image lies in two splits by its pixels, and no patient does where patients are known"
    found = [*description["leaks"], f"{LEAK_FILE} has all of them"] if description["leaks"] else [none]
    sentences = [*found, description["near_twins"]]
    return Section("Images in several splits", "\n\n".join(f"{sentence}." for sentence in sentences))


def _arms(run: FinishedRun) -> Section | None:
    if not run.arms:
        return None
    text = f"On test, at the epoch kept; {_over_seeds(run)}."
    if run.summary["diverged"]:
        text += " An arm that diverged in some seeds has its means over the others: compare by the differences."
    if positive := run.summary["positive"]:
        text += f" AUPRC, F1 and ECE are of the positive class, {positive}."
    absent = left_out(run.summary)
    if absent:
        text += f" Left out of the means, with one label only on test: {', '.join(absent)}."
    epochs: list[str | None] = ["epoch kept", *(epochs_text(run.summary, arm) for arm in run.arms)]
    rows = [epochs, *_rows_by_metric(run, run.summary)]
    return Section("The arms", text, ("", *run.arms), rows, pictures(run, "differences"))


def _last(run: FinishedRun) -> Section | None:
    if not run.arms:
        return None
    text = f"The same, had no epoch been chosen; {_over_seeds(run)}."
    return Section("The last epoch", text, ("", *run.arms), _rows_by_metric(run, run.summary["last"]))


def _over_seeds(run: FinishedRun) -> str:
    return "mean ± standard deviation over seeds" if len(run.seeds) > 1 else "one seed"


def _rows_by_metric(run: FinishedRun, figures: dict[str, Any]) -> list[list[str | None]]:
    """Per metric a row of all arms, and one of what they are from the baseline."""
    rows = []
    for metric in metrics_of(run.summary):
        rows.append([_title(run, metric), *(mean_text(figures["arms"][arm][metric]) for arm in run.arms)])
        if run.other_arms:
            apart = {arm: found[metric]["mean"] for arm, found in figures["differences"].items()}
            rows.append([f"minus {BASELINE}", *(number_text(apart.get(arm), SIGNED) for arm in run.arms)])
    return rows


def _intervals(run: FinishedRun) -> Section | None:
    """A row per metric, with each arm's mean and its interval over test cases."""
    if not run.arms:
        return None
    figures = run.summary["arms"]
    rows = [
        [_title(run, metric), *(_with_interval(figures[arm][metric]) for arm in run.arms)]
        for metric in metrics_of(run.summary)
        if figures[run.arms[0]][metric].get("bootstrap_low") is not None
    ]
    over = run.summary["intervals"]["bootstrap_low, bootstrap_high"]
    return Section("Intervals of each arm", f"Of the epochs kept, on test: the {over}.", ("metric", *run.arms), rows)


def _with_interval(figure: dict[str, Any]) -> str | None:
    found = range_text(figure.get("bootstrap_low"), figure.get("bootstrap_high"))
    return number_text(figure["mean"]) if found is None else f"{number_text(figure['mean'])} {found}"


def _title(run: FinishedRun, metric: str) -> str:
    return "weighted kappa (quadratic)" if metric == "kappa" and run.task.kind == "ordinal" else title_of(metric)


def _per_class(run: FinishedRun) -> Section | None:
    if not run.arms:
        return None
    figures = run.summary["per_class"]
    rows = []
    for name, metrics in figures[run.arms[0]].items():
        for metric in metrics:
            rows.append([name, title_of(metric), *(mean_text(figures[arm][name][metric]) for arm in run.arms)])
            if metric == "auroc" and run.other_arms:
                found = [figures[arm][name][metric].get("difference") for arm in run.arms]
                rows.append([name, f"minus {BASELINE}", *(_difference_text(difference) for difference in found)])
    of = "The positive class" if run.task.kind == "binary" else "Each label" if run.task.multi_label else "Each class"
    over = run.summary["intervals"]["bootstrap_low, bootstrap_high"]
    text = f"{of} on test, of the epochs kept. After a difference: the {over}, not adjusted for how many there are."
    return Section("Per class", text, ("class", "metric", *run.arms), rows)


def _difference_text(found: dict[str, Any] | None) -> str | None:
    return interval_text(found["mean"], (found["bootstrap_low"], found["bootstrap_high"])) if found else None


def settings_section(run: FinishedRun) -> Section:
    rows = [[name, value] for name, value in settings_of(run).items()]
    rows += [[f"{package} version", version] for package, version in run.versions["packages"].items()]
    for packages in run.versions.get("resumed_with", []):
        rows += [[f"{package} version, gone on with", version] for package, version in packages.items()]
    if "checkpoint" in run.versions:
        rows += [["checksum of --checkpoint", run.versions["checkpoint"]]]
    rows += [["Python version", run.versions["python"]]]
    rows += [[f"checksum of {name}", checksum] for name, checksum in run.versions["data"].items()]
    return Section("Settings and versions", "", ("setting", "value"), rows)


def settings_of(run: FinishedRun) -> dict[str, str]:
    """What the figures depend on beside data and versions: the options, and how the run was launched."""
    options = {name: value for name, value in run.options.items() if name not in _NOT_SETTINGS}
    flags = {f"--{name.replace('_', '-')}": _plain(value) for name, value in options.items()}
    return flags | {name: str(value) for name, value in run.versions["launch"].items()}


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _curves(run: FinishedRun) -> Section | None:
    if not run.arms:
        return None
    names, high = ("roc", "precision_recall", "reliability", "confusion"), at_ceiling(run)
    text = (
        f"ROC and precision-recall curves are drawn of the classes whose AUROC is below {CEILING:g} in an arm. At it "
        f"or above are: {', '.join(high)}."
        if high
        else ""
    )
    return Section("Curves on test", text, figures=pictures(run, *names))


def _times(run: FinishedRun) -> Section:
    """What the training of each stage took, over all seeds."""
    rows, reference = [], _seconds(run, BASELINE)
    for stage in (BACKBONE, *run.arms):
        seconds, epochs = _seconds(run, stage), _epochs(run, stage)
        compared = None if stage == BACKBONE or not reference else f"{seconds / reference:.2f}"
        rows.append([stage, str(epochs), f"{seconds:.1f}", f"{seconds / epochs:.2f}" if epochs else None, compared])
    text = "Training alone, without evaluation and checkpoints. An epoch that was begun again after a stop counts once."
    header = ("stage", "epochs", "seconds", "seconds per epoch", f"times {BASELINE}'s")
    return Section(TIMES, text, header, rows)


def _epochs(run: FinishedRun, stage: str) -> int:
    return sum(len(read_json(file)["training_seconds"]) for file in _timings(run, stage))


def _seconds(run: FinishedRun, stage: str) -> float:
    return sum(sum(read_json(file)["training_seconds"]) for file in _timings(run, stage))


def _timings(run: FinishedRun, stage: str) -> list[Path]:
    """timing.json of a stage's seeds, as far as they are there."""
    return [file for seed in run.seeds if (file := run.stage(seed, stage) / TIMING).exists()]


def _learning_curves(run: FinishedRun) -> Section | None:
    if not run.arms:
        return None
    return Section("Learning curves", figures=pictures(run, "learning_curves"))


# In the order of the report; the recipe's own and the settings follow them. None: there is nothing to tell.
SECTIONS: list[Callable[[FinishedRun], Section | None]] = [
    _answer,
    _verdict,
    sweep_section,
    smaller_section,
    _trial,
    _leaks,
    _arms,
    _intervals,
    calls_section,
    _per_class,
    calibration_section,
    _curves,
    merges_section,
    _learning_curves,
    _last,
    _times,
]
