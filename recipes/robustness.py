"""Score finished runs on corrupted test images, on other parts of their data, and under attack; nothing is trained.

python recipes/robustness.py runs/pneumoniamnist-resnet18
python recipes/robustness.py runs/a runs/b --corruptions gaussian_noise jpeg_compression --attack-levels 1 2 4
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from finetune.errors import InputError, damage_told, exit_on_input_error
from finetune.options import whole

if TYPE_CHECKING:
    from finetune.robustness import Wanted


@dataclass(kw_only=True)
class RobustnessOptions:
    """Score the kept weights of finished runs on corrupted test images; what is scored already is not scored again."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders of the recipes."""
    corruptions: tuple[str, ...] = ()
    """Those to score on. None: all that MedMNIST-C names for the data set; a general set for other images."""
    attack_levels: tuple[float, ...] = ()
    """Also attack each model by its gradient (FGSM, PGD): how many of 255 grey levels a pixel may change by."""
    data_dir: Path | None = None
    """The folder with the data, where they have moved since the run."""
    prepared_dir: Path | None = None
    """Where the run's prepared images lie, where that is elsewhere than at the run."""
    corrupted_dir: Path | None = None
    """Where corrupted images are kept. None: beside the caches of the datasets library (HF_DATASETS_CACHE)."""
    keep: bool = True
    """Keep the corrupted images for other models and calls (5 times the test set for each corruption)."""


def main(argv: list[str] | None = None) -> None:
    """Score what these arguments name, by default those of the command line."""
    exit_on_input_error(lambda: _run(tyro.cli(RobustnessOptions, args=argv)))


def _run(options: RobustnessOptions) -> None:
    if not options.runs:
        raise InputError("no run folder is given: name one or more, as python recipes/robustness.py runs/NAME")
    if options.corrupted_dir and not options.keep:
        raise InputError("--corrupted-dir has no effect with --no-keep: leave out one of both")
    # Not before the options are read: --help and mistakes in them are answered at once.
    from finetune.robustness import Wanted, check_wanted, check_weights
    from finetune.runs.finished import FinishedRun
    from finetune.sources.options import default_prepared_dir

    places = {name: getattr(options, name) for name in ("data_dir", "prepared_dir", "corrupted_dir")}
    places = {name: path and whole(f"--{name.replace('_', '-')}", path) for name, path in places.items()}
    keep_in = (places.pop("corrupted_dir") or default_prepared_dir()) if options.keep else None
    wanted = Wanted(options.corruptions, options.attack_levels, places, keep_in)
    check_wanted(wanted)
    folders = [whole("a run folder", folder) for folder in options.runs]
    for folder in folders:  # all of them, before the first is scored
        with damage_told(folder):
            check_weights(FinishedRun(folder))
    for folder in folders:
        _score(folder, wanted)


def _score(folder: Path, wanted: "Wanted") -> None:
    from finetune.reports.pages import write_report
    from finetune.reports.robustness import robustness_sections, robustness_table
    from finetune.robustness import RunScorer, open_data, summarise_run
    from finetune.runs.finished import FinishedRun
    from finetune.runs.layout import REPORT, ROBUSTNESS
    from finetune.runs.lock import hold_run
    from finetune.runs.sections import write_sections
    from finetune.runs.summaries import write_summary

    with hold_run(folder):
        with damage_told(folder):
            run = FinishedRun(folder)
            scorer = RunScorer(run, *open_data(run, wanted), wanted)
        scorer.score()
        summary = summarise_run(scorer)
        write_sections(folder, robustness_sections(run, scorer.data, scorer.suite, summary), ROBUSTNESS)
        write_summary(folder, run.summary)
        write_report(run)
        print(f"\n{run.name}\n{robustness_table(summary)}\n\nReport: {folder / REPORT}, figures: {folder / ROBUSTNESS}")


if __name__ == "__main__":
    main()
