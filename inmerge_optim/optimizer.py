"""InMergeOptimizer: any torch optimizer, with in-model merging after each of its steps.

In-Model Merging (InMerge), from Wang, Almakky, Ma, Saeed, Yaqub: "In-Model Merging for Enhancing the Robustness of
Medical Imaging Classification Models".
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Generic, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inmerge_optim.merging import (
    COSINE_UNIT,
    Criterion,
    DrawnLayer,
    Rule,
    Setting,
    check_criterion,
    check_setting,
    draw_pairs,
    merge_layers_,
    parse_threshold,
)
from inmerge_optim.selection import CONVOLUTIONS, KernelLayer, KernelLayers, LayerTypes, kernel_layers, layer_modules
from inmerge_optim.sharding import is_sharded, merge_sharded_layers_

_PAIRS_BEFORE_CHECK = 10_000
_LEAST_MERGED = 1 / 1_000


# What a pickled or copied wrapper takes along, beside its hooks.
_CARRIED = frozenset(
    (
        "base_optimizer",
        "criterion",
        "seed",
        "_settings",
        "_listed",
        "_modules",
        "_addresses",
        "_drawn",
        "_tallies",
        "_rate_checked",
    )
)


class NoMergeWarning(UserWarning):
    """The settings merge next to nothing in this model, so that the run is nearly a plain baseline."""


class _Address(NamedTuple):
    """Where a layer's weight is among the optimizer's parameters, and the shape that it must have there.

    Parameters are looked up anew at every step, because FSDP2 and accelerate replace them.
    """

    layer: int
    group: int
    position: int
    shape: torch.Size


class _Setting(Generic[Setting]):
    """A setting that may be changed between steps, and is checked when it is."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: InMergeOptimizer, owner: type | None = None) -> Setting:
        value: Setting = instance._settings[self.name]
        return value

    def __set__(self, instance: InMergeOptimizer, value: Setting) -> None:
        instance._settings[self.name] = check_setting(self.name, value)


class InMergeOptimizer(Optimizer):
    """Wrap a torch optimizer so that similar kernels of deep layers are merged after each step (Algorithm 1).

    After a step that updated a selected layer, each of its kernels is drawn with probability ``merge_prob`` and given
    another kernel of the layer as a partner. If the cosine of the two is above ``similarity_threshold``, the kernel
    becomes ``merge_weight`` times itself plus ``1 - merge_weight`` times its partner. The wrapper holds no optimizer
    state of its own: ``param_groups``, ``state`` and ``defaults`` are the base's, and the step number that keys the
    random choices lives in the param groups as ``inmerge_step``, so that checkpoints resume exactly.

    Hand the wrapper, not the base, to schedulers, gradient scalers and ``accelerator.prepare``.

    Args:
        base_optimizer: any torch optimizer, built on the model's parameters, not yet prepared by accelerate.
        model: the model whose kernels are merged; see kernel_layers for what is unwrapped.
        skip_layers: L_s, how many shallow layers are left alone: an int, or a fraction in [0, 1) as a float.
        merge_prob: p, in [0, 1]. It may be changed between steps, as may the next two.
        merge_weight: alpha, in [0, 1], the share that a merged kernel keeps of itself.
        similarity_threshold: tau; a cosine must be above it. A number in [-1, 1], as in the paper, or a text that
            means the same in every layer: "4sd" for 4 standard deviations of the cosine of two random rows, which are
            1/sqrt(d) for kernels of d weights; "q0.9" for the quantile, in [0, 1], of the cosines of the pairs that
            the step draws in the layer, by which a tenth of them merges.
        criterion: "similar" as in the paper; as controls, "dissimilar" merges the pairs whose cosine is not above
            tau (the paper's Fig. 2b), and "any" as many as "similar" does, but whatever their cosine.
        seed: with the step number it determines all random choices, the same on every rank.
        names: the layers to merge outright, as a regular expression or a sequence of names.
        layer_types: the classes of layers to look at.
        example_inputs: what to call the model with, for a model that has no size of its own.

    Attributes:
        layers: a KernelLayer per layer of the model, with those selected and the reason where not.

    Raises:
        TypeError: ``base_optimizer`` is no torch optimizer, is prepared by accelerate, or is wrapped already.
        ValueError: a setting out of range, or no selected layer whose weight is in the optimizer.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1),
        ...                       nn.Flatten(), nn.Linear(8, 2))
        >>> optimizer = InMergeOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model, skip_layers=1)
        >>> model(torch.zeros(4, 3, 32, 32)).sum().backward()
        >>> optimizer.step()
        >>> [layer.name for layer in optimizer.layers if layer.selected]
        ['2']
    """

    merge_prob = _Setting[float]()
    merge_weight = _Setting[float]()
    similarity_threshold = _Setting[float | str]()

    def __init__(
        self,
        base_optimizer: Optimizer,
        model: nn.Module,
        *,
        skip_layers: float = 0.6,
        merge_prob: float = 0.3,
        merge_weight: float = 0.8,
        similarity_threshold: float | str = 0.3,
        criterion: Criterion = "similar",
        seed: int = 0,
        names: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        layer_types: LayerTypes = CONVOLUTIONS,
        example_inputs: Any = None,
    ) -> None:
        # Optimizer.__init__ is not called on purpose: it would build param groups and state beside the base's.
        _check_base(base_optimizer)
        _check_not_fsdp1(model)
        self.base_optimizer = base_optimizer
        super().__setstate__({})  # the hook dicts of the installed torch
        self._settings: dict[str, Any] = {}
        self.merge_prob = merge_prob
        self.merge_weight = merge_weight
        self.similarity_threshold = similarity_threshold
        self.criterion = check_criterion(criterion)
        self.seed = _check_seed(seed)
        self._listed = kernel_layers(
            model, skip_layers, layer_types=layer_types, example_inputs=example_inputs, names=names, exclude=exclude
        )
        self._modules = layer_modules(model, self._listed)
        self._addresses: list[_Address] = []
        self._drawn: dict[int, int] = {}
        self._tallies: dict[int, Tensor] = {}  # of merge_rows_, added up
        self._rate_checked = False
        self._bind()
        if not self._addresses:
            raise ValueError(_nothing_to_merge(self.layers, type(model).__name__))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's parameter groups."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = param_groups

    @property
    def state(self) -> Any:
        """The base's state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base_optimizer.defaults = defaults

    # A scaler that sees True here leaves overflows to the step, which then can't know on the host that it was skipped.
    _step_supports_amp_scaling = False

    @property
    def is_second_order(self) -> bool:
        """Whether the base differentiates gradients again (timm's training script asks)."""
        return bool(getattr(self.base_optimizer, "is_second_order", False))

    @property
    def layers(self) -> KernelLayers:
        """The layers of kernel_layers as bound: "not in the optimizer" is a reason, "frozen" a remark for now."""
        bound = {address.layer: address for address in self._addresses}
        listed = []
        for layer in self._listed:
            if layer.selected and layer.index not in bound:
                layer = replace(layer, selected=False, reason="not in the optimizer")
            elif layer.selected and not self._weight(bound[layer.index]).requires_grad:
                layer = replace(layer, reason="frozen")
            listed.append(layer)
        return KernelLayers(listed)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the base make its step, then merge kernels of the layers that it updated.

        Args:
            closure: reevaluates the model and returns the loss, for bases that take one.

        Returns:
            What the base's step returns.
        """
        had_grad = [self._weight(address).grad is not None for address in self._addresses]
        loss = self.base_optimizer.step() if closure is None else self.base_optimizer.step(closure)
        self._merge(had_grad)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the base does."""
        self.base_optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; selected layers whose weights it holds are merged from now on."""
        self.base_optimizer.add_param_group(param_group)
        self._bind()

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state dict; the step number of the merging is in its param groups."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = self.base_optimizer.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            state_dict = after(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the wrapper, or of the bare base (merging then starts at step 0)."""
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        self.base_optimizer.load_state_dict(state_dict)
        for group in self.param_groups:
            group.setdefault("inmerge_step", 0)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def train(self) -> None:
        """Put the base in training mode, if it has modes (schedule-free optimizers)."""
        if hasattr(self.base_optimizer, "train"):
            self.base_optimizer.train()

    def eval(self) -> None:
        """Put the base in evaluation mode, if it has modes (schedule-free optimizers)."""
        if hasattr(self.base_optimizer, "eval"):
            self.base_optimizer.eval()

    def merge_counts(self) -> dict[str, dict[str, int]]:
        """Return how many pairs were drawn and merged per layer since this process started; waits for the device."""
        return {
            self._listed[address.layer].name: {
                "drawn": self._drawn.get(address.layer, 0),
                "merged": self._tally(address.layer)[0],
            }
            for address in self._addresses
        }

    def merged_cosines(self) -> dict[str, float]:
        """Return the sum of the cosines of the merged pairs per layer since this process started; waits for the device.

        Over ``merged`` of merge_counts it is their mean, and what both gained between two calls gives the mean of the
        steps in between. Each cosine is rounded to 2**-24, so that the sum is exact, on sharded weights too.
        """
        return {
            self._listed[address.layer].name: self._tally(address.layer)[1] * COSINE_UNIT for address in self._addresses
        }

    def __repr__(self) -> str:
        counted = sum(layer.depth is not None for layer in self._listed) or len(self._listed)
        settings = ", ".join(f"{name}={_text(value)}" for name, value in self._settings.items())
        return (
            f"{type(self).__name__}({settings}, criterion={self.criterion!r}, seed={self.seed}, "
            f"merging {len(self._addresses)} of {counted} layers, base_optimizer={self.base_optimizer!r})"
        )

    def __getstate__(self) -> dict[str, Any]:
        # Schedulers and accelerate put a ``step`` on the instance that is bound to it: it must not travel to a copy.
        return {name: value for name, value in vars(self).items() if name in _CARRIED or name.endswith("_hooks")}

    def _tally(self, layer: int) -> list[int]:
        found: list[int] = self._tallies[layer].tolist() if layer in self._tallies else [0, 0]
        return found

    def _weight(self, address: _Address) -> Tensor:
        parameters: list[Tensor] = []
        if address.group < len(self.param_groups):
            parameters = self.param_groups[address.group]["params"]
        weight = parameters[address.position] if address.position < len(parameters) else None
        if weight is None or weight.shape != address.shape:
            found = "nothing" if weight is None else f"shape {tuple(weight.shape)}"
            raise RuntimeError(
                f"the weight of {self._listed[address.layer].name} had shape {tuple(address.shape)} when the optimizer "
                f"was wrapped, but its place among the parameters now holds {found}: the parameters were flattened or "
                "replaced (DeepSpeed ZeRO, FSDP1), and kernels no longer exist as such; use DDP or FSDP2"
            )
        return weight

    def _bind(self) -> None:
        """Find the addresses of selected layers that have none yet, and give every group the step number."""
        places = {
            id(parameter): (index, position)
            for index, group in enumerate(self.param_groups)
            for position, parameter in enumerate(group["params"])
        }
        bound = {address.layer for address in self._addresses}
        for layer in self._listed:
            weight = self._modules[layer.name]._parameters.get("weight")
            if layer.selected and layer.index not in bound and weight is not None and id(weight) in places:
                if weight.shape[:1] != (layer.kernels,):
                    raise ValueError(
                        f"the weight of {layer.name} has shape {tuple(weight.shape)}, but its layer has "
                        f"{layer.kernels} kernels: the parameters were flattened or partitioned (DeepSpeed ZeRO, "
                        "FSDP1), and kernels no longer exist as such; use DDP or FSDP2"
                    )
                self._addresses.append(_Address(layer.index, *places[id(weight)], weight.shape))
        self._addresses.sort()
        step = max((group.get("inmerge_step", 0) for group in self.param_groups), default=0)
        for group in self.param_groups:
            group.setdefault("inmerge_step", step)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _merge(self, had_grad: list[bool]) -> None:
        if all(_is_zero(group.get("lr")) for group in self.param_groups):
            return
        step = max(group["inmerge_step"] for group in self.param_groups)
        for group in self.param_groups:
            group["inmerge_step"] = step + 1
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, step)))
        layers = [self._listed[address.layer] for address in self._addresses]
        drawn = [draw_pairs(layer.kernels, layer.groups, self.merge_prob, rng) for layer in layers]
        # Drawn after all pairs, so that the criterion "any" has the pairs of "similar".
        shuffles = [rng.permutation(picked.size) for picked, _ in drawn]
        updated = [
            (address.layer, DrawnLayer(self._weight(address).detach(), picked, partners, shuffle))
            for address, had, (picked, partners), shuffle in zip(
                self._addresses, had_grad, drawn, shuffles, strict=True
            )
            if picked.size and self._is_updated(address, had)
        ]
        rule = Rule(self.merge_weight, parse_threshold(self.similarity_threshold), self.criterion)
        for merge, sharded in ((merge_layers_, False), (merge_sharded_layers_, True)):
            chosen = [(index, layer) for index, layer in updated if is_sharded(layer.weight) == sharded]
            for (index, layer), tally in zip(chosen, merge([layer for _, layer in chosen], rule), strict=True):
                self._drawn[index] = self._drawn.get(index, 0) + layer.picked.size
                self._tallies[index] = self._tallies.get(index, 0) + tally
        self._warn_if_nothing_merges()

    def _is_updated(self, address: _Address, had_grad: bool) -> bool:
        """Say whether the base's step changed the weight: it had a gradient, then or now, and a learning rate."""
        weight = self._weight(address)
        has_grad = had_grad or weight.grad is not None  # a closure makes it, some bases zero it inside their step
        return weight.requires_grad and has_grad and not _is_zero(self.param_groups[address.group].get("lr"))

    def _warn_if_nothing_merges(self) -> None:
        drawn = sum(self._drawn.values())
        if self._rate_checked or drawn < _PAIRS_BEFORE_CHECK:
            return
        self._rate_checked = True
        merged = sum(self._tally(layer)[0] for layer in self._tallies)
        main = not torch.distributed.is_available() or not torch.distributed.is_initialized()
        if merged < _LEAST_MERGED * drawn and (main or torch.distributed.get_rank() == 0):
            warnings.warn(
                f"{merged} of the first {drawn} drawn pairs of kernels were merged at a similarity_threshold of "
                f"{_text(self.similarity_threshold)}: so far this run is nearly a plain baseline; a lower threshold, "
                "one that fits each layer ('4sd', 'q0.9') or a model with pretrained weights merges more",
                NoMergeWarning,
                stacklevel=7,  # the line that called step: torch's decorators add three frames
            )


def _check_base(base: Optimizer) -> None:
    if not isinstance(base, Optimizer):
        raise TypeError(f"base_optimizer is a {type(base).__name__}, but it must be a torch.optim.Optimizer")
    if isinstance(base, InMergeOptimizer):
        raise TypeError("base_optimizer is an InMergeOptimizer already: wrap the bare optimizer, once")
    if any(ancestor.__name__ == "AcceleratedOptimizer" for ancestor in type(base).__mro__):
        raise TypeError(
            "base_optimizer is prepared by accelerate already, and would be merged at steps that accumulation or an "
            "overflow skips: wrap first, then prepare the wrapper"
        )


def _check_not_fsdp1(model: nn.Module) -> None:
    # With use_orig_params its weights are pieces of a flat one under their old names, which nothing else tells apart.
    if any(base.__name__ == "FullyShardedDataParallel" for module in model.modules() for base in type(module).__mro__):
        raise ValueError(
            f"{type(model).__name__} is sharded by FSDP1, which flattens the weights, and kernels no longer exist as "
            "such: use DDP or FSDP2 (fully_shard; in accelerate fsdp_version 2)"
        )


def _check_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed is {seed!r}, but it must be an int from 0")
    return int(seed)


def _text(setting: float | str) -> str:
    return repr(setting) if isinstance(setting, str) else f"{setting:g}"


def _is_zero(lr: Any) -> bool:
    """Say whether a learning rate is known on the host to be 0."""
    return bool(lr == 0) if not isinstance(lr, Tensor) or lr.device.type == "cpu" else False


def _nothing_to_merge(layers: list[KernelLayer], model: str) -> str:
    """Return the sentence that says why no layer of a model would be merged."""
    if not layers:
        return f"{model} has no layer of the layer_types: there are no kernels to merge in it"
    reasons = Counter(layer.reason for layer in layers)
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    if "not in the optimizer" in reasons:
        return (
            f"none of the selected layers of {model} has its weight in the optimizer ({why}): build the base on this "
            "model's parameters, and wrap before DeepSpeed ZeRO or FSDP1 flatten them (they are not supported)"
        )
    return f"no layer of {model} is selected for merging ({why}): choose other skip_layers, or give names"
