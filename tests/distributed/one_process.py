"""What one process would make of the same weights: the measure of every sharded or replicated merge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from inmerge_optim import InMergeOptimizer, kernel_layers

SETTINGS: dict[str, Any] = {"skip_layers": 1, "merge_prob": 0.6, "similarity_threshold": 0.0}


def make_model(seed: int = 0, channels: tuple[int, ...] = (7, 10, 3), dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a small CNN; by default most of its layers' kernels don't divide by two or four ranks."""
    torch.manual_seed(seed)
    first, second, third = channels
    return nn.Sequential(
        nn.Conv2d(4, first, 3),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(second, 2 * second, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(2 * second, third, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(third, 2),
    ).to(dtype)


def make_normed_model() -> nn.Module:
    """Return the small CNN with a batch norm and a depthwise convolution after its second layer, index 2."""
    layers = list(make_model())
    depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10)
    return nn.Sequential(*layers[:3], nn.BatchNorm2d(10), depthwise, *layers[3:])


def make_batch(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def selected_names(model: nn.Module) -> list[str]:
    return [layer.name for layer in kernel_layers(model, SETTINGS["skip_layers"]) if layer.selected]


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors are the same to the bit, so that NaN is equal to itself and -0 is not 0."""
    bits = (tensor.detach().contiguous().view(torch.uint8) for tensor in (one, other))
    return one.dtype == other.dtype and torch.equal(*bits)


def assert_same_counts(found: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]) -> None:
    """Assert that two merge_counts() are the same; cosines may differ by what rows in other tensors are rounded by."""
    assert sum(count["merged"] for count in expected.values()) > 0, "nothing merged: the check shows nothing"
    assert found.keys() == expected.keys()
    for layer, count in expected.items():
        assert (found[layer]["drawn"], found[layer]["merged"]) == (count["drawn"], count["merged"]), layer
        assert (count["mean_cosine"] is None) == (found[layer]["mean_cosine"] is None), layer
        assert abs((found[layer]["mean_cosine"] or 0) - (count["mean_cosine"] or 0)) < 1e-6, layer


class Still(torch.optim.SGD):
    """A base that leaves the weights where they are, so that a step is a merge and nothing else."""

    def step(self, closure: Any = None) -> None:
        """Do nothing."""


class OneProcess:
    """A plain copy of a model, merged by one process from the weights that the base's step left.

    ``model`` and ``settings`` are those of the optimizer under test, before anything was sharded or replicated.
    """

    def __init__(self, model: nn.Module, optimizer: InMergeOptimizer, **settings: Any) -> None:
        self.model, self.optimizer = model, optimizer
        self.twin = InMergeOptimizer(Still(model.parameters(), lr=1.0), model, **{**SETTINGS, **settings})
        optimizer.base_optimizer.register_step_post_hook(lambda *_: self._merge())

    def _merge(self) -> None:
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), self._theirs(), strict=True):
                mine.copy_(whole(theirs))
                mine.grad = torch.zeros_like(mine)
        self.twin.param_groups[0]["inmerge_step"] = self.optimizer.param_groups[0]["inmerge_step"]
        self.twin.step()

    def _theirs(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def check(self) -> None:
        """Assert that the weights are those that one process gives, and that both tell the same of the merges."""
        for (name, mine), theirs in zip(self.model.named_parameters(), self._theirs(), strict=True):
            assert same_bits(mine, whole(theirs)), f"{name} is not what one process gives"
        assert_same_counts(self.optimizer.merge_counts(), self.twin.merge_counts())
