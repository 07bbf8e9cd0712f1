"""Controls of a merging arm: a kernel that would be merged changes by as much as the merge, and not towards another.

Is it the partner that matters, or would any change of that size do? Merging pulls a kernel towards another, which also
makes it shorter, as weight decay does, and moves it, as noise does.

- "norm" scales the kernel to the norm that the merge would give it, and leaves its direction: a weight decay of the
  kernels that merge (A. Krogh, J. A. Hertz, "A Simple Weight Decay Can Improve Generalization", NIPS 1991).
- "noise" adds Gaussian noise, as long as the way that the merge would move the kernel: noise in the weights regularises
  as well (A. F. Murray, P. J. Edwards, "Enhanced MLP Performance and Fault Tolerance Resulting from Synaptic Weight
  Noise During Training", IEEE Transactions on Neural Networks 5, 1994).
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inmerge_optim import InMergeOptimizer

from .randomness import keyed_generator

Control = Literal["norm", "noise"]


class ControlOptimizer(InMergeOptimizer):
    """InMergeOptimizer whose merges, after steps and in rounds, are each replaced by a change of the same size.

    It draws and accepts the pairs that InMergeOptimizer would from the same weights, and counts them.

    Args:
        control: what stands in for a merge.
        settings: of InMergeOptimizer.
    """

    def __init__(self, base_optimizer: Optimizer, model: nn.Module, control: Control, **settings: Any) -> None:
        super().__init__(base_optimizer, model, **settings)
        self.control = control

    @torch.no_grad()
    def _merge(self, key: tuple[str, int], bound: Any, chosen: Any) -> None:
        """Copy, merge, and put in each merged kernel's place what the control makes of it.

        All merges go through here, those after steps and those in rounds, with what keys their draws.
        """
        weights = {layer.layer: layer.weight.detach() for layer in chosen}
        before = {index: weight.clone() for index, weight in weights.items()}
        channels = [(values, values.detach().clone()) for layer in chosen for values in layer.channels]
        super()._merge(key, bound, chosen)
        for values, old in channels:  # with merge_channels; the control is about the kernels alone
            values.copy_(old)
        for index, weight in weights.items():
            merged = (weight != before[index]).flatten(1).any(1).nonzero()[:, 0]
            old, new = (_rows(kernels, merged) for kernels in (before[index], weight))
            controlled = self._controlled(old, new, keyed_generator(self.seed, f"noise {index}", *key))
            weight.index_copy_(0, merged, controlled.to(weight.dtype).reshape(-1, *weight.shape[1:]))

    def _controlled(self, old: Tensor, new: Tensor, rng: np.random.Generator) -> Tensor:
        if self.control == "norm":
            return scaled_to_norms(old, new)
        return moved_as_far(old, new, torch.from_numpy(rng.standard_normal(old.shape)).to(old))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "control": self.control}


def _rows(kernels: Tensor, chosen: Tensor) -> Tensor:
    """Kernels as rows, in float32 at least."""
    return kernels[chosen].flatten(1).to(torch.promote_types(kernels.dtype, torch.float32))


def scaled_to_norms(old: Tensor, new: Tensor) -> Tensor:
    """Rows in the direction of `old` with the norms of `new`, both (kernels, weights); a row of zeros stays one."""
    lengths = old.norm(dim=1, keepdim=True)
    return old * (new.norm(dim=1, keepdim=True) / torch.where(lengths > 0, lengths, 1))


def moved_as_far(old: Tensor, new: Tensor, directions: Tensor) -> Tensor:
    """Rows of `old` moved in the given directions as far as `new` lies from them."""
    return old + directions * ((new - old).norm(dim=1, keepdim=True) / directions.norm(dim=1, keepdim=True))
