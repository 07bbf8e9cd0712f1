"""Which kernels: the layers of a model in order of depth, and which of them are merged, with the reason where not."""

from __future__ import annotations

import copy
import difflib
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

LayerTypes = tuple[type[nn.Module], ...]

CONVOLUTIONS: LayerTypes = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)
# Layers that make at once what attention, gating or a state space model then takes apart: two kernels of such a layer
# may be rows of a query and of a value. By other names than q, k and v: in_proj (parallel ViT), v_gate (iFormer),
# BCdt_proj and hz_proj (EfficientViM), modulation.f (FocalNet), main.1.pwise (LowFormer, CPUBone).
_FUSED_ATTENTION = re.compile(
    r"(^|[._])(qkvs?|kv|qk|in_proj|v_gate|BCdt_proj|hz_proj)($|[._])|(^|[.])(modulation[.]f|main[.]1[.]pwise)$"
)
# What is known by its name where a model can't be run: timm VGG's fully connected convolutions, and the last layers of
# torchvision's detectors, whose kernels are classes and box coordinates.
_PRE_LOGITS = re.compile(r"(^|[.])pre_logits[.]")
_PREDICTORS = re.compile(
    r"(^|[.])(cls_logits|bbox_(pred|reg|ctrness)|mask_fcn_logits|(classification|regression)_head[.]module_list)([.]|$)"
)
_PREDICTIONS = ("out", "aux", "logits")  # in the outputs of segmentation models


@dataclass(frozen=True)
class KernelLayer:
    """A layer whose kernels could be merged.

    Attributes:
        name: its name in the model, as in ``model.named_modules()``.
        index: its place in the list, from 0.
        depth: its place among the counted layers, in order of execution, from 0; None if it is not counted.
        module: the layer.
        kernels: how many kernels it has: output channels, or rows of a Linear.
        kernel_size: the spatial size of a kernel, (3, 3) say; empty for a Linear.
        groups: the groups of the convolution.
        selected: whether its kernels are merged.
        reason: why it is not selected, or a remark; empty if there is nothing to say.
    """

    name: str
    index: int
    depth: int | None
    module: nn.Module
    kernels: int
    kernel_size: tuple[int, ...]
    groups: int
    selected: bool
    reason: str = ""


@dataclass
class _Trace:
    """What one run of a model shows of its layers.

    Attributes:
        executed: their names, in order of first execution.
        fully_connected: those whose output is 1x1 in space.
        classifiers: those whose kernels are the model's outputs.
    """

    executed: list[str] = field(default_factory=list)
    fully_connected: set[str] = field(default_factory=set)
    classifiers: set[str] = field(default_factory=set)


def kernel_layers(
    model: nn.Module,
    skip_layers: float = 0.6,
    *,
    layer_types: LayerTypes = CONVOLUTIONS,
    input_size: Sequence[int] | None = None,
    names: str | Sequence[str] | None = None,
) -> list[KernelLayer]:
    """List the layers of ``model`` that have kernels, and select those to merge (Algorithm 1, ``i < L_s``).

    Depth is the order of first execution, found by running a copy of the model without weights (on the meta device,
    in eval mode) at the model's own input size. A convolution whose output is 1x1 in space there acts as a fully
    connected layer and is not counted; nor is one with a single kernel, which makes a map to gate by, no features.

    Args:
        model: any module; DDP, compiled and accelerate-prepared models are unwrapped.
        skip_layers: L_s. An int skips that many counted layers, a float in [0, 1) that fraction of them, rounded up.
        layer_types: the classes of layers to look at; ``nn.Linear`` may be among them (experimental), transposed
            convolutions may not, since their kernels are not on dim 0.
        input_size: (channels, height, width) for a model that has no size of its own; otherwise
            ``model.pretrained_cfg["input_size"]``, or (channels of the first convolution, 224, 224).
        names: the layers to select outright, whatever their depth: a regular expression that is searched in the
            names, or the names themselves. Nothing is run or counted then. Layers named in a sequence come first in
            the list, in its order.

    Returns:
        The layers: executed ones first, in their order, then the others in order of definition.

    Raises:
        ValueError: skip_layers out of range or beyond the depth, names that match nothing, or a model sharded by
            FSDP2 without ``names`` (which can't be run on the meta device).
        TypeError: a layer type without kernels on dim 0.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(2))
        >>> _ = model(torch.zeros(1, 3, 224, 224))
        >>> [(layer.name, layer.selected, layer.reason) for layer in kernel_layers(model, skip_layers=1)]
        [('0', False, 'shallow'), ('2', True, '')]
    """
    _check_arguments(skip_layers, layer_types)
    model = unwrap_model(model)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, layer_types)}
    if names is not None:
        picked = _pick_names(names, list(modules))
        listed = [*picked, *(name for name in modules if name not in picked)]
        return _number([_select_named(name, modules, picked) for name in listed])
    trace = _trace_or_definition(model, modules, input_size)
    listed = [*trace.executed, *(name for name in modules if name not in trace.executed)]
    maps = {name for name in modules if _kernels(modules[name]) == 1}  # gates of attention, not features
    uncounted = trace.fully_connected | trace.classifiers | maps
    depths = {name: depth for depth, name in enumerate(n for n in trace.executed if n not in uncounted)}
    skipped = _skipped_depth(skip_layers, len(depths), type(model).__name__)
    layers = _number([_select_by_depth(name, modules[name], trace, depths, skipped) for name in listed])
    selected = sum(layer.selected for layer in layers)
    if selected < 0.1 * len(depths):
        warnings.warn(
            f"only {selected} of the {len(depths)} counted layers of {type(model).__name__} are selected for "
            "merging; the reason of each layer says why, skip_layers or names select others",
            stacklevel=2,
        )
    return layers


def _check_arguments(skip_layers: float, layer_types: LayerTypes) -> None:
    whole = isinstance(skip_layers, int) and not isinstance(skip_layers, bool)
    if not (whole and skip_layers >= 0) and not (isinstance(skip_layers, float) and 0 <= skip_layers < 1):
        raise ValueError(f"skip_layers is {skip_layers!r}, but it must be an int from 0 or a float from 0 to below 1")
    for layer_type in layer_types:
        if issubclass(layer_type, _TRANSPOSED) or not issubclass(layer_type, (*CONVOLUTIONS, nn.Linear)):
            raise TypeError(
                f"layer_types has {layer_type.__name__}, but kernels are known for Conv1d, Conv2d, Conv3d and Linear "
                "and their subclasses alone, which have one per row of the weight"
            )


def _skipped_depth(skip_layers: float, counted: int, model: str) -> int:
    if isinstance(skip_layers, float):
        return math.ceil(round(skip_layers * counted, 6))  # .55 of 20 is 11, though the product is a little more
    if skip_layers >= counted > 0:
        raise ValueError(f"skip_layers is {skip_layers}, but {model} has {counted} counted layers: skip fewer")
    return skip_layers


def _pick_names(names: str | Sequence[str], known: list[str]) -> list[str]:
    if isinstance(names, str):
        try:
            picked = [name for name in known if re.search(names, name)]
        except re.error as error:
            raise ValueError(f"names is {names!r}, but that is no regular expression: {error}") from error
        if not picked:
            raise ValueError(f"names is {names!r}, but no layer matches it; the layers are {', '.join(known)}")
        return picked
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known) or known
            raise ValueError(f"names has {name!r}, but the model has no such layer; near ones: {', '.join(near)}")
    return list(dict.fromkeys(names))


def _number(layers: list[KernelLayer]) -> list[KernelLayer]:
    """Set each layer's index, and leave the repetitions of a tied weight to its first layer."""
    first: dict[int, str] = {}
    numbered = []
    for index, layer in enumerate(layers):
        weight = layer.module._parameters.get("weight")
        owner = layer.name if weight is None else first.setdefault(id(weight), layer.name)
        if owner != layer.name:
            layer = replace(layer, selected=False, reason=f"tied to {owner}")
        numbered.append(replace(layer, index=index))
    return numbered


def _describe(name: str, module: nn.Module, depth: int | None, reason: str) -> KernelLayer:
    return KernelLayer(
        name=name,
        index=-1,
        depth=depth,
        module=module,
        kernels=_kernels(module),
        kernel_size=tuple(getattr(module, "kernel_size", ())),
        groups=getattr(module, "groups", 1),
        selected=not reason,
        reason=reason,
    )


def _kernels(module: nn.Module) -> int:
    return int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)  # type: ignore[arg-type]


def _obstacle(name: str, module: nn.Module) -> str:
    """Return why the kernels of a layer can't be merged wherever it stands in the model, or an empty string."""
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "parametrized"
    if _FUSED_ATTENTION.search(name):
        return "attention"
    return "one kernel per group" if _kernels(module) == getattr(module, "groups", 1) else ""


def _select_named(name: str, modules: dict[str, nn.Module], picked: list[str]) -> KernelLayer:
    reason = _obstacle(name, modules[name]) if name in picked else "not named"
    return _describe(name, modules[name], None, reason)


def _select_by_depth(name: str, module: nn.Module, trace: _Trace, depths: dict[str, int], skipped: int) -> KernelLayer:
    if name in trace.fully_connected:
        reason = "acts as fully connected"
    elif name in trace.classifiers:
        reason = "classifier"
    elif name not in trace.executed:
        reason = "not executed"
    elif name in depths and depths[name] < skipped:
        reason = "shallow"
    else:
        reason = _obstacle(name, module)
    return _describe(name, module, depths.get(name), reason)


def _trace_or_definition(model: nn.Module, modules: dict[str, nn.Module], input_size: Sequence[int] | None) -> _Trace:
    """Trace the model; what is left if that fails half-way takes the order of definition, with a warning that says why.

    Detectors fail so, when all their convolutions have run: which boxes are kept depends on data.
    """
    if _is_sharded(model):
        raise ValueError(
            f"{type(model).__name__} is sharded by FSDP2 and can't be run on the meta device: call kernel_layers "
            "before sharding, and pass names=[layer.name for layer in layers if layer.selected]"
        )
    sizes = _input_sizes(model, input_size)
    for size in sizes:
        trace = _Trace()
        try:
            _run_on_meta(model, modules, size, trace)
            return trace
        except Exception as error:  # whatever a stranger's forward raises, the order of definition is left
            problem = error
    rest = [name for name in modules if name not in trace.executed]
    warnings.warn(
        f"{type(model).__name__} can't be run on the meta device with an input of {sizes[-1]} "
        f"({type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}): {len(rest)} of its {len(modules)} "
        "layers are taken in the order of definition, and which of those act as fully connected is not known; "
        "input_size or names may help",
        stacklevel=3,
    )
    trace.executed += rest
    trace.fully_connected.update(name for name in rest if _PRE_LOGITS.search(name))
    trace.classifiers.update(name for name in modules if _PREDICTORS.search(name))
    return trace


def _is_sharded(model: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def _input_sizes(model: nn.Module, input_size: Sequence[int] | None) -> list[tuple[int, ...]]:
    """Return the input sizes to try in turn; the second is for models with other than their own channels."""
    own = getattr(model, "pretrained_cfg", None) or {}
    own_size = tuple(own.get("input_size") or (3, 224, 224))
    if input_size is not None:
        return [tuple(input_size)]
    first = next((module for module in model.modules() if isinstance(module, CONVOLUTIONS)), None)
    channels = own_size[0] if first is None else first.in_channels
    return list(dict.fromkeys([own_size, (channels, *own_size[1:])]))


def _run_on_meta(model: nn.Module, modules: dict[str, nn.Module], input_size: tuple[int, ...], trace: _Trace) -> None:
    """Run a copy of ``model`` on the meta device, and note in ``trace`` what its layers do."""
    called: list[nn.Module] = []
    shadow = _copy_to_meta(model)
    names = {module: name for name, module in shadow.named_modules()}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        name = names[module]
        called.append(module)
        if name in modules and name not in trace.executed:
            trace.executed.append(name)
            if isinstance(module, CONVOLUTIONS) and all(length == 1 for length in output.shape[2:]):
                trace.fully_connected.add(name)

    for module in shadow.modules():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear, *_NORMS)):
            module.register_forward_hook(note)
    floats = [tensor.dtype for tensor in shadow.parameters() if tensor.is_floating_point()]
    image = torch.empty(1, *input_size, device="meta", dtype=floats[0] if floats else None)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
        output = shadow.eval()(image)
    if getattr(model, "num_classes", None) != 0:
        trace.classifiers.update({names[module] for module in _classifiers(called, output)} & modules.keys())


def _classifiers(called: list[nn.Module], output: Any) -> list[nn.Module]:
    """Return the layers whose kernels are the model's outputs, given all layers and norms in the order of their calls.

    Those have as many kernels as there are classes, and the next layer or norm does not take their output. In a model
    with named predictions (segmentation) all such layers count, elsewhere the last of all and those of its shape just
    before it (a distilled head beside the head).
    """
    named = [output[key] for key in _PREDICTIONS if key in output] if isinstance(output, Mapping) else [output]
    classes = {tensor.shape[1] for tensor in named if isinstance(tensor, Tensor) and tensor.dim() > 1}
    found: list[nn.Module] = []
    for module, following in zip(reversed(called), [None, *reversed(called)], strict=False):
        if isinstance(module, _NORMS):
            continue
        beside = isinstance(output, Mapping) or not found or _input_width(module) == _input_width(found[-1])
        if _kernels(module) in classes and _input_width(following) != _kernels(module) and beside:
            found.append(module)
        elif not isinstance(output, Mapping):
            break
    return found


def _input_width(module: nn.Module | None) -> int | None:
    """Return how many channels a layer or a norm takes."""
    for name in ("in_channels", "in_features", "num_features", "num_channels"):
        if hasattr(module, name):
            return int(getattr(module, name))
    return int(module.normalized_shape[-1]) if isinstance(module, nn.LayerNorm) else None


def _copy_to_meta(model: nn.Module) -> nn.Module:
    """Copy a model with its tensors replaced by ones without data, and without its hooks.

    The copy takes what a forward may leave behind (cached attributes, modes, hooks), and the model stays as it is.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    shadow = copy.deepcopy(model, memo)
    for module in shadow.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return shadow
