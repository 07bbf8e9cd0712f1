"""ChestX-ray14 as a source: its options, their check, and loading."""

import csv
from dataclasses import replace
from pathlib import Path

from ..data.catalogue import PARTS, Catalogue
from ..data.images import ImageData
from ..data.prepared import prepared_data
from ..data.splits import check_patients, given_split, hold_out
from ..data.squares import Form
from ..errors import InputError
from ..files import regular_file, sha256_of
from .nih_hub import read_nih_hub
from .nih_tree import read_nih_tree
from .options import ChestXrayOptions
from .preparing import check_preparing


def check_chestxray14(options: ChestXrayOptions) -> None:
    """Refuse options that contradict each other or are out of range."""
    if (options.data_dir is None) == (options.hub is None):
        raise InputError(
            "give either --data-dir, the folder of NIH's files, or --hub, a parquet data set such as "
            "timm/nih-chest-xray-14"
        )
    check_preparing(options)
    if not 0 < options.val_fraction < 1:
        raise InputError(f"--val-fraction must be between 0 and 1, not {options.val_fraction}")
    if options.split_file is not None and not regular_file(options.split_file):
        raise InputError(f"--split-file {options.split_file} is no file: give a CSV of images and their splits")


def load_chestxray14(options: ChestXrayOptions) -> ImageData:
    """The official test list, and the other one split by patient, or a split of one's own; with the images prepared."""
    if options.hub is None:
        catalogue = read_nih_tree(options.data_dir, options.allow_missing)
    else:
        catalogue = read_nih_hub(options.hub, options.hub_revision)
    data = prepared_data(
        _split(catalogue, options),
        Form(options.side, grey=True),
        prepared_dir=options.prepared_in,
        image_size=options.image_size,
        workers=options.processes,
        allow_missing=options.allow_missing,
    )
    return replace(data, suite="chestmnist")  # the same radiographs


def _split(catalogue: Catalogue, options: ChestXrayOptions) -> Catalogue:
    """With the patients of no part in another one."""
    if options.split_file is None:
        check_patients(catalogue)
        return hold_out(catalogue, "val", options.val_fraction, options.split_seed)
    names = ("fold", "Image Index") if "fold" in _header(options.split_file) else ("split", "case")
    given = given_split(options.split_file, catalogue, *names)
    empty = [part for part in PARTS if not len(given.rows(part))]
    if empty:
        raise InputError(f"--split-file {options.split_file} leaves {empty[0]} empty: expected images in every part")
    check_patients(given)
    name = options.split_file.name
    return replace(given, files={**given.files, name: sha256_of(options.split_file)})


def _header(path: Path) -> list[str]:
    """The names of a CSV's columns; none where it can't be read, which is told by whoever reads it whole."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return next(csv.reader(file), [])
    except (OSError, ValueError, csv.Error):
        return []
