"""What an arm's optimizer merged, epoch by epoch, how far that moved the kernels, and how varied they are after it."""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from inmerge_optim import InMergeOptimizer, KernelLayer, kernel_layers, kernel_ranks
from inmerge_optim.merging import COSINE_UNIT
from inmerge_optim.selection import layer_modules
from inmerge_optim.sharding import is_sharded

from ..options import Options
from .arms import Arm, merge_settings, merging_arms

_NOTHING = (0, 0, 0.0)


class MergeTally:
    """Counts the pairs of a stage from when it was made.

    Args:
        model: whose kernels have ranks; before accelerate prepares it.
        optimizer: before accelerate prepares it; one that merges nothing draws and merges no pairs.
        watched: the layers that have a row per epoch.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, watched: list[KernelLayer]) -> None:
        self._merging = optimizer if isinstance(optimizer, InMergeOptimizer) else None
        self._model, self._watched = model, watched
        self._before = self._totals()
        self._first_merge = FirstMerge(model, self._merging, watched) if self._merging else None

    def merged_pairs(self) -> int:
        """Of this stage so far, for the progress bar; waits for the device."""
        return sum(merged for _, merged, _ in self._totals().values())

    def rows(self, epoch: int, with_ranks: bool = True) -> list[list[Any]]:
        """A row per watched layer: what was merged since the last call, the effective rank of its kernels now, if asked
        for, and how far the first step since then moved them.
        """
        before, self._before = self._before, self._totals()
        rows, moved = [], self._first_merge.moved() if self._first_merge else {}
        ranks = kernel_ranks(self._model, self._watched) if with_ranks else {}
        for layer in (watched.name for watched in self._watched):
            early, late = before.get(layer, _NOTHING), self._before.get(layer, _NOTHING)
            drawn, merged, cosines = (b - a for a, b in zip(early, late, strict=True))
            rows.append(
                [epoch, layer, drawn, merged, cosines / merged if merged else None, ranks.get(layer), moved.get(layer)]
            )
        return rows

    def _totals(self) -> dict[str, tuple[int, int, float]]:
        """Pairs drawn and merged per layer, and the sum of the cosines of those merged; none where none are."""
        if self._merging is None:
            return {}
        counts = self._merging.merge_counts()
        return {
            layer: (count["drawn"], count["merged"], _units((count["mean_cosine"] or 0.0) * count["merged"]))
            for layer, count in counts.items()
        }


class FirstMerge:
    """How far merging moves the kernels: in the first step of each epoch, between the base's update and the step's end.

    To measure every step would cost as much as the merges do. What follows a step of its own accord (rounds after an
    epoch) is not in it. Optimizers that don't call the hooks of their step, as timm's Lookahead, leave it unknown.
    """

    def __init__(self, model: nn.Module, optimizer: InMergeOptimizer, watched: list[KernelLayer]) -> None:
        self._modules: dict[str, Any] = layer_modules(model, watched)
        self._before: dict[str, Tensor] = {}
        self._moved: dict[str, Tensor] = {}
        optimizer.base_optimizer.register_step_post_hook(self._keep)
        optimizer.register_step_post_hook(self._measure)

    def moved(self) -> dict[str, float]:
        """Per layer the norm of what the merge changed over that of the weights, since the last call."""
        moved, self._moved = self._moved, {}
        return {layer: float(share) for layer, share in moved.items()}

    def _keep(self, *_: Any) -> None:
        if not self._moved:
            self._before = {
                layer: module.get_parameter("weight").detach().clone() for layer, module in self._modules.items()
            }

    def _measure(self, *_: Any) -> None:
        before, self._before = self._before, {}
        for layer, weight in before.items():
            now = self._modules[layer].get_parameter("weight").detach()
            self._moved[layer] = _norm(now - weight) / _norm(weight)


def _norm(weight: Tensor) -> Tensor:
    norm = weight.norm()
    return norm.full_tensor() if is_sharded(norm) else norm


def _units(cosines: float) -> float:
    """A sum of cosines to the unit that they are rounded to, so that a resumed process gives the same means."""
    return round(cosines / COSINE_UNIT) * COSINE_UNIT


def watched_layers(model: nn.Module, arm: Arm, options: Options) -> list[KernelLayer]:
    """The layers that an arm merges; of one that merges nothing those that any other arm of the trial does.

    So the baseline has ranks to compare with: did merging lower the rank? None where no arm merges.
    """
    arms = [arm] if arm.criterion else merging_arms(options)
    layers: dict[str, KernelLayer] = {}
    for skip in {merge_settings(other, options)["skip_layers"] for other in arms}:
        layers |= {
            layer.name: layer for layer in kernel_layers(model, skip, merge_channels=options.compact) if layer.selected
        }
    return sorted(layers.values(), key=lambda layer: layer.index)


def looks_at_ranks(epoch: int, epochs: int) -> bool:
    """Whether the ranks after an epoch are told whether or not it is kept: a long stage has ten to twenty such epochs.

    They take as long as its checkpoint, and change slowly.
    """
    return (epochs - epoch) % max(1, epochs // 10) == 0


def total_merges(rows: list[list[Any]]) -> dict[str, dict[str, int]]:
    """Pairs drawn and merged per layer over all epochs."""
    totals: dict[str, dict[str, int]] = {}
    for _, layer, drawn, merged, *_ in rows:
        total = totals.setdefault(layer, {"drawn": 0, "merged": 0})
        total["drawn"] += drawn
        total["merged"] += merged
    return totals
