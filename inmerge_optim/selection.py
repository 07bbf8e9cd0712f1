"""Which kernels: the layers of a model in order of depth, and which of them are merged, with the reason where not."""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from inmerge_optim.callers import user_stacklevel
from inmerge_optim.tables import to_lines
from inmerge_optim.tracing import Trace, kernel_count, trace_layers

LayerTypes = tuple[type[nn.Module], ...]

# What modules that act on each channel alone have an entry of for each: merge_channels makes these equal, and compact
# looks whether they are.
PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")
CONVOLUTIONS: LayerTypes = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# What only a layer's name shows, by the reason that it gives.
_BY_NAME = {
    # Layers that make at once what attention, gating or a state space model then takes apart: two kernels of such a
    # layer may be rows of a query and of a value. By other names than q, k and v: in_proj (parallel ViT), v_gate
    # (iFormer), BCdt_proj and hz_proj (EfficientViM), modulation.f (FocalNet), main.1.pwise (LowFormer, CPUBone).
    "attention": re.compile(
        r"(^|[._])(qkvs?|kv|qk|in_proj|v_gate|BCdt_proj|hz_proj)($|[._])|(^|[.])(modulation[.]f|main[.]1[.]pwise)$"
    ),
    # The two factors of an update, which peft puts beside a layer that it freezes.
    "adapter": re.compile(r"(^|[.])lora_[AB]([.]|$)"),
    # Where a model can't be traced: timm VGG's fully connected convolutions, and the last layers of torchvision's
    # detectors, whose kernels are classes and box coordinates.
    "acts as fully connected": re.compile(r"(^|[.])pre_logits[.]"),
    "classifier": re.compile(
        r"(^|[.])(cls_logits|bbox_(pred|reg|ctrness)|mask_fcn_logits|(classification|regression)_head[.]module_list)"
        r"([.]|$)"
    ),
}
# The classes that hold the model in an attribute, by their full names, since most need not be installed or loaded.
_WRAPPERS = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.optim.swa_utils.AveragedModel": "module",
    "timm.utils.model_ema.ModelEmaV2": "module",
    "timm.utils.model_ema.ModelEmaV3": "module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
    "lightning.fabric.wrappers._FabricModule": "module",
    "lightning_fabric.wrappers._FabricModule": "module",
}


@dataclass(frozen=True)
class KernelLayer:
    """A layer whose kernels could be merged, described.

    Attributes:
        name: its name in the model, as in ``model.named_modules()``.
        index: its place in the list, from 0.
        depth: its place among the counted layers, in order of execution, from 0; None if it is not counted.
        kernels: how many kernels it has: output channels, or rows of a Linear.
        kernel_size: the spatial size of a kernel, (3, 3) say; empty for a Linear.
        groups: the groups of the convolution.
        selected: whether its kernels are merged.
        reason: why it is not selected, or a remark; empty if there is nothing to say.
        per_channel: the modules that its channels go through one by one, and no other layer's, by their names: batch
            norms, and depthwise convolutions with what follows these. So each of its channels is a kernel, a bias and
            what these modules have of it; None where it is more, or where the model was not traced.
    """

    name: str
    index: int
    depth: int | None
    kernels: int
    kernel_size: tuple[int, ...]
    groups: int
    selected: bool
    reason: str = ""
    per_channel: tuple[str, ...] | None = None


class KernelLayers(list[KernelLayer]):
    """The layers of a model; printed, they are a table."""

    def __repr__(self) -> str:
        rows = [
            (
                "-" if layer.depth is None else str(layer.depth),
                layer.name,
                str(layer.kernels),
                "x".join(map(str, layer.kernel_size)) or "-",
                str(layer.groups),
                layer.reason,
            )
            for layer in self
        ]
        columns = ("depth", "layer", "kernels", "kernel size", "groups", "remark")
        counted = sum(layer.depth is not None for layer in self)
        selected = sum(layer.selected for layer in self)
        total = f"{len(self)} layers, {counted} counted, {selected} selected."
        return "\n".join([*to_lines(columns, rows, left_aligned=("layer", "remark")), total])


def kernel_layers(
    model: nn.Module,
    skip_layers: float = 0.6,
    *,
    layer_types: LayerTypes = CONVOLUTIONS,
    example_inputs: Any = None,
    names: str | Sequence[str | KernelLayer] | None = None,
    exclude: str | Sequence[str] | None = None,
    merge_channels: bool = False,
) -> KernelLayers:
    """List the layers of ``model`` that have kernels, and select those to merge (Algorithm 1, ``i < L_s``).

    Depth is the order of first execution, found by running the model on tensors without data in eval mode, which
    computes nothing and leaves nothing behind. A convolution whose output has length 1 in every dimension of space then
    acts as a fully connected layer and is not counted; nor is one with a single kernel, which makes a map to gate by,
    no features; nor are the layers whose kernels are the model's outputs, and adapters.

    Args:
        model: any module; DDP, compiled and accelerate-prepared models are unwrapped.
        skip_layers: L_s. An int skips that many counted layers, a float in [0, 1) that fraction of them, rounded up.
        layer_types: the classes of layers to look at; ``nn.Linear`` may be among them (experimental), transposed
            convolutions may not, since their kernels are not on dim 0.
        example_inputs: what to call a model with that has no size of its own: a size without the batch, such as
            (channels, height, width), or a tensor, whose values don't matter (it may be on the meta device); a tuple of
            them for several arguments, a dict of them for named ones, or for one argument that is a dict. By default
            ``model.pretrained_cfg["input_size"]``, or the channels of the first convolution with a length of 16384 for
            signals, 224x224 for images and 224x224x224 for volumes and videos.
        names: the layers to select outright, whatever their depth and whatever their names mean: a regular expression
            that is searched in the names, or the names themselves, or KernelLayers. Nothing is run or counted then.
            Layers named in a sequence come first in the list, in its order.
        exclude: the layers to leave out, in the same form, also of those that ``names`` picks. They are counted as
            before.
        merge_channels: whether all that a channel has is to be merged, bias, norms and all, along with its kernel.
            Layers are then left out whose channels something else scales or shifts (a norm of other layers' channels as
            well, a layer norm, a layer scale). Named layers are traced for it; where the model is sharded, ``names``
            must be the KernelLayer objects that were had before.

    Returns:
        The layers: executed ones first, in their order, then the others in order of definition.

    Raises:
        ValueError: skip_layers out of range or beyond the depth, names or exclude that match nothing, a model with
            lazy parameters, or a model sharded by FSDP without ``names``.
        TypeError: no module; a layer type without kernels on dim 0; example_inputs of another kind; a selected layer
            whose weight is complex, of 8 bits, or quantised.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(2))
        >>> _ = model(torch.zeros(1, 3, 224, 224))
        >>> kernel_layers(model, skip_layers=1)
        depth  layer  kernels  kernel size  groups  remark
            0  0            8          3x3       1  shallow
            1  2            8          3x3       1
        2 layers, 2 counted, 1 selected.
    """
    wrapped, model = model, unwrap(model)
    described = _described(names)
    traced = names is None or (merge_channels and described is None)
    sharding = _sharding(wrapped) if traced else ""
    if sharding:
        raise ValueError(
            f"{type(model).__name__} is sharded by {sharding} and can't be traced: call kernel_layers before sharding, "
            "and pass names=[layer for layer in layers if layer.selected]"
        )
    skip_layers = check_skip_layers(skip_layers)
    layer_types = _check_layer_types(layer_types)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, layer_types)}
    _check_weights(model, modules)
    excluded = [] if exclude is None else _pick("exclude", exclude, list(modules))
    trace = _trace_or_definition(model, modules, example_inputs) if traced else Trace(per_channel=described or {})
    if names is None:
        listed = [*trace.executed, *(name for name in modules if name not in trace.executed)]
        depths, reasons = _judge_by_depth(listed, modules, trace, skip_layers, type(model).__name__)
    else:
        picked = _pick("names", names, list(modules))
        listed = [*picked, *(name for name in modules if name not in picked)]
        depths, reasons = {}, {name: "" if name in picked else "not named" for name in listed}
    if merge_channels:
        scaled = [name for name in modules if name not in trace.per_channel and not reasons[name]]
        reasons |= dict.fromkeys(scaled, "channels scaled elsewhere")
    reasons |= dict.fromkeys(excluded, "excluded")
    layers = _describe(listed, modules, depths, reasons, trace.per_channel)
    selected = sum(layer.selected for layer in layers)
    if 10 * selected < len(depths):
        warnings.warn(
            f"only {selected} of the {len(depths)} counted layers of {type(model).__name__} are selected for "
            "merging; the reason of each layer says why, skip_layers or names select others",
            stacklevel=user_stacklevel(),
        )
    return layers


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model itself of one that DDP, a compiler, FSDP1, an average of weights or accelerate has wrapped.

    Wrappers are known by their class: a model may have an attribute of its own that is called ``module``.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, but it must be a torch.nn.Module")
    classes = [f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__]
    attribute = next((_WRAPPERS[name] for name in classes if name in _WRAPPERS), None)
    inner = getattr(model, attribute) if attribute else vars(model).get("_orig_mod")  # of accelerate's compiled regions
    return unwrap(inner) if isinstance(inner, nn.Module) else model


def layer_modules(model: nn.Module, layers: Iterable[KernelLayer]) -> dict[str, nn.Module]:
    """Return the modules of ``model`` that ``layers`` describe, by their names."""
    model = unwrap(model)
    return {layer.name: model.get_submodule(layer.name) for layer in layers}


def obstacle(module: nn.Module) -> str:
    """Return why the weight of a layer can't be merged as it stands now, or an empty string.

    It is "parametrized" if it is computed from other tensors (also by pruning), so that writing to it would be lost;
    otherwise the reason names the kind of numbers that it holds.
    """
    weight = module._parameters.get("weight")
    if type(weight) is nn.Parameter and weight.dtype is torch.float32:  # nearly all, at every step
        return ""
    if not isinstance(weight, nn.Parameter):
        return "parametrized"
    if type(weight).__module__.partition(".")[0] == "torchao":
        return f"{type(weight).__name__} weight"
    if not weight.is_floating_point() or weight.dtype.itemsize == 1:
        return f"{str(weight.dtype).removeprefix('torch.')} weight"
    return ""


def check_skip_layers(skip_layers: float) -> float:
    """Return L_s as Python's int or float; a ValueError for what can be no L_s, whatever the model."""
    if isinstance(skip_layers, Integral) and not isinstance(skip_layers, bool) and skip_layers >= 0:
        return int(skip_layers)
    if isinstance(skip_layers, Real) and not isinstance(skip_layers, Integral) and 0 <= skip_layers < 1:
        return float(skip_layers)
    raise ValueError(f"skip_layers is {skip_layers!r}, but it must be an int from 0 or a float from 0 to below 1")


def _check_layer_types(layer_types: LayerTypes) -> LayerTypes:
    for layer_type in layer_types:
        if issubclass(layer_type, _TRANSPOSED) or not issubclass(layer_type, (*CONVOLUTIONS, nn.Linear)):
            raise TypeError(
                f"layer_types has {layer_type.__name__}, but kernels are known for Conv1d, Conv2d, Conv3d and Linear "
                "and their subclasses alone, which have one per row of the weight"
            )
    return tuple(layer_types)


def _check_weights(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Refuse a model without weights yet, or with none but quantised ones."""
    lazy = next((name for name, parameter in model.named_parameters() if is_lazy(parameter)), None)
    if lazy is not None:
        raise ValueError(f"{lazy} is lazy and has no shape yet: run a batch through the model first")
    for name, module in {} if modules else model.named_modules():
        if any(base.__name__ == "WeightedQuantizedModule" for base in type(module).__mro__):
            raise TypeError(
                f"{name} is a quantised {type(module).__name__}, which has no kernels to merge: take the model as it "
                "was before quantisation"
            )


def _pick(option: str, wanted: str | Sequence[str | KernelLayer], known: list[str]) -> list[str]:
    """Return the layers that a regular expression or a sequence of names picks, in its order."""
    if isinstance(wanted, str):
        try:
            picked = [name for name in known if re.search(wanted, name)]
        except re.error as error:
            raise ValueError(f"{option} is {wanted!r}, but that is no regular expression: {error}") from error
        if not picked:
            raise ValueError(f"{option} is {wanted!r}, but no layer matches it; the layers are {', '.join(known)}")
        return picked
    if not isinstance(wanted, Iterable):
        raise TypeError(f"{option} is {wanted!r}, but it must be a regular expression or a sequence of names")
    picked = list(dict.fromkeys(item.name if isinstance(item, KernelLayer) else item for item in wanted))
    for name in picked:
        if name not in known:
            near = difflib.get_close_matches(str(name), known) or known
            raise ValueError(f"{option} has {name!r}, but the model has no such layer; near ones: {', '.join(near)}")
    return picked


def _judge_by_depth(
    listed: list[str], modules: Mapping[str, nn.Module], trace: Trace, skip_layers: float, model: str
) -> tuple[dict[str, int], dict[str, str]]:
    """Return the depths of the layers that are counted, and why layers are left out for what they do."""
    uncounted = {name: _uncounted(name, trace) for name in listed}
    features = [name for name in listed if not uncounted[name] and kernel_count(modules[name]) > 1]  # one gates
    depths = {name: depth for depth, name in enumerate(features)}
    skipped = _skipped_depth(skip_layers, len(features), model)
    reasons = {}
    for name in listed:
        shallow = name in depths and depths[name] < skipped
        attention = bool(_BY_NAME["attention"].search(name))
        reasons[name] = uncounted[name] or ("shallow" if shallow else "attention" if attention else "")
    return depths, reasons


def _uncounted(name: str, trace: Trace) -> str:
    """Return why a layer has no place in the depth, or an empty string."""
    if _BY_NAME["adapter"].search(name):
        return "adapter"
    if name in trace.fully_connected:
        return "acts as fully connected"
    if name in trace.classifiers:
        return "classifier"
    return "" if name in trace.executed else "not executed"


def _skipped_depth(skip_layers: float, counted: int, model: str) -> int:
    if isinstance(skip_layers, float):
        return math.ceil(round(skip_layers * counted, 6))  # .55 of 20 is 11, though the product is a little more
    if skip_layers >= counted > 0:
        raise ValueError(f"skip_layers is {skip_layers}, but {model} has {counted} counted layers: skip fewer")
    return skip_layers


def _describe(
    listed: list[str],
    modules: Mapping[str, nn.Module],
    depths: Mapping[str, int],
    reasons: Mapping[str, str],
    per_channel: Mapping[str, tuple[str, ...]],
) -> KernelLayers:
    """Describe the layers, and leave out those whose weights can't be merged, and the repetitions of a tied weight."""
    owners: dict[int, str] = {}
    layers = KernelLayers()
    for index, name in enumerate(listed):
        module = modules[name]
        groups = getattr(module, "groups", 1)
        weight = module._parameters.get("weight")
        owner = name if weight is None else owners.setdefault(id(weight), name)
        reason = f"tied to {owner}" if owner != name else reasons[name] or _unmergeable(name, module)
        layers.append(
            KernelLayer(
                name=name,
                index=index,
                depth=depths.get(name),
                kernels=kernel_count(module),
                kernel_size=tuple(getattr(module, "kernel_size", ())),
                groups=groups,
                selected=not reason,
                reason=reason,
                per_channel=per_channel.get(name),
            )
        )
    return layers


def _described(names: str | Sequence[str | KernelLayer] | None) -> dict[str, tuple[str, ...]] | None:
    """Return what acts on single channels of named layers that are described already; None where any is only named."""
    if isinstance(names, str) or not isinstance(names, Sequence):  # an iterator would be used up here
        return None
    described = {item.name: item.per_channel for item in names if isinstance(item, KernelLayer)}
    if len(described) < len(names):
        return None
    return {name: modules for name, modules in described.items() if modules is not None}


def _unmergeable(name: str, module: nn.Module) -> str:
    """Return why a layer that would be selected can't be merged; numbers that can't be averaged are an error."""
    reason = obstacle(module)
    if reason and reason != "parametrized":
        raise TypeError(
            f"{name} has a {reason}, but kernels are compared and averaged as real numbers of at least 16 bits: leave "
            "the layer out by exclude"
        )
    return reason or ("one kernel per group" if kernel_count(module) == getattr(module, "groups", 1) else "")


def _trace_or_definition(model: nn.Module, modules: Mapping[str, nn.Module], example_inputs: Any) -> Trace:
    """Trace the model; what is left if that fails half-way takes the order of definition, with a warning that says why.

    Detectors fail so, when all their convolutions have run: which boxes are kept depends on data.
    """
    trace = trace_layers(model, modules, example_inputs)
    if trace.problem:
        rest = [name for name in modules if name not in trace.executed]
        warnings.warn(
            f"{type(model).__name__} can't be traced {trace.problem}: {len(rest)} of its {len(modules)} layers are "
            "taken in the order of definition, and which of those act as fully connected is not known; example_inputs "
            "or names may help",
            stacklevel=user_stacklevel(),
        )
        trace.executed += rest
        trace.fully_connected.update(name for name in rest if _BY_NAME["acts as fully connected"].search(name))
        trace.classifiers.update(name for name in modules if _BY_NAME["classifier"].search(name))
    return trace


def _sharding(model: nn.Module) -> str:
    """Return what shards a model, so that running it would exchange data or break it."""
    if not torch.distributed.is_available():
        return ""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    kinds = {FSDPModule: "FSDP2", FullyShardedDataParallel: "FSDP1"}
    found = (name for module in model.modules() for kind, name in kinds.items() if isinstance(module, kind))
    return next(found, "")
