"""A small network, and what a look at one sees."""

from __future__ import annotations

from torch import nn

from inmerge_optim.selection import CONVOLUTIONS
from inmerge_optim.tracing import trace_layers


def trace(model, example_inputs=None):
    """Trace all convolutions of a model, which must succeed."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)}
    found = trace_layers(model, layers, example_inputs)
    assert not found.problem
    return found


class Net(nn.Module):
    """Two convolutions and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.deep = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.deep(self.stem(x)).mean((2, 3)))
