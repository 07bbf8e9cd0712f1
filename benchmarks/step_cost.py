"""What wrapping costs, as ratios: of a step, of a training iteration, and of the merge against comparing all pairs.

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --models resnet50 convnext_tiny --batch-sizes 8 --image-size 224 --device cuda

Bare and wrapped turns alternate within one run, and the ratios are of their medians, so that a machine that grows
slower or faster meanwhile favours neither.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from statistics import median

import numpy as np
import timm
import torch
from torch import Tensor, nn

from inmerge_optim import InMergeOptimizer, NoMergeWarning, merge_kernels_

SETTINGS = {"merge_prob": 0.3, "merge_weight": 0.8, "similarity_threshold": 0.3}


def median_times(turns: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of each turn; the turns alternate, and a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(repeats + 1):
        for name, turn in turns.items():
            start = time.perf_counter()
            turn()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: median(values[1:]) for name, values in times.items()}


def iteration(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return a whole training iteration."""

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return run


def merge_all_pairs(weight: Tensor, rng: np.random.Generator) -> None:
    """Merge as a first draft does: the cosines of all pairs, and a loop over the kernels that asks for each one."""
    rows = weight.flatten(1)
    normed = nn.functional.normalize(rows)
    cosines = normed @ normed.T
    merged = rows.clone()
    for kernel in range(len(rows)):
        if rng.random() < SETTINGS["merge_prob"]:
            partner = (kernel + int(rng.integers(1, len(rows)))) % len(rows)
            if cosines[kernel, partner] > SETTINGS["similarity_threshold"]:
                share = SETTINGS["merge_weight"]
                merged[kernel] = share * rows[kernel] + (1 - share) * rows[partner]
    weight.copy_(merged.view_as(weight))


def wrapping_cost(name: str, batch_size: int, image_size: int, repeats: int, device: torch.device) -> str:
    """Return the table's row of a model: the ratios of a step and of an iteration."""
    models = {"bare": timm.create_model(name, num_classes=10).to(device)}
    models["wrapped"] = copy.deepcopy(models["bare"])
    bases = {key: torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for key, m in models.items()}
    optimizers = {"bare": bases["bare"], "wrapped": InMergeOptimizer(bases["wrapped"], models["wrapped"], **SETTINGS)}
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    labels = torch.randint(10, (batch_size,), device=device)
    turns = {key: iteration(models[key], optimizers[key], images, labels) for key in models}
    whole = median_times(turns, repeats, device)
    step = median_times({key: optimizer.step for key, optimizer in optimizers.items()}, repeats, device)
    merged = sum(layer.selected for layer in optimizers["wrapped"].layers)
    return (
        f"| {name} | {merged} | {batch_size} | {step['wrapped'] / step['bare']:.2f} "
        f"| {whole['wrapped'] / whole['bare']:.3f} |"
    )


def merging_cost(kernels: int, length: int, repeats: int, device: torch.device) -> str:
    """Return the table's row of a layer: the time of comparing all pairs over that of merge_kernels_."""
    weight = torch.randn(kernels, length, 3, 3, device=device)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        turns = {
            "package": lambda: merge_kernels_(weight, **SETTINGS, rng=rng),
            "all pairs": lambda: merge_all_pairs(weight, rng),
        }
        seconds = median_times(turns, repeats, device)
    return f"| {kernels} x {length} x 3 x 3 | {seconds['all pairs'] / seconds['package']:.1f} |"


def main() -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore", NoMergeWarning)  # random weights; a rejected pair costs what a merged one costs
    device = torch.device(arguments.device)

    print(
        f"torch {torch.__version__} on {device.type}, {arguments.threads} thread(s), {arguments.image_size} px, "
        f"medians of {arguments.repeats}\n"
    )
    print("| model | merged layers | batch | wrapped step / bare step | wrapped iteration / bare iteration |")
    print("|---|---|---|---|---|")
    for name in arguments.models:
        for batch_size in arguments.batch_sizes:
            print(wrapping_cost(name, batch_size, arguments.image_size, arguments.repeats, device), flush=True)
    print("\n| weight | comparing all pairs / merge_kernels_ |\n|---|---|")
    for kernels in (64, 256, 512, 2048):
        print(merging_cost(kernels, min(kernels, 512), arguments.repeats, device), flush=True)


if __name__ == "__main__":
    main()
