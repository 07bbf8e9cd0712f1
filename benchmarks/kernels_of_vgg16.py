"""What the method does to VGG16 with ImageNet weights, the paper's own network, before and without any training.

    python benchmarks/kernels_of_vgg16.py                                       timm's weights, by name
    python benchmarks/kernels_of_vgg16.py --checkpoint vgg16_features.safetensors

Prints two tables in Markdown. The first has, per convolution, the cosines of pairs of kernels, the share above tau, and
how many merges the paper's settings promise per step and in a run of its length. The second has what rounds of merging
without a gradient do to the layers that the paper merges: how many kernels moved, how many groups of equal kernels
there are then and how many kernels they hold, and the effective rank. --output FILE.png draws both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from scipy.sparse.csgraph import connected_components
from torch import nn

from inmerge_optim import InMergeOptimizer, kernel_layers, kernel_ranks, kernel_similarity, similarity_profile

SKIPPED = 10  # the paper's L_s for VGG16 and VGG19
# ChestX-ray14: about 240 steps of 324 images in each of 10 epochs.
STEPS = 2400
ROUNDS = (1, 10, 100, 1000, 3000, 12000)
_EQUAL = 1 - 1e-6  # cosine above which two kernels are one


def build(checkpoint: Path | None) -> nn.Module:
    """VGG16 with ImageNet weights; a file may hold its convolutions alone."""
    if checkpoint is None:
        return timm.create_model("vgg16", pretrained=True)
    model = timm.create_model("vgg16")
    weights = load_file(checkpoint)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    lacking = [name for name in missing if name.startswith("features.")]
    if lacking or unexpected:
        raise SystemExit(f"error: {checkpoint} lacks {lacking} and has {unexpected} beside VGG16's convolutions")
    return model


def profile_table(model: nn.Module, tau: float, skipped: int) -> list[str]:
    """A row per convolution, as the weights are."""
    rows = [
        "| convolution | kernels | weights each | sd of cosines | 99 % below | share above tau | of random rows | "
        "merges per step | in the run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    total = 0.0
    for number, found in enumerate(similarity_profile(model, skipped, similarity_threshold=tau), 1):
        if found.depth is None:
            continue
        cosines = kernel_similarity(model.get_submodule(found.name).weight)
        pairs = cosines[torch.ones_like(cosines, dtype=torch.bool).triu(1)]
        merges = f"{found.expected_merges:.4f} | {found.expected_merges * STEPS:.0f}" if found.selected else "- | -"
        total += found.expected_merges
        rows.append(
            f"| {number}, {found.name} | {found.kernels} | {found.row_length} | {pairs.std():.3f} | "
            f"{found.quantiles[0.99]:.3f} | {found.share_above_threshold:.5f} | "
            f"{found.random_share_above_threshold:.2g} | {merges} |"
        )
    rows.append(f"\nAll: {total:.4f} merges per step, one in {1 / total:.0f} steps, {total * STEPS:.0f} in the run.")
    return rows


def equal_groups(weight: torch.Tensor) -> list[int]:
    """The sizes of the groups of kernels that have become one, as connected components."""
    _, labels = connected_components((kernel_similarity(weight) > _EQUAL).numpy(), directed=False)
    return [size for size in np.bincount(labels).tolist() if size > 1]


def rounds_table(model: nn.Module, tau: float, skipped: int) -> tuple[list[str], dict[str, list[list[float]]]]:
    """Merge without a gradient; a row per layer and number of rounds, and the same figures by layer."""
    layers = [layer for layer in kernel_layers(model, skipped) if layer.selected]
    optimizer = InMergeOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, skip_layers=skipped, similarity_threshold=tau
    )
    start = {layer.name: model.get_submodule(layer.name).weight.detach().clone() for layer in layers}
    rows = [
        "| convolution | rounds | merges | kernels moved | groups of equals | kernels in them | effective rank |",
        "|---|---|---|---|---|---|---|",
    ]
    figures: dict[str, list[list[float]]] = {layer.name: [] for layer in layers}
    done = 0
    for rounds in (0, *ROUNDS):
        optimizer.merge(rounds - done)
        done = rounds
        ranks, counts = kernel_ranks(model, layers), optimizer.merge_counts()
        for layer in layers:
            weight = model.get_submodule(layer.name).weight.detach()
            moved = (weight != start[layer.name]).flatten(1).any(1).float().mean().item()
            groups = equal_groups(weight)
            rows.append(
                f"| {layer.name} | {rounds:,} | {counts[layer.name]['merged']:,} | {moved:.1%} | {len(groups)} | "
                f"{sum(groups)} | {ranks[layer.name]:.1f} |"
            )
            figures[layer.name].append([rounds, moved, ranks[layer.name]])
    return rows, figures


def draw(path: Path, model: nn.Module, tau: float, figures: dict[str, list[list[float]]]) -> None:
    """Left: the cosines of the deep layers as they were; right: kernels moved over rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for layer in figures:
        cosines = kernel_similarity(model.get_submodule(layer).weight)
        pairs = cosines[torch.ones_like(cosines, dtype=torch.bool).triu(1)]
        left.hist(pairs.numpy(), bins=200, range=(-0.5, 1), histtype="step", log=True, label=layer)
        rounds, moved, _ = zip(*figures[layer][1:], strict=True)
        right.plot(rounds, [100 * share for share in moved], "o-", label=layer)
    left.axvline(tau, color="grey", linestyle="--")
    left.set(title=f"Pairs of kernels by cosine (dashed: tau {tau:g})", xlabel="cosine", ylabel="pairs")
    right.set(title="Rounds of merging without a gradient", xlabel="rounds", ylabel="% of kernels moved", xscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Print the tables, and draw them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a safetensors file of VGG16's weights; by default timm's")
    parser.add_argument("--tau", type=float, default=0.3, help="similarity threshold")
    parser.add_argument(
        "--skip-layers", type=int, default=SKIPPED, help="L_s: merge the convolutions after the first so many"
    )
    parser.add_argument("--output", type=Path, help="a PNG file for the picture")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = build(options.checkpoint)
    print(*profile_table(model, options.tau, options.skip_layers), "", sep="\n")
    untouched = build(options.checkpoint)
    rows, figures = rounds_table(model, options.tau, options.skip_layers)
    print(*rows, sep="\n")
    if options.output:
        draw(options.output, untouched, options.tau, figures)


if __name__ == "__main__":
    main()
