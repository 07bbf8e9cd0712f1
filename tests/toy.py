"""A small network, its batches and its training loop, on which the wrapper's interactions are tried."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from inmerge_optim import InMergeOptimizer

MERGED = ["deep", "grouped"]
# Kernels of random weights are nearly orthogonal: at this threshold about every drawn pair is merged.
MERGING = {"names": MERGED, "merge_prob": 0.5, "similarity_threshold": -0.5}


class Moded(torch.optim.SGD):
    """SGD with the two modes of schedule-free optimizers."""

    mode = None

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"


def network(seed=0):
    """Return a network whose layers MERGED are the ones that the wrappers here merge."""
    torch.default_generator.manual_seed(seed)  # a hundredth of the time of torch.manual_seed
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 8, 3, padding=1),
            act1=nn.ReLU(),
            deep=nn.Conv2d(8, 8, 3, padding=1),
            act2=nn.ReLU(),
            grouped=nn.Conv2d(8, 8, 3, padding=1, groups=2),
            act3=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(8, 4),
        )
    )


def sgd(model, lr=0.1, momentum=0.9, **settings):
    """Return the usual base."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, **settings)


def wrapped(model, base=None, **settings):
    """Return the wrapper around ``base``, or around SGD with momentum."""
    return InMergeOptimizer(sgd(model) if base is None else base, model, **{**MERGING, **settings})


def batch(step):
    """Return the images and labels that the number of a step determines."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 3, 8, 8, generator=generator), torch.randint(4, (6,), generator=generator)


def loss_of(model, step):
    """Return the loss on a step's batch."""
    images, labels = batch(step)
    dtype = next(model.parameters()).dtype
    return nn.functional.cross_entropy(model(images.to(dtype)), labels)


def train(model, optimizer, steps, *, after_step=None):
    """Run an ordinary loop over a range of steps, or over the first ``steps``; return the losses."""
    losses = []
    for step in range(steps) if isinstance(steps, int) else steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        if after_step is not None:
            after_step(step)
        losses.append(loss.item())
    return losses


def closure_of(model, optimizer, step):
    """Return the closure of a step's batch."""

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        return loss

    return closure


def trained(steps, base=sgd, **settings):
    """Return the model that an ordinary loop leaves, and its wrapper."""
    model = network()
    optimizer = wrapped(model, base(model), **settings)
    train(model, optimizer, steps)
    return model, optimizer


def weights(model):
    """Return copies of a model's parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(left, right):
    """Say whether two models, or two dicts of weights, are equal to the bit."""
    left, right = (weights(item) if isinstance(item, nn.Module) else item for item in (left, right))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def merge_step(optimizer):
    """Return the step number that every param group holds."""
    (step,) = {group["inmerge_step"] for group in optimizer.param_groups}
    return step
