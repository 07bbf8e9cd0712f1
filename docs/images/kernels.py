"""kernels.png: what one merge does to kernels of the first layer of a network, such as VGG16 with ImageNet's weights.

python docs/images/kernels.py vgg16.safetensors features.0.weight
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from inmerge_optim import kernel_similarity
from inmerge_optim.plots import _draw_tiles, _images

PAIRS = 7
WEIGHT = 0.8  # the paper's merge_weight


def main(file: str, name: str) -> None:
    kernels = load_file(file)[name]
    cosines = kernel_similarity(kernels).fill_diagonal_(-1)
    shown: list[tuple[int, int]] = []
    for place in cosines.flatten().argsort(descending=True).tolist():
        pair = divmod(place, len(cosines))
        if not any(kernel in taken for kernel in pair for taken in shown):
            shown.append(pair)
    shown = shown[:PAIRS]
    merged = torch.stack([torch.lerp(kernels[j], kernels[i], WEIGHT) for i, j in shown])
    columns = [kernels[[i for i, _ in shown]], kernels[[j for _, j in shown]], merged]
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    places = [(kernel % 12, kernel // 12) for kernel in range(len(kernels))]
    title = f"{len(kernels)} kernels of VGG16's first layer"
    _draw_tiles(left, title, _images(kernels), places, [str(kernel) for kernel in range(len(kernels))])
    labels = [f"{i}" for i, _ in shown] + [f"{j}" for _, j in shown] + [f"cos {cosines[pair]:.2f}" for pair in shown]
    places = [(column, row) for row in range(3) for column in range(len(shown))]
    _draw_tiles(right, "a kernel, its partner, and the two merged", _images(torch.cat(columns)), places, labels)
    figure.savefig(Path(__file__).with_name("kernels.png"), dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
