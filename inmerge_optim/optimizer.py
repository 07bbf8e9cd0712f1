"""InMergeOptimizer: any torch optimizer, with in-model merging after each of its steps.

In-Model Merging (InMerge), from Wang, Almakky, Ma, Saeed, Yaqub: "In-Model Merging for Enhancing the Robustness of
Medical Imaging Classification Models".
"""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inmerge_optim.binding import Binding
from inmerge_optim.callers import user_stacklevel
from inmerge_optim.drawing import draw_layers
from inmerge_optim.kernels import Tallies, merge_layers_
from inmerge_optim.merging import COSINE_UNIT, DrawnLayer
from inmerge_optim.selection import CONVOLUTIONS, KernelLayer, KernelLayers, LayerTypes, kernel_layers
from inmerge_optim.settings import SETTINGS, Criterion, Rule, check_count, check_setting, parse_threshold
from inmerge_optim.sharding import is_sharded, merge_sharded_layers_

_PAIRS_BEFORE_CHECK = 10_000
_LEAST_MERGED = 1 / 1_000
_STEP, _ROUNDS = "inmerge_step", "inmerge_rounds"  # keys of the param groups, so that checkpoints carry the counts
_GROUP_SETTINGS = ("merge_prob", "merge_weight", "similarity_threshold")
# torch's and timm's optimizer protocol beyond torch.optim.Optimizer: found on the wrapper where the base has it.
_FORWARDED = ("is_second_order", "sync_lookahead", "first_step", "train", "eval")
# What a pickled or copied wrapper takes along, beside its settings and hooks.
_CARRIED = ("base_optimizer", "_binding", "_drawn", "_tallies", "_rate_checked")


class NoMergeWarning(UserWarning):
    """The settings merge next to nothing in this model, so that the run is nearly a plain baseline."""


class _Bound(NamedTuple):
    """A layer as it stands at one step: its index in the list, its weight, and the param group that holds it."""

    layer: int
    weight: Tensor
    group: dict[str, Any]
    had_grad: bool
    channels: list[Tensor]

    @property
    def frozen(self) -> bool:
        parameters = [self.weight, *(values for values in self.channels if isinstance(values, nn.Parameter))]
        return not all(parameter.requires_grad for parameter in parameters)


class InMergeOptimizer(Optimizer):
    """Wrap a torch optimizer so that similar kernels of deep layers are merged after each step (Algorithm 1).

    After a step that updated a selected layer, each of its kernels is drawn with probability ``merge_prob`` and given
    another kernel of the layer as a partner. If the cosine of the two is above ``similarity_threshold``, the kernel
    becomes ``merge_weight`` times itself plus ``1 - merge_weight`` times its partner. The wrapper holds no optimizer
    state of its own: ``param_groups``, ``state`` and ``defaults`` are the base's, and the step number that keys the
    random choices lives in the param groups as ``inmerge_step``, so that checkpoints resume exactly.

    Hand the wrapper, not the base, to schedulers, gradient scalers and ``accelerator.prepare``.

    Args:
        base_optimizer: any torch optimizer, built on the model's parameters, not yet prepared by accelerate. A param
            group may hold ``merge_prob``, ``merge_weight`` and ``similarity_threshold`` of its own.
        model: the model whose kernels are merged; see kernel_layers for what is unwrapped.
        skip_layers: L_s, how many shallow layers are left alone: an int, or a fraction in [0, 1) as a float.
        merge_prob: p, in [0, 1].
        merge_weight: alpha, in [0, 1], the share that a merged kernel keeps of itself.
        similarity_threshold: tau; a cosine must be above it. A number in [-1, 1], as in the paper, or a text that
            means the same in every layer: "4sd" for 4 standard deviations of the cosine of two random rows, which are
            1/sqrt(d) for kernels of d weights; "q0.9" for the quantile, in [0, 1], of the cosines of the pairs that
            the step draws in the layer, by which a tenth of them merges.
        criterion: "similar" as in the paper; as controls, "dissimilar" merges the pairs whose cosine is not above
            tau (the paper's Fig. 2b), and "random_pairs" as many as "similar" does, but whatever their cosine.
        seed: with the step number and the layers' names it determines all random choices, the same on every rank. Two
            wrappers of one architecture (an ensemble) draw alike unless they get seeds of their own.
        every: merge after each ``every``-th step, counted from ``merge_start``.
        merge_start: how many steps are made before merging begins.
        merge_stop: the number of steps after which nothing is merged any more; None: it never stops.
        merge_channels: blend along with each kernel its bias, and what the batch norms and depthwise convolutions that
            take the layer's output alone have for its channel: affine parameters, running statistics, kernels. Merged
            kernels then become equal channels, which ``compact`` takes out. Layers are left out whose channels
            something else scales or shifts, and are left alone while any of those parameters is frozen. It is no part
            of the paper, and can't be changed later.
        names: the layers to merge outright, as a regular expression or a sequence of names.
        exclude: the layers to leave alone, likewise.
        layer_types: the classes of layers to look at.
        example_inputs: what the model is traced with, if not an image of its own size; see kernel_layers.

    The settings from ``merge_prob`` to ``merge_stop`` are attributes, which may be changed between steps and are
    checked when they are.

    Attributes:
        layers: a KernelLayer per layer of the model, with those selected and the reason where not.

    Raises:
        TypeError: ``base_optimizer`` is no torch optimizer, is prepared by accelerate, or is wrapped already; ``model``
            is no module; a selected weight is of a dtype that can't be merged.
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

    merge_prob: float
    merge_weight: float
    similarity_threshold: float | str
    criterion: Criterion
    seed: int
    every: int
    merge_start: int
    merge_stop: int | None

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
        every: int = 1,
        merge_start: int = 0,
        merge_stop: int | None = None,
        merge_channels: bool = False,
        names: str | Sequence[str | KernelLayer] | None = None,
        exclude: str | Sequence[str] | None = None,
        layer_types: LayerTypes = CONVOLUTIONS,
        example_inputs: Any = None,
    ) -> None:
        # Optimizer.__init__ is not called on purpose: it would build param groups and state beside the base's.
        _check_base(base_optimizer)
        _check_model(model)
        self.base_optimizer = base_optimizer
        super().__setstate__({})  # the hook dicts of the installed torch
        self.merge_prob = merge_prob
        self.merge_weight = merge_weight
        self.similarity_threshold = similarity_threshold
        self.criterion = criterion
        self.seed = seed
        self.every = every
        self.merge_start = merge_start
        self.merge_stop = merge_stop
        listed = kernel_layers(
            model,
            skip_layers,
            layer_types=layer_types,
            example_inputs=example_inputs,
            names=names,
            exclude=exclude,
            merge_channels=merge_channels,
        )
        self._binding = Binding(listed, model, self.param_groups, merge_channels)
        self._drawn: dict[int, int] = {}
        self._tallies = Tallies(len(self._binding.listed))
        self._rate_checked = False
        if not self._binding.places:
            raise ValueError(_nothing_to_merge(self.layers, type(model).__name__))
        self._binding.warn_of_absent_layers()
        self._count_in_groups()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, check_setting(name, value) if name in SETTINGS else value)

    def __getattr__(self, name: str) -> Any:
        # No blanket forwarding: a scaler that saw the base's flags would leave the gradients scaled.
        base = self.__dict__.get("base_optimizer")
        if name in _FORWARDED and base is not None:
            return getattr(base, name)
        if name == "second_step" and hasattr(base, name):  # the step proper of sharpness-aware bases
            return partial(self._step_and_merge, getattr(base, name))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

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
    def merge_channels(self) -> bool:
        """Whether what else a channel has is blended along with its kernel."""
        return self._binding.merge_channels

    @property
    def layers(self) -> KernelLayers:
        """The layers of kernel_layers as bound: "not in the optimizer" is a reason, "frozen" a remark for now."""
        bound = self._binding.weights(self.param_groups)
        listed = KernelLayers()
        for layer in self._binding.listed:
            if layer.selected and layer.index not in bound:
                reason = self._binding.obstacle(layer.index) or "not in the optimizer"
                layer = replace(layer, selected=False, reason=reason)
            elif layer.selected and not bound[layer.index].requires_grad:
                layer = replace(layer, reason="frozen")
            listed.append(layer)
        return listed

    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Let the base make its step, then merge kernels of the layers that it updated.

        Args:
            closure: reevaluates the model and returns the loss, for bases that take one.
            args: what else the base's step takes, as are ``kwargs``.

        Returns:
            What the base's step returns.
        """
        if closure is not None or args:
            args = (closure, *args)
        return self._step_and_merge(self.base_optimizer.step, *args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def merge(self, rounds: int = 1) -> None:
        """Merge without a step, for schedules of one's own.

        Each round draws and merges in every bound layer that is not frozen, whatever its gradient and learning rate,
        ``every``, ``merge_start`` and ``merge_stop``. Rounds are counted in the param groups as ``inmerge_rounds``,
        apart from the steps, and keyed by that number: a checkpoint goes on with the next one.

        Args:
            rounds: how many, from 0.

        Raises:
            ValueError: ``rounds`` is no int from 0.
        """
        check_count("rounds", rounds)
        bound = self._bound()
        count = self._count(_ROUNDS)
        for number in range(count, count + rounds):
            self._merge(("round", number), bound, [layer for layer in bound if not layer.frozen])
            self._set_count(_ROUNDS, number + 1)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the base does; bases that can't choose (Apex's) are not asked to."""
        if "set_to_none" in inspect.signature(self.base_optimizer.zero_grad).parameters:
            self.base_optimizer.zero_grad(set_to_none=set_to_none)
        else:
            self.base_optimizer.zero_grad()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; selected layers whose weights it holds are merged from now on."""
        self.base_optimizer.add_param_group(param_group)
        self._binding.weights(self.param_groups)
        self._count_in_groups()

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state dict; the step number of the merging is in its param groups."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self._count_in_groups()
        state_dict = self.base_optimizer.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            state_dict = after(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the wrapper, or of the bare base.

        After that of a bare base, merging starts at step 0, and groups keep merge settings of their own.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        own = [{name: group[name] for name in _GROUP_SETTINGS if name in group} for group in self.param_groups]
        self.base_optimizer.load_state_dict(state_dict)
        for group, settings in zip(self.param_groups, own, strict=False):
            for name, value in settings.items():
                group.setdefault(name, value)
        self._count_in_groups()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def merge_counts(self) -> dict[str, dict[str, Any]]:
        """Return per layer what was merged since this process started; it waits for the device.

        Returns:
            By the layer's name: ``drawn`` and ``merged``, numbers of pairs, and ``mean_cosine``, the mean of the
            cosines of the merged ones, each rounded to 2**-24, or None where none was merged. Under FSDP2 all ranks'
            pairs count.
        """
        counts, tallies = {}, self._tallies.read()
        for index in sorted(self._binding.places.keys() | self._drawn.keys()):
            merged, units = tallies[index]
            counts[self._binding.listed[index].name] = {
                "drawn": self._drawn.get(index, 0),
                "merged": merged,
                "mean_cosine": units * COSINE_UNIT / merged if merged else None,
            }
        return counts

    def __repr__(self) -> str:
        listed = self._binding.listed
        counted = sum(layer.depth is not None for layer in listed) or len(listed)
        settings = ", ".join(f"{name}={_text(getattr(self, name))}" for name in SETTINGS)
        settings += ", merge_channels=True" if self.merge_channels else ""
        return (
            f"{type(self).__name__}({settings}, merging {len(self._binding.places)} of {counted} layers, "
            f"base_optimizer={self.base_optimizer!r})"
        )

    def __getstate__(self) -> dict[str, Any]:
        # Schedulers and accelerate put a ``step`` on the instance that is bound to it: it must not travel to a copy.
        return {
            name: value
            for name, value in vars(self).items()
            if name in _CARRIED or name in SETTINGS or name.endswith("_hooks")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._binding.bind_places(self.param_groups)

    def _step_and_merge(self, base_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Let the base step, then merge; whatever is wrong with the merge is raised before the base steps."""
        bound = self._bound()
        loss = base_step(*args, **kwargs)
        self._merge_after_step(bound)
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _bound(self) -> list[_Bound]:
        """Find the weights of the layers to merge among the parameters as they are now, in the order of the layers."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a step of InMergeOptimizer is being captured in a CUDA graph, which would replay its random choices "
                "for ever: capture the forward and backward pass alone, and step outside the graph"
            )
        found = self._binding.weights(self.param_groups)
        self._binding.warn_of_absent_layers()
        groups, places = self.param_groups, self._binding.places
        bound = [
            _Bound(
                index,
                weight,
                groups[places[index].group],
                weight.grad is not None,
                self._binding.channels(index, weight),
            )
            for index, weight in found.items()
        ]
        for group in _groups_of(bound).values():
            for name in _GROUP_SETTINGS:
                if name in group:
                    check_setting(name, group[name])
        return bound

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _merge_after_step(self, bound: list[_Bound]) -> None:
        if all(_is_zero(group.get("lr")) for group in self.param_groups):
            return
        step = self._count(_STEP)
        self._set_count(_STEP, step + 1)
        if self._is_due(step):
            self._merge(("step", step), bound, [layer for layer in bound if _is_updated(layer)])

    def _is_due(self, step: int) -> bool:
        """Say whether kernels are merged after the step with this number, from 0."""
        started = step - self.merge_start
        return started >= 0 and (self.merge_stop is None or step < self.merge_stop) and (started + 1) % self.every == 0

    @torch.no_grad()
    def _merge(self, key: tuple[str, int], bound: list[_Bound], chosen: list[_Bound]) -> None:
        """Draw for all bound layers, by a key that says which step or round it is, and merge in the chosen ones."""
        if not chosen:
            return
        listed = [self._binding.listed[layer.layer] for layer in bound]
        rng = _generator(self.seed, *key, *(layer.name for layer in listed))
        groups = _groups_of(bound)
        probs = {owner: group.get("merge_prob", self.merge_prob) for owner, group in groups.items()}
        rules = {owner: self._rule(group) for owner, group in groups.items()}
        sizes = [(layer.kernels, layer.groups) for layer in listed]
        owners = [id(layer.group) for layer in bound]
        drawn = draw_layers(
            sizes, [probs[owner] for owner in owners], rng, [rules[owner].needs_order for owner in owners]
        )
        updated = {layer.layer for layer in chosen}
        whole: dict[int, DrawnLayer] = {}
        sharded: dict[int, DrawnLayer] = {}
        for layer, pairs, owner in zip(bound, drawn, owners, strict=True):
            if layer.layer in updated and pairs.picked.size:
                kind = sharded if is_sharded(layer.weight) else whole
                channels = tuple(values.detach() for values in layer.channels)
                kind[layer.layer] = DrawnLayer(layer.weight.detach(), pairs, rules[owner], channels=channels)
        merge_layers_(whole, self._tallies)
        merge_sharded_layers_(sharded, self._tallies)
        for index, merged in (whole | sharded).items():
            self._drawn[index] = self._drawn.get(index, 0) + merged.pairs.picked.size
        self._warn_if_nothing_merges()

    def _rule(self, group: dict[str, Any]) -> Rule:
        threshold = parse_threshold(group.get("similarity_threshold", self.similarity_threshold))
        return Rule(group.get("merge_weight", self.merge_weight), threshold, self.criterion)

    def _count(self, key: str) -> int:
        return max((int(group.get(key, 0)) for group in self.param_groups), default=0)

    def _set_count(self, key: str, value: int) -> None:
        for group in self.param_groups:
            group[key] = value

    def _count_in_groups(self) -> None:
        """Give the groups that have none (added behind the wrapper, of a bare checkpoint) the counts of the others."""
        for key in (_STEP, _ROUNDS):
            count = self._count(key)
            for group in self.param_groups:
                group.setdefault(key, count)

    def _warn_if_nothing_merges(self) -> None:
        drawn = sum(self._drawn.values())
        if self._rate_checked or drawn < _PAIRS_BEFORE_CHECK:
            return
        self._rate_checked = True
        merged = sum(merged for merged, _ in self._tallies.read())
        main = not torch.distributed.is_available() or not torch.distributed.is_initialized()
        if merged < _LEAST_MERGED * drawn and (main or torch.distributed.get_rank() == 0):
            warnings.warn(
                f"{merged} of the first {drawn} drawn pairs of kernels were merged at a similarity_threshold of "
                f"{_text(self.similarity_threshold)}: so far this run is nearly a plain baseline; a lower threshold, "
                "one that fits each layer ('4sd', 'q0.9') or a model with pretrained weights merges more",
                NoMergeWarning,
                stacklevel=user_stacklevel(),
            )


def _generator(*key: int | str) -> np.random.Generator:
    """Return the generator of the random choices that belong to a key; other keys have others, without collisions."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(key).encode()).digest(), "little"))


def _groups_of(bound: list[_Bound]) -> dict[int, dict[str, Any]]:
    """Return the param groups of some layers, by identity: they are few, and their settings are read once."""
    return {id(layer.group): layer.group for layer in bound}


def _is_updated(layer: _Bound) -> bool:
    """Say whether the base's step changed the weight: it had a gradient, then or now, and a learning rate."""
    has_grad = layer.had_grad or layer.weight.grad is not None  # a closure makes it, some bases zero it in their step
    return not layer.frozen and has_grad and not _is_zero(layer.group.get("lr"))


def _check_base(base: Optimizer) -> None:
    if not isinstance(base, Optimizer):
        raise TypeError(f"base_optimizer is a {type(base).__name__}, but it must be a torch.optim.Optimizer")
    for inner in _chain(base):
        if isinstance(inner, InMergeOptimizer):
            raise TypeError("base_optimizer is or holds an InMergeOptimizer already: wrap the bare optimizer, once")
        if any(ancestor.__name__ == "AcceleratedOptimizer" for ancestor in type(inner).__mro__):
            raise TypeError(
                "base_optimizer is prepared by accelerate already, and would be merged at steps that accumulation or "
                "an overflow skips: wrap first, then prepare the wrapper"
            )


def _chain(base: Optimizer) -> list[Optimizer]:
    """Return an optimizer and those that it wraps, whatever it calls them."""
    found = [base]
    for optimizer in found:  # grows as it is walked
        inner = [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
        found += [value for value in inner if not any(value is known for known in found)]
    return found


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, but it must be the torch.nn.Module whose parameters the optimizer has"
        )
    # With use_orig_params its weights are pieces of a flat one under their old names, which nothing else tells apart.
    if any(base.__name__ == "FullyShardedDataParallel" for module in model.modules() for base in type(module).__mro__):
        raise ValueError(
            f"{type(model).__name__} is sharded by FSDP1, which flattens the weights, and kernels no longer exist as "
            "such: use DDP or FSDP2 (fully_shard; in accelerate fsdp_version 2)"
        )


def _text(setting: Any) -> str:
    return f"{setting:g}" if isinstance(setting, float) else repr(setting)


def _is_zero(lr: Any) -> bool:
    """Say whether a learning rate is known on the host to be 0."""
    return bool(lr == 0) if not isinstance(lr, Tensor) or lr.device.type == "cpu" else False


def _nothing_to_merge(layers: KernelLayers, model: str) -> str:
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
