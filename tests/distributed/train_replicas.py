"""A plain DDP training run: with how many nodes it is launched must not show in the weights that it saves."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from launching import end_when_stuck
from one_process import SETTINGS, make_batch, make_model
from torch.nn.parallel import DistributedDataParallel

from inmerge_optim import InMergeOptimizer


def main(path: str) -> None:
    end_when_stuck()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = make_model()
    optimizer = InMergeOptimizer(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model, **SETTINGS)
    replica = DistributedDataParallel(model)
    for step in range(20):
        replica(make_batch(10 * step + dist.get_rank())).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save({"weights": model.state_dict(), "merges": optimizer.merge_counts()}, f"{path}.{dist.get_rank()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
