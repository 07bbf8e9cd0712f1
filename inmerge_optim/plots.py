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

_COLUMNS = 6
_PANEL = (2.1, 1.65)  # inches of one histogram
_BARS = 100
_KERNELS_SHOWN = 64
_PAIRS_SHOWN = 5
_NAME = 26  # characters of a layer's name that fit over a histogram
_CORNER: dict[str, Any] = {"ha": "right", "va": "top", "color": "tab:red", "fontsize": 7}
_SELECTED, _LEFT_OUT, _NULL, _TAU = "tab:blue", "silver", "black", "tab:red"


def plot_profile(
    profiles: Sequence[LayerProfile], model: nn.Module, title: str, threshold: float, file_format: str
) -> bytes:
    """Draw the kernels of the first layer with its most and least similar pairs, and each layer's similarities.

    Args:
        profiles: of the model's layers; those without pairs are left out.
        model: holds the weights.
        title: stands above the figure.
        threshold: tau, drawn in every histogram.
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
    figure.suptitle(title)
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
    left.suptitle(
        f"{profile.name}: " + (f"{count} of {len(images)}" if count < len(images) else f"{count}") + " kernels"
    )
    columns = math.ceil(math.sqrt(2 * count))
    grid = left.subplots(math.ceil(count / columns), columns, squeeze=False).ravel()
    for place, axes in enumerate(grid):
        axes.axis("off")
        if place < count:
            axes.imshow(images[place])
            axes.set_title(str(place), fontsize=6, pad=1)
    for half, pairs, name in zip(
        right.subfigures(2, 1, squeeze=False).ravel(),
        (profile.most_similar, profile.least_similar),
        ("Most similar pairs", "Least similar pairs"),
        strict=True,
    ):
        half.suptitle(name)
        cells = half.subplots(2, _PAIRS_SHOWN, squeeze=False)
        for axes in cells.ravel():
            axes.axis("off")
        for column, pair in enumerate(pairs[:_PAIRS_SHOWN]):
            for axes, kernel in zip(cells[:, column], pair[:2], strict=True):
                axes.imshow(images[kernel])
            cells[0, column].set_title(f"{pair.first}, {pair.second}\ncos {pair.cosine:.2f}", fontsize=8)


def _draw_histograms(figure: SubFigure, profiles: Sequence[LayerProfile], rows: int, threshold: float) -> None:
    figure.suptitle("Cosines of pairs of kernels")
    grid = figure.subplots(rows, _COLUMNS, squeeze=False, sharex=True)
    for axes in grid.ravel()[len(profiles) :]:
        axes.axis("off")
    for axes, profile in zip(grid.ravel(), profiles, strict=False):
        _draw_histogram(axes, profile, threshold)
    figure.legend(
        handles=[
            Patch(color=_SELECTED, label="selected for merging"),
            Patch(color=_LEFT_OUT, label="not selected"),
            Line2D([], [], color=_NULL, linewidth=1, label="random kernels of that length"),
            Line2D(
                [], [], color=_TAU, linestyle="--", linewidth=1, label=f"threshold {threshold:g}; share of pairs above"
            ),
        ],
        loc="outside lower center",
        ncols=4,
        fontsize=9,
        frameon=False,
    )


def _draw_histogram(axes: Axes, profile: LayerProfile, threshold: float) -> None:
    edges = np.linspace(-1, 1, _BARS + 1)
    counts = profile.histogram.reshape(_BARS, -1).sum(1)
    density = counts / counts.sum() / (edges[1] - edges[0])
    least = density[counts > 0].min() / 2
    axes.stairs(density, edges, baseline=least, fill=True, color=_SELECTED if profile.selected else _LEFT_OUT)
    cosines = np.linspace(-1, 1, 801)[1:-1]
    if profile.row_length > 1:
        axes.plot(cosines, random_density(cosines, profile.row_length), color=_NULL, linewidth=0.8)
    axes.axvline(threshold, color=_TAU, linestyle="--", linewidth=0.8)
    axes.set(yscale="log", xlim=(-1, 1), ylim=(least, 3 * density.max()), xticks=(-1, 0, 1))
    axes.tick_params(labelsize=7)
    axes.text(0.98, 0.95, f"{profile.share_above_threshold:.2%}", **_CORNER, transform=axes.transAxes)
    name = profile.name if len(profile.name) <= _NAME else "…" + profile.name[1 - _NAME :]
    axes.set_title(name, fontsize=7, pad=2)
