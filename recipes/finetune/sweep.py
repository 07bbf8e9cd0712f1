"""A sweep over merge settings: one trial whose arms are its points, and a trial of the chosen point on fresh seeds."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .errors import InputError
from .grid import Trial, run_on_engine
from .options import BASELINE, Options
from .reports.chestxray14 import chestxray_sections
from .reports.own_images import own_sections
from .reports.sweep import best_on_validation
from .runs.finished import FinishedRun
from .sources.kinds import KINDS
from .sources.nih_tree import read_boxes
from .sources.options import ChestXrayOptions, OwnImagesOptions
from .trial import AddSections

CONFIRMATION = "confirmation"  # its run folder, in that of the sweep


def _chestxray_sections(options: ChestXrayOptions) -> AddSections:
    return partial(chestxray_sections, findings=read_boxes(options.data_dir) if options.data_dir else None)


# What the recipe for some data adds to the report.
_SECTIONS: dict[type[Options], Callable[[Any], AddSections]] = {
    ChestXrayOptions: _chestxray_sections,
    OwnImagesOptions: lambda options: own_sections,
}


def run_sweep(name: str, options: Options, confirm_seeds: tuple[int, ...] = ()) -> None:
    """Run the trial of all points, and with confirm_seeds that of the best one on validation, on these alone.

    Args:
        name: what the run folder's begins with, by default.
    """
    shared = set(confirm_seeds) & set(options.seeds)
    if shared:
        raise InputError(
            f"--confirm-seeds {' '.join(map(str, sorted(shared)))} are among --seeds: a point that was chosen by some "
            "seeds is confirmed by others"
        )
    if getattr(options, "prepare_only", False):
        raise InputError("--prepare-only belongs to the recipe for these data: prepare by it, and leave it out here")
    kind = KINDS[type(options)]
    kind.check(options)
    run = options.output or Path("runs") / f"{name}-{kind.name(options)}-{options.model}"
    _run(replace(options, output=run))
    if confirm_seeds:
        best = best_on_validation(FinishedRun(run))
        print(f"\n{best} is the best point on validation: running it anew on --confirm-seeds")
        _run(
            replace(
                options,
                arms=(BASELINE, best),
                seeds=confirm_seeds,
                planned_seeds=None,
                output=run / CONFIRMATION,
                resume=options.resume or (run / CONFIRMATION).exists(),
            )
        )


def _run(options: Options) -> None:
    kind, sections = KINDS[type(options)], _SECTIONS.get(type(options))
    add_sections = sections and sections(options)
    run_on_engine(Trial(options, partial(kind.load, options), options.output.name, kind.main_first, add_sections))
