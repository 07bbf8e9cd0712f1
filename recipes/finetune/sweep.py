"""A sweep over merge settings: one trial whose arms are its points, and a trial of the chosen point on fresh seeds."""

from dataclasses import replace
from pathlib import Path

from .errors import InputError
from .grid import run_on_engine
from .options import BASELINE, Options
from .recipe import trial_of
from .reports.sweep import best_on_validation
from .runs.finished import FinishedRun

CONFIRMATION = "confirmation"  # its run folder, in that of the sweep


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
    trial = trial_of(options)
    run = options.output or Path("runs") / f"{name}-{trial.name}"
    run_on_engine(replace(trial, options=replace(options, output=run), name=run.name))
    if confirm_seeds:
        best = best_on_validation(FinishedRun(run))
        print(f"\n{best} is the best point on validation: running it anew on --confirm-seeds")
        confirmation = replace(
            options,
            arms=(BASELINE, best),
            seeds=confirm_seeds,
            planned_seeds=None,
            output=run / CONFIRMATION,
            resume=options.resume or (run / CONFIRMATION).exists(),
        )
        run_on_engine(replace(trial, options=confirmation, name=CONFIRMATION))
