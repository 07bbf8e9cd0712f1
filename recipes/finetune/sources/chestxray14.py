"""ChestX-ray14 as a source: its options, their check, and loading."""

from dataclasses import dataclass
from pathlib import Path

import datasets
import joblib

from ..data.catalogue import check_patients, hold_out
from ..data.images import ImageData
from ..data.prepared import prepared_data
from ..errors import InputError
from ..options import Options
from .nih_hub import read_nih_hub
from .nih_tree import read_nih_tree


@dataclass(kw_only=True)
class ChestXrayOptions(Options):
    """Fine-tune a timm CNN on ChestX-ray14, with and without in-model merging, from the same backbone."""

    hub: str | None = None
    """In place of --data-dir: a parquet data set on the hub such as timm/nih-chest-xray-14, or a folder of one."""
    hub_revision: str = "main"
    """Branch, tag or commit on the hub; the commit is recorded."""
    image_size: int = 224
    """Side of what the model sees of a prepared image: a random crop in training, the middle elsewhere."""
    prepare_size: int | None = None
    """Side that the images are prepared at. None: 8/7 of --image-size. Equal to --image-size: resized without crop."""
    prepared_dir: Path | None = None
    """Where prepared images are kept. None: beside the caches of the datasets library (HF_DATASETS_CACHE)."""
    prepare_workers: int | None = None
    """Processes that decode images while preparing. None: one per core."""
    prepare_only: bool = False
    """Prepare the images and stop. On several machines do this on each before the launch."""
    allow_missing: bool = False
    """Go on without images that are missing or can't be read."""
    val_fraction: float = 0.125
    """Share of the patients of the official training list that are held out for validation."""
    hflip: float = 0.5
    """Probability of a horizontal flip of a training image."""


def check_chestxray14(options: ChestXrayOptions) -> None:
    """Refuse options that contradict each other or are out of range."""
    if (options.data_dir is None) == (options.hub is None):
        raise InputError("give either --data-dir, the folder of NIH's files, or --hub, a parquet data set")
    if options.hub_revision != "main" and options.hub is None:
        raise InputError("--hub-revision has no effect without --hub: leave it out")
    if options.prepare_size is not None and options.prepare_size < options.image_size:
        raise InputError(
            f"--prepare-size {options.prepare_size} is less than --image-size {options.image_size}: choose a larger one"
        )
    if options.prepare_workers is not None and options.prepare_workers < 0:
        raise InputError(f"--prepare-workers must be at least 0, not {options.prepare_workers}")
    if not 0 < options.val_fraction < 1:
        raise InputError(f"--val-fraction must be between 0 and 1, not {options.val_fraction}")


def load_chestxray14(options: ChestXrayOptions) -> ImageData:
    """The official test list, and the other one split by patient, with the images prepared."""
    if options.hub is None:
        catalogue = read_nih_tree(options.data_dir, options.allow_missing)
    else:
        catalogue = read_nih_hub(options.hub, options.hub_revision)
    check_patients(catalogue)
    return prepared_data(
        hold_out(catalogue, "val", options.val_fraction, options.split_seed),
        prepared_dir=options.prepared_dir or Path(datasets.config.HF_DATASETS_CACHE) / "inmerge_optim",
        prepare_size=options.prepare_size or round(options.image_size * 8 / 7),
        image_size=options.image_size,
        workers=joblib.cpu_count() if options.prepare_workers is None else options.prepare_workers,
        allow_missing=options.allow_missing,
    )
