"""Pictures of a similarity profile: the first layer's kernels (as in the paper's Fig. 1), and every layer's cosines."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor, nn

from inmerge_optim.similarity import LayerProfile, random_density
from inmerge_optim.tables import printable

_COLUMNS = 6
_PANEL = (2.1, 1.65)  # inches of one histogram
_BARS = 100
_KERNELS_SHOWN = 64
_NAME = 26  # characters of a layer's name that fit over a histogram
_CORNER: dict[str, Any] = {"ha": "right", "va": "top", "color": "tab:red", "fontsize": 7}
_SELECTED, _LEFT_OUT, _NULL, _TAU = "tab:blue", "silver", "black", "tab:red"


def plot_profile(
    profiles: Sequence[LayerProfile], model: nn.Module, title: str, threshold: float | str, file_format: str
) -> bytes:
    """Draw the kernels of the first layer with its most and least similar pairs, and each layer's similarities.

    Args:
        profiles: of the model's layers; those without pairs are left out.
        model: holds the weights.
        title: stands above the figure.
        threshold: the similarity threshold as it was given; what it stands for is drawn in every histogram.
        file_format: "png", "pdf", "svg" or another that matplotlib writes.

    Returns:
        The content of the file.
    """
    shown = [profile for profile in profiles if profile.histogram.any()]
    first = next((profile for profile in shown if profile.depth == 0), None)
    weight = None if first is None else model.get_submodule(first.name).weight
    drawable = isinstance(weight, Tensor) and weight.dim() == 4
    rows = max(1, math.ceil(len(shown) / _COLUMNS))
    heights = [4.2 if drawable else 0.01, rows * _PANEL[1] + 0.9]
    figure = Figure(figsize=(_COLUMNS * _PANEL[0], sum(heights) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(printable(title), parse_math=False)
    upper, lower = figure.subfigures(2, 1, height_ratios=heights, squeeze=False).ravel()
    if drawable and first is not None and isinstance(weight, Tensor):
        _draw_kernels(upper, first, _images(weight))
    _draw_histograms(lower, shown, rows, threshold)
    content = io.BytesIO()
    figure.savefig(content, format=file_format, dpi=110)
    return content.getvalue()


def _images(weight: Tensor) -> npt.NDArray[np.float32]:
    """Return kernels as pictures in [0, 1], (n, height, width, 3), each scaled on its own with 0 as mid-grey."""
    kernels = weight.detach().to("cpu", torch.float32)
    if kernels.shape[1] != 3:
        kernels = kernels.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    largest = kernels.abs().flatten(1).amax(1).clamp(min=1e-30).view(-1, 1, 1, 1)
    pictures: npt.NDArray[np.float32] = (kernels / largest / 2 + 0.5).permute(0, 2, 3, 1).numpy()
    return pictures


def _draw_kernels(figure: SubFigure, profile: LayerProfile, images: npt.NDArray[np.float32]) -> None:
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1), squeeze=False).ravel()
    count = min(len(images), _KERNELS_SHOWN)
    columns = math.ceil(math.sqrt(2 * count))
    places = [(kernel % columns, kernel // columns) for kernel in range(count)]
    title = f"{printable(profile.name)}: {f'{count} of ' if count < len(images) else ''}{len(images)} kernels"
    _draw_tiles(left.subplots(), title, images[:count], places, [str(kernel) for kernel in range(count)])
    sides = (profile.most_similar, "Most similar pairs"), (profile.least_similar, "Least similar pairs")
    for axes, (pairs, name) in zip(right.subplots(2, 1), sides, strict=True):
        kernels = [kernel for pair in pairs for kernel in pair[:2]]
        places = [(column, row) for column in range(len(pairs)) for row in (0, 1)]
        labels = [label for pair in pairs for label in (f"cos {pair.cosine:.2f}\n{pair.first}", f"{pair.second}")]
        _draw_tiles(axes, name, images[kernels], places, labels)


def _draw_tiles(
    axes: Axes, title: str, images: npt.NDArray[np.float32], places: list[tuple[int, int]], labels: list[str]
) -> None:
    """Draw pictures side by side, each at its (column, row) with its label above it."""
    for image, (column, row), label in zip(images, places, labels, strict=True):
        x, y = 1.15 * column, 1.4 * row
        axes.imshow(image, extent=(x, x + 1, y + 1, y))
        axes.text(x + 0.5, y - 0.04, label, fontsize=7, ha="center", va="bottom")
    axes.set(xlim=(-0.1, 1.15 * max(x for x, _ in places) + 1.1), ylim=(1.4 * max(y for _, y in places) + 1.1, -0.4))
    axes.set_title(title, parse_math=False)
    axes.axis("off")


def _draw_histograms(figure: SubFigure, profiles: Sequence[LayerProfile], rows: int, threshold: float | str) -> None:
    figure.suptitle("Cosines of pairs of kernels")
    grid = figure.subplots(rows, _COLUMNS, squeeze=False, sharex=True)
    for axes in grid.ravel()[len(profiles) :]:
        axes.axis("off")
    for axes, profile in zip(grid.ravel(), profiles, strict=False):
        _draw_histogram(axes, profile)
    figure.legend(
        handles=[
            Patch(color=_SELECTED, label="selected for merging"),
            Patch(color=_LEFT_OUT, label="not selected"),
            Line2D([], [], color=_NULL, linewidth=1, label="random kernels of that length"),
            Line2D(
                [], [], color=_TAU, linestyle="--", linewidth=1, label=f"threshold {threshold}; share of pairs above"
            ),
        ],
        loc="outside lower center",
        ncols=4,
        fontsize=9,
        frameon=False,
    )


def _draw_histogram(axes: Axes, profile: LayerProfile) -> None:
    edges = np.linspace(-1, 1, _BARS + 1)
    counts = profile.histogram.reshape(_BARS, -1).sum(1)
    density = counts / counts.sum() / (edges[1] - edges[0])
    least = density[counts > 0].min() / 2
    axes.stairs(density, edges, baseline=least, fill=True, color=_SELECTED if profile.selected else _LEFT_OUT)
    cosines = np.linspace(-1, 1, 801)[1:-1]
    if profile.row_length > 1:
        axes.plot(cosines, random_density(cosines, profile.row_length), color=_NULL, linewidth=0.8)
    if profile.threshold is not None:
        axes.axvline(profile.threshold, color=_TAU, linestyle="--", linewidth=0.8)
    axes.set(yscale="log", xlim=(-1, 1), ylim=(least, 3 * density.max()), xticks=(-1, 0, 1))
    axes.tick_params(labelsize=7)
    axes.text(0.98, 0.95, f"{profile.share_above_threshold:.2%}", **_CORNER, transform=axes.transAxes)
    name = printable(profile.name)
    name = name if len(name) <= _NAME else "…" + name[1 - _NAME :]
    axes.set_title(name, fontsize=7, pad=2, parse_math=False)
