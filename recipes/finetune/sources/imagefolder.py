"""One's own images as a source: options, their check, and loading."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..data.catalogue import PARTS, Catalogue
from ..data.images import ImageData
from ..data.opening import parse_window
from ..data.prepared import PreparedImages, as_image_data, prepare, prepared_folder, without_unreadable
from ..data.splits import hold_out_stratified, units_of
from ..data.squares import Fit, Form
from ..data.twins import find_leaks, refuse_leaks
from ..errors import InputError
from .folders import read_class_folders
from .listing import Listing, catalogue_of
from .preparing import PreparedOptions, check_preparing


@dataclass(kw_only=True)
class OwnImagesOptions(PreparedOptions):
    """Fine-tune a timm CNN on your own images, with and without in-model merging, from the same backbone.

    The images come as a folder per class (--data-dir), as a table of paths (--csv), or as a data set of the datasets
    library (--hub).
    """

    patient_regex: str | None = None
    """Names the patient by its first group, searched for in an image's path: r"(\\d+)_" for 0017_left.png."""
    positive_class: str | None = None
    """Class 1 of two. None: the one that is not called normal, negative and the like, or else the second by name."""
    fit: Fit = "pad"
    """What becomes of an image that is not square: pad it with black, crop its longer side, or squash it."""
    window: str = "file"
    """What becomes black and white of more than 8 bits: center,width; or file: that of a DICOM file, and else as
    percentile, which takes the 1st and the 99th of each image."""
    val_fraction: float = 0.2
    """Share of the patients, or cases, that are held out for validation, where the images come without it."""
    test_fraction: float = 0.2
    """Share of the patients, or cases, that are held out for testing, where the images come without it."""
    allow_twins: bool = False
    """Go on with images or patients that are in test and in another split."""


def check_own_images(options: OwnImagesOptions) -> None:
    """Refuse options that contradict each other or are out of range."""
    if (options.data_dir is None) == (options.hub is None):
        raise InputError("give --data-dir, a folder of images, or --hub, a data set of the datasets library")
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
    """What was found, prepared and split.

    Attributes:
        catalogue: of all images; what can't be used is left out of its split.
        images: all of them, in the same order.
        folder: where they are prepared.
    """

    catalogue: Catalogue
    images: PreparedImages
    form: Form
    folder: Path

    def data(self, image_size: int) -> ImageData:
        """The splits."""
        return as_image_data(self.catalogue, self.images, self.form, image_size)


def load_own_images(options: OwnImagesOptions) -> ImageData:
    """Find, prepare and split the images; twins over the splits are refused, unless they are allowed or dropped."""
    data = find_own_images(options).data(options.image_size)
    if not (options.allow_twins or options.drop_twins):
        refuse_leaks(data, find_leaks(data))
    return data


def find_own_images(options: OwnImagesOptions) -> OwnImages:
    """Find and prepare the images, and split those that can be used."""
    catalogue = catalogue_of(_listing(options), options.positive_class)
    form = Form(options.side, options.fit, parse_window(options.window))
    folder = prepared_folder(options.prepared_in, catalogue, form)
    images = prepare(catalogue.images, form, folder, options.processes)
    catalogue = without_unreadable(catalogue, images, options.allow_missing)
    return OwnImages(_split(catalogue, images, options), images, form, folder)


def _listing(options: OwnImagesOptions) -> Listing:
    pattern = None if options.patient_regex is None else _patient_pattern(options.patient_regex)
    return read_class_folders(options.data_dir, pattern)


def _split(catalogue: Catalogue, images: PreparedImages, options: OwnImagesOptions) -> Catalogue:
    """Hold out of the training images the parts that the images come without."""
    lacking = [part for part in ("test", "val") if not len(catalogue.rows(part))]
    given = [part for part in PARTS if part not in lacking]
    fractions = {"test": options.test_fraction, "val": options.val_fraction}
    units = units_of(catalogue, images.pixel_hashes())
    for part in lacking:
        catalogue = hold_out_stratified(catalogue, part, fractions[part], options.split_seed, units)
    how = "as given" if not lacking else f"{' and '.join(lacking)} held out of {' and '.join(given)}"
    return replace(catalogue, description={**catalogue.description, "split": how})
