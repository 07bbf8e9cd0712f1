"""A sweep over merge settings: one trial whose arms are its points, and a trial of the chosen point on fresh seeds."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .data.images import ImageData
from .errors import InputError
from .grid import Trial, run_on_engine
from .options import BASELINE, Options
from .reports.chestxray14 import chestxray_sections
from .reports.own_images import own_sections
from .reports.sweep import best_on_validation
from .runs.finished import FinishedRun
from .sources.chestxray14 import check_chestxray14, load_chestxray14
from .sources.imagefolder import check_own_images, load_own_images, name_of
from .sources.named import check_dataset, load_dataset
from .sources.nih_labels import NAME as CHESTXRAY14
from .sources.nih_tree import read_boxes
from .sources.options import ChestXrayOptions, DatasetOptions, OwnImagesOptions
from .trial import AddSections

CONFIRMATION = "confirmation"  # its run folder, in that of the sweep


@dataclass(frozen=True)
class Data:
    """Where the images of a sweep come from, as the recipe for them has it.

    Attributes:
        check: refuses what can't be used, before anything is read.
        load: reads the images.
        name: of the data, for the run folder.
        sections: what the recipe adds to the report.
        main_first: as run_trial has it.
    """

    check: Callable[[Any], None]
    load: Callable[[Any], ImageData]
    name: Callable[[Any], str]
    sections: Callable[[Any], AddSections | None] = lambda options: None
    main_first: bool = False


def _chestxray_sections(options: ChestXrayOptions) -> AddSections:
    return partial(chestxray_sections, findings=read_boxes(options.data_dir) if options.data_dir else None)


_DATA: dict[type[Options], Data] = {
    DatasetOptions: Data(check_dataset, load_dataset, lambda options: options.dataset, main_first=True),
    ChestXrayOptions: Data(check_chestxray14, load_chestxray14, lambda options: CHESTXRAY14, _chestxray_sections),
    OwnImagesOptions: Data(check_own_images, load_own_images, name_of, lambda options: own_sections),
}


def data_of(options: type[Options]) -> Data:
    """The data that these options are about: sets of MedMNIST, ChestX-ray14, or one's own images."""
    return _DATA[options]


def run_sweep(options: Options, data: Data, confirm_seeds: tuple[int, ...]) -> None:
    """Run the trial of all points, and with confirm_seeds that of the best one on validation, on these alone."""
    shared = set(confirm_seeds) & set(options.seeds)
    if shared:
        raise InputError(
            f"--confirm-seeds {' '.join(map(str, sorted(shared)))} are among --seeds: a point that was chosen by some "
            "seeds is confirmed by others"
        )
    if getattr(options, "prepare_only", False):
        raise InputError("--prepare-only belongs to the recipe for these data: prepare by it, and leave it out here")
    data.check(options)
    run = options.output or Path("runs") / f"sensitivity-{data.name(options)}-{options.model}"
    _run(replace(options, output=run), data)
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
            ),
            data,
        )


def _run(options: Options, data: Data) -> None:
    load = partial(data.load, options)
    run_on_engine(Trial(options, load, options.output.name, data.main_first, data.sections(options)))
