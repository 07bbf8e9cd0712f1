"""One's own images as a source: options, their check, and loading."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..data.catalogue import LEFT_OUT, Catalogue
from ..data.folds import FEWEST, check_fold_classes, check_fold_numbers, cross_validated
from ..data.images import ImageData
from ..data.opening import PERCENTILES, Window, parse_window
from ..data.prepared import PreparedImages, as_image_data, prepare, prepared_folder, without_unreadable
from ..data.splits import (
    FOLD,
    SPLIT,
    SPLIT_FILE,
    check_classes,
    fold_numbers,
    given_split,
    hold_out_stratified,
    read_split,
    split_table,
    units_of,
)
from ..data.squares import Form
from ..data.twins import find_leaks, refuse_leaks
from ..errors import InputError, is_main_process
from .columns import Columns
from .dicom import image_opener
from .folders import patients_of, read_class_folders
from .hub import read_hub
from .listing import Listing, catalogue_of
from .options import HELD_OUT, OwnImagesOptions
from .preparing import check_preparing
from .tables import read_table

LEFT_OUT_FILE = "left_out.csv"


def check_own_images(options: OwnImagesOptions) -> None:
    """Refuse options that contradict each other or are out of range."""
    if (options.data_dir is None and options.csv is None) == (options.hub is None):
        raise InputError(
            "give one of --data-dir, a folder of images, --csv, a table of them, and --hub, a data set of the datasets "
            "library"
        )
    if options.csv is None and options.hub is None:
        for name in ("image_column", "label_columns", "patient_column", "split_column", "subgroup_columns"):
            if getattr(options, name):
                raise InputError(f"--{name.replace('_', '-')} has no effect without --csv or --hub: leave it out")
    if options.allow_outside and options.csv is None:
        raise InputError("--allow-outside has no effect without --csv: leave it out")
    check_preparing(options)
    for name in ("val_fraction", "test_fraction"):
        if not 0 < getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be between 0 and 1, not {getattr(options, name)}")
    try:
        parse_window(options.window)
    except ValueError as error:
        raise InputError(
            f"--window {options.window} must be center,width (wider than 1), file or percentile"
        ) from error
    if options.patient_regex is not None:
        _patient_pattern(options.patient_regex)
    if options.allow_twins and options.drop_twins:
        raise InputError("--allow-twins keeps what --drop-twins drops: leave out one of both")
    if options.folds is not None:
        _check_folds(options)


def _check_folds(options: OwnImagesOptions) -> None:
    if options.folds < FEWEST:
        raise InputError(f"--folds {options.folds} must be at least {FEWEST}, to train on, validate on and test on")
    if options.drop_twins:
        raise InputError("--drop-twins has no effect with --folds, which puts twins into one fold: leave it out")
    for name in ("val_fraction", "test_fraction"):
        if getattr(options, name) != HELD_OUT:
            raise InputError(
                f"--{name.replace('_', '-')} has no effect with --folds, which tests and validates on one fold each: "
                "leave it out"
            )


def _patient_pattern(text: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise InputError(f"--patient-regex {text} is no regular expression ({error}): mend it") from error
    if not pattern.groups:
        raise InputError(f"--patient-regex {text} has no group: put what names the patient in brackets")
    return pattern


@dataclass(frozen=True)
class OwnImages:
    """What was found and prepared, and how it is split.

    Attributes:
        catalogue: of all images; what can't be used is left out of its split.
        images: all of them, in the same order.
        folder: where they are prepared.
        folds: of cross-validation, the fold in which each image is tested, int64 (N,); -1 for what is left out.
    """

    catalogue: Catalogue
    images: PreparedImages
    form: Form
    folder: Path
    folds: np.ndarray | None = None

    def data(self, image_size: int) -> ImageData:
        """The splits, with how they are and what is left out as tables."""
        if self.folds is None:
            data = as_image_data(self.catalogue, self.images, self.form, image_size)
            split = split_table(self.catalogue, SPLIT, self.catalogue.split)
        else:
            data = cross_validated(self.catalogue, self.folds, self.images, self.form, image_size)
            numbers = [LEFT_OUT if fold < 0 else str(fold) for fold in self.folds.tolist()]
            split = split_table(self.catalogue, FOLD, numbers)
        left_out = list(self.catalogue.description["left_out"].items())
        tables = {SPLIT_FILE: split}
        return replace(data, tables=tables | ({LEFT_OUT_FILE: (("case", "reason"), left_out)} if left_out else {}))


def name_of(options: OwnImagesOptions) -> str:
    """What the data set is called: after its table, its folder, or its name on the hub."""
    source = options.hub or options.csv or options.data_dir.resolve()
    return re.sub(r"[^\w.-]+", "-", Path(source).stem if options.csv else Path(source).name)


def load_own_images(options: OwnImagesOptions) -> ImageData:
    """Find, prepare and split the images; twins over the splits are refused, unless they are allowed or dropped."""
    own = find_own_images(options, options.allow_missing)
    data = own.data(options.image_size)
    if is_main_process():
        for notice in own.catalogue.description["notices"]:
            print(f"{notice}.")
    if not (options.allow_twins or options.drop_twins):
        refuse_leaks(data, find_leaks(data))
    return data


def find_own_images(options: OwnImagesOptions, allow_missing: bool) -> OwnImages:
    """Find and prepare the images, and split those that can be used.

    Args:
        allow_missing: leave out the others instead of refusing them.
    """
    catalogue = catalogue_of(_listing(options), name_of(options), options.positive_class)
    form = Form(options.side, options.fit, parse_window(options.window), decode=image_opener())
    folder = prepared_folder(options.prepared_in, catalogue, form)
    images = prepare(catalogue.images, form, folder, options.processes)
    catalogue = without_unreadable(_with_headers(catalogue, images), images, allow_missing)
    if options.folds is None:
        folds = None
        catalogue, notices = _split(catalogue, images, options)
        notices += check_classes(catalogue)
    else:
        folds, notices = _folds(catalogue, images, options)
        notices += check_fold_classes(catalogue, folds)
    described = {
        **catalogue.description,
        "fit": options.fit,
        "window": _window_text(form.window),
        "notices": [*catalogue.description["notices"], *notices],
    }
    return OwnImages(replace(catalogue, description=described), images, form, folder, folds)


def _window_text(window: Window) -> str:
    """What becomes black and white of values of more than 8 bits, for the run folder."""
    percentiles = "percentiles {:g} and {:g} of each image".format(*PERCENTILES)
    if window == "file":
        return f"that of the file, or else {percentiles}"
    return percentiles if window == "percentile" else "center {:g}, width {:g}".format(*window)


def _listing(options: OwnImagesOptions) -> Listing:
    columns = Columns(
        options.image_column,
        options.label_columns,
        options.patient_column,
        options.split_column,
        options.subgroup_columns,
    )
    if options.hub is not None:
        listing = read_hub(options.hub, options.hub_revision, columns)
    elif options.csv is not None:
        listing = read_table(options.csv, options.data_dir or options.csv.parent, columns, options.allow_outside)
    else:
        listing = read_class_folders(options.data_dir)
    if options.patient_regex is None:
        return listing
    return replace(listing, patients=patients_of(listing.cases, _patient_pattern(options.patient_regex)))


def _with_headers(catalogue: Catalogue, images: PreparedImages) -> Catalogue:
    """What the files' own headers say, where the source says nothing: patients if all name theirs, and subgroups."""
    headers = images.headers()
    absent = images.absent()
    usable = [header for row, header in enumerate(headers) if row not in absent]
    patients = catalogue.patients
    if patients is None and usable and all("patient" in header for header in usable):
        patients = [header.get("patient", "") for header in headers]
    found = {name: [header.get(name) for header in headers] for name in ("view", "sex", "age")}
    subgroups = {name: values for name, values in found.items() if any(values)} | catalogue.subgroups
    return replace(catalogue, patients=patients, subgroups=subgroups)


def _split(catalogue: Catalogue, images: PreparedImages, options: OwnImagesOptions) -> tuple[Catalogue, list[str]]:
    """Take the split of the file, or hold out of the training images the parts that the images come without."""
    if options.split_file is not None:
        given = given_split(options.split_file, catalogue)
        given.split[list(images.absent())] = LEFT_OUT
        return given, [f"The split is that of {options.split_file}"]
    lacking = [part for part in ("test", "val") if not len(catalogue.rows(part))]
    if not lacking:
        return catalogue, []
    units = units_of(catalogue, images.pixel_hashes())
    fractions = {"test": options.test_fraction, "val": options.val_fraction}
    for part in lacking:
        catalogue = hold_out_stratified(catalogue, part, fractions[part], options.split_seed, units)
    by = "case, as no patients are named" if catalogue.patients is None else "patient"
    return catalogue, [f"Held out of train by {by}: {' and '.join(lacking)}"]


def _folds(catalogue: Catalogue, images: PreparedImages, options: OwnImagesOptions) -> tuple[np.ndarray, list[str]]:
    """Take the folds of the file, or draw them over all images that can be used, whatever split they come with."""
    if options.split_file is not None:
        given = read_split(options.split_file, catalogue, FOLD)
        given[list(images.absent())] = LEFT_OUT
        numbers = check_fold_numbers(given, options.folds, f"--split-file {options.split_file}")
        return numbers, [f"The folds are those of {options.split_file}"]
    usable = replace(catalogue, split=np.where(catalogue.split == LEFT_OUT, LEFT_OUT, "train"))
    numbers = fold_numbers(usable, options.folds, options.split_seed, units_of(catalogue, images.pixel_hashes()))
    by = "case, as no patients are named" if catalogue.patients is None else "patient"
    own = set(catalogue.split.tolist()) - {"train", LEFT_OUT}
    pooled = ["The split that the images come with is not used: --folds tests on all of them"] if own else []
    return numbers, [*pooled, f"Parted in {options.folds} folds by {by}"]
