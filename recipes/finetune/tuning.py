"""Arms whose settings are tuned before the trial: on validation images, and on seeds that the trial doesn't use."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from .data.images import ImageData
from .errors import InputError
from .grid import Trial, run_on_engine
from .judging.metrics import title_of
from .options import BASELINE, Options
from .reports.sweep import best_on_validation, mean_on_validation
from .runs.finished import FinishedRun
from .runs.sections import Section
from .training.arms import COMPACT, Arm, arm_of, smaller_name
from .trial import AddSections, check_trial

_TUNING = "-tuning"  # ends the name of the run folder of the grid, beside that of the trial


def run_tuned(trial: Trial) -> None:
    """Run a trial; with --tune the trial of its grid before it, whose best point takes the place of the bare arm."""
    options = trial.options
    if not options.tune and not options.tune_seeds:
        run_on_engine(trial)
        return
    base = _tuned_arm(options)
    check_trial(options)
    folder = trial.folder.with_name(trial.folder.name + _TUNING)
    run_on_engine(replace(trial, options=_grid(options, arm_of(base), folder), name=folder.name))
    best = best_on_validation(FinishedRun(folder))
    print(f"\n{best} is the best of --tune on validation: it takes the place of {base}")
    arms = tuple(best if arm == base else arm for arm in options.arms if arm != smaller_name(base, COMPACT))
    sections = partial(_with_tuning, folder=folder, add_sections=trial.add_sections)
    run_on_engine(replace(trial, options=replace(options, arms=arms), add_sections=sections))


def refuse_tuning(options: Options) -> None:
    """For recipes that don't run one trial."""
    if options.tune or options.tune_seeds:
        raise InputError(
            "--tune and --tune-seeds have no effect here: tune by the recipe of one trial, and give what "
            "was chosen in --arms"
        )


def _tuned_arm(options: Options) -> str:
    """The bare name of the arm that is tuned; an InputError where the options don't make a tuning."""
    if not options.tune or not options.tune_seeds:
        raise InputError("--tune and --tune-seeds, what is tuned and on which seeds, have no effect alone: give both")
    bases = {name.partition("@")[0] for name in options.tune}
    if len(bases) > 1 or not bases <= set(options.arms) - {BASELINE} or set(options.tune) & set(options.arms):
        raise InputError(
            f"--tune {' '.join(options.tune)} must be settings of one arm, which --arms has by its bare name alone: "
            "such as --arms baseline weight-decay --tune weight-decay@weight_decay=0.01 weight-decay@weight_decay=0.1"
        )
    shared = set(options.tune_seeds) & set(options.seeds)
    if shared:
        raise InputError(
            f"--tune-seeds {' '.join(map(str, sorted(shared)))} are among --seeds: an arm that was tuned on some seeds "
            "is compared on others"
        )
    return bases.pop()


def _grid(options: Options, arm: Arm, folder: Path) -> Options:
    """The options of the trial that tunes, which has none that only the other arms need."""
    return replace(
        options,
        arms=(BASELINE, *options.tune),
        seeds=options.tune_seeds,
        tune=(),
        tune_seeds=(),
        planned_seeds=None,
        merge_rounds=options.merge_rounds if arm.rounds else None,
        cooldown_epochs=options.cooldown_epochs if arm.criterion else 0,
        compact=options.compact and bool(arm.criterion),
        final_rounds=options.final_rounds if arm.criterion else None,
        output=folder,
        resume=options.resume or folder.exists(),
    )


def _with_tuning(
    run: FinishedRun, options: Options, data: ImageData, folder: Path, add_sections: AddSections | None
) -> list[Section]:
    return [tuning_section(FinishedRun(folder)), *(add_sections(run, options, data) if add_sections else [])]


def tuning_section(grid: FinishedRun) -> Section:
    """What was tried, what was chosen, and what it took."""
    metric, best = grid.summary["rule"]["metric"], best_on_validation(grid)
    points, seeds = grid.other_arms, " ".join(map(str, grid.seeds))
    text = (
        f"{best} was chosen of {len(points)} settings by the mean {title_of(metric)} on validation over seeds {seeds}, "
        f"which this trial does not use ({grid.folder.name}). The budget was {len(points) * len(grid.seeds)} stages of "
        f"{grid.options['inmerge_epochs']} epochs, and as many backbones as seeds; the other arms were not tuned."
    )
    rows = [[arm, f"{mean_on_validation(grid, arm):.4f}"] for arm in (BASELINE, *points)]
    return Section("Tuning", text, ("arm", f"{title_of(metric)} on validation"), rows)
