"""What wrapping costs of a whole training iteration: forward, backward and step, with and without merging.

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --models resnet50 --sizes 224x32 --repeats 9 --device cuda

Bare and wrapped iterations alternate, and the first ratio is of their medians. A merge is a hundredth of an iteration
or less, which is near to what two medians differ by anyway; so the second ratio adds the median of the merges alone,
timed between these iterations, to that of the bare ones. On one CPU thread the time is the processor's.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from statistics import median

import timm
import torch
from torch import Tensor, nn

from inmerge_optim import InMergeOptimizer

# (model, side and batch, repeats): on a CPU larger images take minutes, and merge as much.
ROWS = (
    *(("resnet18", size, repeats) for size, repeats in (("64x8", 15), ("64x32", 9), ("64x128", 9), ("28x128", 9))),
    *(("resnet50", "64x8", 9), ("resnet50", "64x32", 9), ("densenet121", "64x8", 9), ("efficientnet_lite0", "64x8", 9)),
    ("resnet18", "224x32", 3),
)


def iteration(model: nn.Module, step: Callable[[], object], images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return a whole training iteration."""

    def run() -> None:
        model.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        step()

    return run


def row_of_table(name: str, size: str, repeats: int, device: torch.device) -> str:
    """Return the table's row: both ratios of a model at a size."""
    side, batch = map(int, size.split("x"))
    bare = timm.create_model(name, num_classes=10).to(device)
    wrapped = copy.deepcopy(bare)
    bases = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9, fused=True) for m in (bare, wrapped)]
    optimizer = InMergeOptimizer(bases[1], wrapped)
    images, labels = torch.randn(batch, 3, side, side, device=device), torch.randint(10, (batch,), device=device)
    turns = {
        "bare": iteration(bare, bases[0].step, images, labels),
        "wrapped": iteration(wrapped, optimizer.step, images, labels),
        "merge": lambda: optimizer._merge_after_step(optimizer._bound()),  # right after an iteration, as in a step
    }
    on_cpu = device.type == "cpu" and torch.get_num_threads() == 1
    times: dict[str, list[float]] = {turn: [] for turn in turns}
    for _ in range(repeats + 1):
        for turn, run in turns.items():
            start = time.thread_time() if on_cpu else time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[turn].append((time.thread_time() if on_cpu else time.perf_counter()) - start)
    seconds = {turn: median(values[1:]) for turn, values in times.items()}
    return (
        f"| {name} | {side} px | {batch} | {repeats} | {seconds['wrapped'] / seconds['bare']:.3f} "
        f"| {1 + seconds['merge'] / seconds['bare']:.4f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="in place of the table's own rows")
    parser.add_argument("--sizes", nargs="+", default=["64x32"], help="side x batch, for --models")
    parser.add_argument("--repeats", type=int, default=9, help="for --models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # of random weights that merge next to nothing
    device = torch.device(arguments.device)
    rows = [(name, size, arguments.repeats) for name in arguments.models or () for size in arguments.sizes] or ROWS
    print(f"torch {torch.__version__} on {device.type}, {arguments.threads} thread(s), base SGD (fused)\n")
    print("| model | images | batch | medians of | wrapped / bare | 1 + merge / bare |\n|---|---|---|---|---|---|")
    for row in rows:
        print(row_of_table(*row, device), flush=True)


if __name__ == "__main__":
    main()
