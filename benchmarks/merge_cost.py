"""What a merge costs, as ratios: to copying the drawn kernels, to the base's step, and to timm's averages of weights.

    python benchmarks/merge_cost.py
    python benchmarks/merge_cost.py --models resnet50 convnext_tiny --repeats 25

Each turn follows a step of SGD on all weights, as in training, so that what it reads has left the nearer caches. Turns
alternate within one run, and the ratios are of their medians: a machine that grows slower or faster meanwhile favours
none. On one thread the time is the processor's, so that other programs count little.
"""

from __future__ import annotations

import argparse
import itertools
import time
import tracemalloc
import warnings
from collections.abc import Callable
from statistics import median

import numpy as np
import timm
import torch
from timm.optim import Lookahead
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from inmerge_optim import InMergeOptimizer
from inmerge_optim.drawing import draw_layers

MODELS = ("vgg19", "resnet18", "resnet50", "densenet121", "efficientnet_lite0", "convnext_tiny")


def median_times(
    turns: dict[str, Callable[[], object]], repeats: int, before: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Return the median seconds of each turn; the turns alternate, ``before`` runs ahead of each, a round warms up."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(repeats + 1):
        for name, turn in turns.items():
            before()
            start = clock()
            turn()
            times[name].append(clock() - start)
    return {name: median(values[1:]) for name, values in times.items()}


def with_gradients(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return model


def merging(optimizer: InMergeOptimizer) -> Callable[[], None]:
    """Return all that a step does beyond the base's: finding the weights, drawing, and merging."""
    return lambda: optimizer._merge_after_step(optimizer._bound())


def copying(model: nn.Module, optimizer: InMergeOptimizer) -> Callable[[], None]:
    """Return a copy of the kernels that a step draws, out of the weights and back, with other draws each time."""
    selected = [layer for layer in optimizer.layers if layer.selected]
    weights = [model.get_submodule(layer.name).weight.detach() for layer in selected]
    sizes, rng = [(layer.kernels, layer.groups) for layer in selected], np.random.default_rng(0)
    many = (draw_layers(sizes, [optimizer.merge_prob] * len(sizes), rng, [False] * len(sizes)) for _ in range(10))
    draws = itertools.cycle([[torch.from_numpy(pairs.picked) for pairs in drawn] for drawn in many])

    def copy() -> None:
        for weight, rows in zip(weights, next(draws), strict=True):
            weight.index_copy_(0, rows, weight.index_select(0, rows))

    return copy


def sgd(model: nn.Module, **options: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, **options)


def row_of_model(name: str, repeats: int) -> str:
    """Return the table's row of a model."""
    torch.manual_seed(0)
    model = with_gradients(timm.create_model(name, num_classes=10))
    foreach, fused = sgd(model, foreach=True), sgd(model, fused=True)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    optimizer, average = InMergeOptimizer(foreach, model), ModelEmaV3(model)
    lookahead = Lookahead(sgd(model))
    lookahead.step()  # makes the slow weights
    seconds = median_times(
        {
            "merge": merging(optimizer),
            "copy": copying(model, optimizer),
            "SGD, foreach": foreach.step,
            "SGD, fused": fused.step,
            "AdamW, fused": adamw.step,
            "EMA": lambda: average.update(model),
            "Lookahead": lookahead.sync_lookahead,
        },
        repeats,
        before=fused.step,
    )
    merge = seconds.pop("merge")
    merged = sum(layer.selected for layer in optimizer.layers)
    cells = [f"{merge / other:.2f}" if other < 20 * merge else f"{merge / other:.3f}" for other in seconds.values()]
    return f"| {name} ({merged}) | {merge * 1e3:.2f} ms | {' | '.join(cells)} |"


class OneLayer(nn.Module):
    """A model of one layer that is merged."""

    def __init__(self, kernels: int, channels: int = 64) -> None:
        super().__init__()
        self.merged = nn.Conv2d(channels, kernels, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.merged(images)


def merge_of_one_layer(kernels: int, prob: float = 0.3, every: int = 1) -> Callable[[], None]:
    model = with_gradients(OneLayer(kernels))
    return merging(InMergeOptimizer(sgd(model), model, names=["merged"], merge_prob=prob, every=every))


def print_growth(repeats: int) -> None:
    """Print how the cost grows with the kernels, with the share drawn, and with ``every``."""
    ballast = torch.zeros(2**23)  # 32 MB: what a base's step would have touched
    turns = {kernels: merge_of_one_layer(kernels) for kernels in (64, 128, 256, 512, 1024, 2048, 4096)}
    probs = {prob: merge_of_one_layer(1024, prob) for prob in (0.1, 0.2, 0.3, 0.6, 1.0)}
    cadences = {every: merge_of_one_layer(1024, every=every) for every in (1, 2, 4, 8)}
    rounds = max(cadences)
    by_kernels = median_times(turns, repeats, lambda: ballast.add_(1))
    by_prob = median_times(probs, repeats, lambda: ballast.add_(1))
    whole = {every: (lambda turn=turn: [turn() for _ in range(rounds)]) for every, turn in cadences.items()}
    by_cadence = median_times(whole, repeats, lambda: ballast.add_(1))
    print("\n| kernels (of 64 x 3 x 3) | " + " | ".join(map(str, by_kernels)) + " |")
    print("|---" * (len(by_kernels) + 1) + "|")
    print("| merge, ms | " + " | ".join(f"{value * 1e3:.2f}" for value in by_kernels.values()) + " |")
    print("| us per kernel | " + " | ".join(f"{value / n * 1e6:.2f}" for n, value in by_kernels.items()) + " |")
    print("\n| merge_prob (1024 kernels) | " + " | ".join(map(str, by_prob)) + " |")
    print("|---" * (len(by_prob) + 1) + "|")
    print("| merge, ms | " + " | ".join(f"{value * 1e3:.2f}" for value in by_prob.values()) + " |")
    print("\n| every (1024 kernels) | " + " | ".join(map(str, by_cadence)) + " |")
    print("|---" * (len(by_cadence) + 1) + "|")
    shares = (f"{value / by_cadence[1]:.2f}" for value in by_cadence.values())
    print(f"| cost of a step, of that at 1 | {' | '.join(shares)} |")


def peak_bytes(turn: Callable[[], object]) -> int:
    """Return the most memory that torch and NumPy hold for a turn at once, beyond what there was."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        tracemalloc.start()
        turn()
        peak = tracemalloc.get_traced_memory()[1]  # NumPy's
        tracemalloc.stop()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return peak + max(np.cumsum(sizes).tolist(), default=0)


def print_memory() -> None:
    """Print the peak memory of a merge against the drawn kernels, where a pair in many and where every pair merges."""
    print("\n| layer | threshold | peak / drawn kernels |\n|---|---|---|")
    for kernels, channels in ((512, 512), (2048, 512)):
        for threshold in (0.3, -1.0):
            model = with_gradients(OneLayer(kernels, channels))
            optimizer = InMergeOptimizer(sgd(model), model, names=["merged"], similarity_threshold=threshold)
            merging(optimizer)()
            (before,) = (counts["drawn"] for counts in optimizer.merge_counts().values())
            peak = peak_bytes(merging(optimizer))
            (after,) = (counts["drawn"] for counts in optimizer.merge_counts().values())
            drawn = (after - before) * model.merged.weight[0].nbytes
            print(f"| {kernels} x {channels} x 3 x 3 | {threshold:g} | {peak / drawn:.2f} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # of random weights that merge next to nothing, and of few layers in ConvNeXt
    print(f"torch {torch.__version__}, NumPy {np.__version__}, {arguments.threads} thread(s), ", end="")
    print(f"medians of {arguments.repeats}; merge over:\n")
    others = ("copy of the drawn kernels", "SGD, foreach", "SGD, fused", "AdamW, fused", "ModelEmaV3", "Lookahead")
    print(f"| model (merged layers) | merge | {' | '.join(others)} |\n{'|---' * (len(others) + 2)}|")
    for name in arguments.models:
        print(row_of_model(name, arguments.repeats), flush=True)
    print_growth(arguments.repeats)
    print_memory()


if __name__ == "__main__":
    main()
