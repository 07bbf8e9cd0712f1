"""A look at one's own images before a trial: what was found, in text and as tables, and a sheet of samples."""

from collections import Counter

import numpy as np
from matplotlib.figure import Figure

from ..data.catalogue import PARTS
from ..data.images import ImageData
from ..data.splits import SPLIT_FILE
from ..data.twins import (
    LEAK_FILE,
    NEAR_FILE,
    describe_leaks,
    describe_near,
    find_leaks,
    find_near_twins,
    leak_table,
    near_table,
)
from ..files import write_csv
from ..sources.imagefolder import LEFT_OUT_FILE, OwnImages
from .style import WIDTH, write_figure

SHEET = "samples.png"
_SAMPLES = 8  # of each class
_MOST_CLASSES = 30  # on the sheet
_NAMED = 5


def look_at(own: OwnImages, image_size: int) -> str:
    """Write split.csv, left_out.csv, leaks.csv, near_twins.csv and samples.png beside the prepared images.

    Returns:
        What was found, as text: notices, sizes, colours, classes per split, what can't be used, and leaks.
    """
    data = own.data(image_size)
    for name, (header, rows) in data.tables.items():
        write_csv(own.folder / name, header, rows)
    write_figure(own.folder / SHEET, sample_sheet(data))
    lines = [
        *(f"{notice}." for notice in own.catalogue.description["notices"]),
        _kinds(own),
        "",
        *_counts(data),
        "",
        *_left_out(own.catalogue.description["left_out"]),
        *_leaks(own, data),
        f"Samples: {own.folder / SHEET}. The split: {own.folder / SPLIT_FILE}.",
    ]
    return "\n".join(lines)


def _kinds(own: OwnImages) -> str:
    usable = np.flatnonzero(np.isin(own.catalogue.split, PARTS))
    images = own.images.select(usable)
    sizes = Counter(images.sizes()).most_common()
    most = ", ".join(f"{width} x {height} ({count:,})" for (width, height), count in sizes[:_NAMED])
    more = f" and {len(sizes) - _NAMED:,} other sizes" if len(sizes) > _NAMED else ""
    coloured = int(images.colours().sum())
    colours = "all grey" if not coloured else f"{coloured:,} in colour, {len(usable) - coloured:,} grey"
    return f"{len(usable):,} images can be used, {colours}, of {most}{more}; prepared in {own.folder}."


def _counts(data: ImageData) -> list[str]:
    """A table: images per class and split, or fold, and patients where they are known."""
    counts = list(data.counts.values())
    rows = {name: [found["labels"][name] for found in counts] for name in counts[0]["labels"]}
    rows |= {"images": [found["images"] for found in counts]}
    if data.train.patients is not None:
        rows |= {"patients": [found["patients"] for found in counts]}
    width = max(map(len, rows))
    return [" ".join([" " * width, *(f"{part:>9}" for part in data.counts)])] + [
        " ".join([f"{name:<{width}}", *(f"{number:>9,}" for number in numbers)]) for name, numbers in rows.items()
    ]


def _left_out(reasons: dict[str, str]) -> list[str]:
    if not reasons:
        return []
    first = "; ".join(f"{case} {reason}" for case, reason in list(reasons.items())[:_NAMED])
    return [
        f"{len(reasons):,} images can't be used ({first}{' ...' if len(reasons) > _NAMED else ''}): a trial goes on "
        f"without them by --allow-missing; all are named in {LEFT_OUT_FILE}.",
    ]


def _leaks(own: OwnImages, data: ImageData) -> list[str]:
    leaks, near, lines = find_leaks(data), find_near_twins(data), []
    if leaks:
        write_csv(own.folder / LEAK_FILE, *leak_table(data, leaks))
        lines += [f"{sentence}." for sentence in describe_leaks(data, leaks)]
        if any("test" in leak.parts for leak in leaks):
            lines.append(f"A trial refuses them in test without --drop-twins or --allow-twins; {LEAK_FILE} has all.")
    if near.found:
        write_csv(own.folder / NEAR_FILE, *near_table(data, near.nearest))
        lines.append(f"{describe_near(near)}.")
    return lines or ["No image, and none that looks alike, lies in two splits."]


def sample_sheet(data: ImageData) -> Figure:
    """Some images of each class, drawn at random from the training split, as they are prepared."""
    task, labels = data.task, data.train.labels
    names = list(task.classes)[:_MOST_CLASSES]
    rng = np.random.default_rng(0)
    figure = Figure(figsize=(WIDTH * 1.6, 0.9 * len(names) + 0.2), layout="constrained")
    panels = figure.subplots(len(names), _SAMPLES, squeeze=False)
    for k, (row, name) in enumerate(zip(panels, names, strict=True)):
        of_class = np.flatnonzero(labels[:, k] == 1 if task.multi_label else labels == k)
        shown = np.sort(rng.permutation(of_class)[:_SAMPLES]).tolist()
        images = data.train.images[shown]
        for panel, image in zip(row, images, strict=False):
            panel.imshow(np.moveaxis(image, 0, -1).squeeze(), cmap="gray", vmin=0, vmax=255)
        for panel in row:
            panel.set_xticks([])
            panel.set_yticks([])
            panel.set_frame_on(False)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small")
    return figure
