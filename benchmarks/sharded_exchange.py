"""What merging costs on FSDP2 shards: bytes that a rank sends per step, and time, against gathering the weights.

    torchrun --nproc-per-node 2 benchmarks/sharded_exchange.py --model resnet50

The criterion "random_pairs" takes the generic way, which gathers each weight; the others exchange drawn partners alone.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any
from unittest import mock

import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from inmerge_optim import InMergeOptimizer, kernel_layers


class Still(torch.optim.SGD):
    """A base that leaves the weights where they are, so that a step is a merge and nothing else."""

    def step(self, closure: Any = None) -> None:
        """Do nothing."""


def sharded(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fully_shard(module)
    return fully_shard(model)


def seconds_per_step(optimizer: InMergeOptimizer, steps: int) -> float:
    optimizer.step()
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    return (time.perf_counter() - start) / steps


def bytes_sent_per_step(optimizer: InMergeOptimizer, steps: int) -> float:
    """Count what this rank sends to others in the exchange of partners."""
    sent = []

    def exchange(inbox: torch.Tensor, outbox: torch.Tensor, arrives: Any, leaves: list[int], **options: Any) -> None:
        sent.append((sum(leaves) - leaves[dist.get_rank()]) * outbox.element_size())
        original(inbox, outbox, arrives, leaves, **options)

    original = dist.all_to_all_single
    with mock.patch.object(dist, "all_to_all_single", exchange):
        for _ in range(steps):
            optimizer.step()
    return sum(sent) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--skip-layers", type=float, default=0.6)
    parser.add_argument("--merge-prob", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    dist.init_process_group()
    torch.manual_seed(0)
    model = timm.create_model(options.model)
    layers = [layer for layer in kernel_layers(model, options.skip_layers) if layer.selected]
    everything = sum(parameter.nbytes for parameter in model.parameters())
    selected = sum(model.get_submodule(layer.name).weight.nbytes for layer in layers)
    sharded(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = InMergeOptimizer(
        Still(model.parameters(), lr=1.0), model, names=[layer.name for layer in layers], merge_prob=options.merge_prob
    )
    sent = bytes_sent_per_step(optimizer, options.steps)
    exchanging = seconds_per_step(optimizer, options.steps)
    optimizer.criterion = "random_pairs"
    gathering = seconds_per_step(optimizer, options.steps)
    ranks, mebi = dist.get_world_size(), 2**20
    if dist.get_rank() == 0:
        gathered = selected * (ranks - 1) / ranks
        reduced = 2 * everything * (ranks - 1) / ranks
        print(f"{options.model}, {ranks} ranks, merge_prob {options.merge_prob:g}: {len(layers)} layers are merged")
        print(f"  weights: {everything / mebi:.1f} MiB, of the merged layers {selected / mebi:.1f} MiB")
        print(f"  partners that a rank sends: {sent / mebi:.2f} MiB a step")
        print(f"    = {sent / gathered:.1%} of gathering these weights ({gathered / mebi:.1f} MiB)")
        print(f"    = {sent / reduced:.1%} of all-reducing the gradients once ({reduced / mebi:.1f} MiB)")
        print(f"  time of a merge: {exchanging / gathering:.2f} of that with gathered weights")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
