"""How deep: the layers of a model in the order in which it executes them, seen in one run on tensors without data."""

from __future__ import annotations

import contextlib
import inspect
import random
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

# The lengths in space at which a model without a size of its own is traced. Nothing is computed, so that they cost
# nothing, and they survive the strides of the usual networks for signals, for images, and for volumes and videos.
_SPACE: dict[type[nn.Module], tuple[int, ...]] = {
    nn.Conv1d: (16384,),
    nn.Conv2d: (224, 224),
    nn.Conv3d: (224, 224, 224),
}
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
_NATIVE_BATCH_NORM = torch.ops.aten.native_batch_norm.default
# What a batch norm is on the devices that there are.
_BATCH_NORM_OPERATIONS = {
    _NATIVE_BATCH_NORM,
    torch.ops.aten.cudnn_batch_norm.default,
    torch.ops.aten.miopen_batch_norm.default,
}
# What reads channels with weights, and makes others of them.
_READERS = {
    torch.ops.aten.convolution.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass
class Trace:
    """What one run of a model shows of its layers.

    Attributes:
        executed: their names, in the order of first execution.
        fully_connected: the convolutions whose output has length 1 in every dimension of space.
        classifiers: those whose kernels are the model's outputs; empty if the run ended early.
        per_channel: per layer the modules that its channels go through one by one, and no other layer's: batch norms,
            and depthwise convolutions with what follows these. Layers are absent whose channels anything else scales or
            shifts, one by one or together.
        problem: why the run ended early; empty if it did not.
    """

    executed: list[str] = field(default_factory=list)
    fully_connected: set[str] = field(default_factory=set)
    classifiers: set[str] = field(default_factory=set)
    per_channel: dict[str, tuple[str, ...]] = field(default_factory=dict)
    problem: str = ""


def trace_layers(model: nn.Module, layers: Mapping[str, nn.Module], example_inputs: Any = None) -> Trace:
    """Run a model on tensors without data, in eval mode, and note what its layers do.

    Nothing is computed, and nothing is left behind: weights, buffers, cached attributes, modes, hooks and random states
    are what they were before, also where the run fails.

    Args:
        model: the model, unwrapped, neither sharded nor lazy.
        layers: the layers to note, by their names in the model.
        example_inputs: what the model is called with, as for kernel_layers.

    Returns:
        The trace; where the model can't be run to its end, that which came furthest, up to the point of failure.

    Raises:
        TypeError: example_inputs without a size or a tensor.
        ValueError: a size with a length below 1.
    """
    _check_inputs(example_inputs)
    traces = []
    for inputs in _own_sizes(model) if example_inputs is None else [example_inputs]:
        trace = Trace()
        try:
            _run(model, layers, inputs, trace)
            return trace
        except Exception as error:  # whatever a user-defined forward raises
            asked = f"an input of {tuple(inputs)}" if _is_size(inputs) else "the example_inputs"
            message = (str(error).splitlines() or [""])[0]
            trace.problem = f"with {asked} ({type(error).__name__}: {message})"
            traces.append(trace)
    return max(traces, key=lambda trace: len(trace.executed))


def kernel_count(layer: nn.Module) -> int:
    """Return how many kernels a layer has: output channels, or rows of a Linear."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def is_depthwise(layer: nn.Module) -> bool:
    """Say whether a layer has one kernel for each channel that it reads, and so acts on each channel alone."""
    groups = getattr(layer, "groups", 1)
    return bool(groups == getattr(layer, "in_channels", None) == kernel_count(layer))


def _run(model: nn.Module, layers: Mapping[str, nn.Module], inputs: Any, trace: Trace) -> None:
    names = {module: name for name, module in layers.items()}
    stand_ins = _StandIns()
    flow = _Flow()

    def note(module: nn.Module, args: Any, output: Any) -> None:
        name, result = names[module], next(_tensors(output))
        if is_depthwise(module):
            flow.act_per_channel(name, *_tensors(args))
        flow.pass_through(name, args, result)
        if name not in trace.executed:
            trace.executed.append(name)
            dimensions = len(getattr(module, "kernel_size", ()))  # of space; a Linear has none
            if dimensions and all(length == 1 for length in result.shape[-dimensions:]):
                trace.fully_connected.add(name)

    norms = {module: name for name, module in model.named_modules() if isinstance(module, _BATCH_NORMS)}
    with _undisturbed(), _set_aside(model, stand_ins):
        flow.weights_are(stand_ins.all())
        for layer in names:
            layer.register_forward_hook(note)  # it goes when the model's own hooks are put back
        for norm, name in norms.items():
            norm.register_forward_pre_hook(partial(flow.enter_norm, name))
            norm.register_forward_hook(partial(flow.enter_norm, ""))
        with stand_ins.fake_mode, flow:
            args, kwargs = _arguments(model, inputs)
            output = model(*args, **kwargs)
    if known_attribute(model, "num_classes") != 0:  # 0 is timm's for a model without a head
        trace.classifiers = _classifiers(layers, trace.executed, flow, output)
    widths = {name: kernel_count(layer) for name, layer in layers.items()}
    widths |= {name: int(norm.num_features) for norm, name in norms.items()}
    for name in reversed(trace.executed):  # what follows a depthwise convolution is known before what it follows
        own = _per_channel(name, layers, flow, widths, trace.per_channel)
        if own is not None:
            trace.per_channel[name] = own


# What the model is called with


def known_attribute(model: nn.Module, name: str) -> Any:
    """Return an attribute that some models have, or None where there is none or asking for it raises."""
    try:
        return getattr(model, name, None)
    except Exception:  # whatever a user-defined property raises
        return None


def own_size(model: nn.Module) -> tuple[int, ...]:
    """Return a model's own size of input, without the batch, or one that suits its first convolution."""
    return _own_sizes(model)[0]


def _own_sizes(model: nn.Module) -> list[tuple[int, ...]]:
    """Return the sizes to try in turn: a model's own, and those that suit its first convolution."""
    config = known_attribute(model, "pretrained_cfg")
    own = config.get("input_size") if isinstance(config, Mapping) else None
    first = next((module for module in model.modules() if isinstance(module, tuple(_SPACE))), None)
    space = next((lengths for kind, lengths in _SPACE.items() if isinstance(first, kind)), _SPACE[nn.Conv2d])
    sizes: list[tuple[int, ...]] = []
    if own:
        sizes.append(tuple(own))
    if first is not None:
        sizes.append((int(first.in_channels), *(own[1:] if own else space)))  # type: ignore[arg-type]
    if not own:
        sizes.append((3, *space))  # the convolution that is defined first need not be the one that sees the image
    return list(dict.fromkeys(sizes))


def _is_size(item: Any) -> bool:
    whole = isinstance(item, (tuple, list)) and all(isinstance(length, Integral) for length in item)
    return whole and len(item) > 0


def _check_inputs(example_inputs: Any) -> None:
    if example_inputs is None:
        return
    leaves = tree_leaves(_plain(example_inputs), is_leaf=_is_size)
    sizes = [tuple(leaf) for leaf in leaves if _is_size(leaf)]
    if not sizes and not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise TypeError(
            f"example_inputs is {example_inputs!r}, but it must be a size such as (3, 224, 224), a tensor, or a tuple "
            "or dict of them"
        )
    for size in sizes:
        if min(size) < 1:
            raise ValueError(f"example_inputs has the size {size}, but each of its lengths must be at least 1")


def _plain(inputs: Any) -> Any:
    """Return a mapping of any class as a dict, which torch looks into."""
    return dict(inputs) if isinstance(inputs, Mapping) else inputs


def _arguments(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as positional and named arguments, without data, where and in what the model computes."""
    held = [*model.parameters(), *model.buffers()]
    device = held[0].device if held else None
    dtype = next((tensor.dtype for tensor in held if tensor.is_floating_point()), None)

    def empty(item: Any) -> Any:
        if _is_size(item):
            return torch.empty(1, *item, dtype=dtype, device=device)
        if isinstance(item, Tensor):
            return torch.empty(item.shape, dtype=dtype if item.is_floating_point() else item.dtype, device=device)
        return item

    emptied = tree_map(empty, _plain(inputs), is_leaf=_is_size)
    if isinstance(emptied, dict):
        try:
            inspect.signature(model.forward).bind(**emptied)
        except (TypeError, ValueError):  # no such arguments: the dict is one itself
            return (emptied,), {}
        return (), emptied
    return (emptied if isinstance(inputs, tuple) and not _is_size(inputs) else (emptied,)), {}


# What its outputs come from


class _Flow(TorchDispatchMode):
    """Which layers a tensor comes from directly: by operations without weights, such as activations, pools and sums.

    Sources are kept by storage, which a tensor shares with its views, and keeps when it is changed in place; so are the
    makers of its channels, which stay the same through what acts on each channel alone with weights, a batch norm.

    Attributes:
        taken: the layers whose output went into another operation with weights.
        per_channel: by batch norm and depthwise convolution, the layers whose output went into it.
        scaled: the layers whose channels went through other weights than those of these and of what reads them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.taken: set[str] = set()
        self.per_channel: dict[str, frozenset[str]] = {}
        self.scaled: set[str] = set()
        self._norm = ""
        self._sources: dict[int, frozenset[str]] = {}
        self._makers: dict[int, frozenset[str]] = {}
        self._weights: set[int] = set()
        self._storages: list[Any] = []  # kept, so that no other comes to lie at the address of one

    def weights_are(self, tensors: Iterable[Tensor]) -> None:
        """Note which tensors are the model's, and not made from its inputs."""
        self._weights.update(map(self._key, tensors))

    def sources(self, *tensors: Tensor) -> frozenset[str]:
        """Return the layers that any of the tensors comes from directly."""
        return self._union(self._sources, tensors)

    def enter_norm(self, name: str, *_: Any) -> None:
        """Note that a batch norm begins, or with an empty name that it has ended."""
        self._norm = name

    def act_per_channel(self, name: str, *inputs: Tensor) -> None:
        """Note that a module acts on each channel of its inputs alone."""
        self.per_channel[name] = self.per_channel.get(name, frozenset()) | self._union(self._makers, inputs)

    def pass_through(self, layer: str, args: Any, result: Tensor) -> None:
        """Note that a layer made ``result`` from ``args``."""
        self.taken |= self.sources(*_tensors(args))
        self._sources[self._key(result)] = self._makers[self._key(result)] = frozenset((layer,))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = _batch_norm(args[0]) if func is _NATIVE_BATCH_NORM else func(*args, **(kwargs or {}))
        inputs, results = list(_tensors((args, kwargs))), list(_tensors(output))
        weights = [tensor for tensor in inputs if self._is_weight(tensor)]
        sources, makers = self.sources(*inputs), self._union(self._makers, inputs)
        if inputs and len(weights) == len(inputs):
            self.weights_are(results)
        elif weights:
            of_norm = self._norm and func in _BATCH_NORM_OPERATIONS
            if of_norm:
                self.act_per_channel(self._norm, *inputs)
            elif func not in _READERS and any(weight.numel() > 1 for weight in weights):
                self.scaled |= makers
            if torch.Tag.pointwise not in func.tags:  # a scale, a shift or a mask mixes no channels
                self.taken |= sources
                sources, makers = frozenset(), makers if of_norm else frozenset()
        for known, found in ((self._sources, sources), (self._makers, makers)):
            if found:
                known.update({self._key(result): self._union(known, [result]) | found for result in results})
        return output

    def _union(self, known: Mapping[int, frozenset[str]], tensors: Iterable[Tensor]) -> frozenset[str]:
        return frozenset().union(*(known.get(self._key(tensor), ()) for tensor in tensors))

    def _is_weight(self, tensor: Tensor) -> bool:
        held = not isinstance(tensor, FakeTensor) or self._key(tensor) in self._weights
        return held and (tensor.is_floating_point() or tensor.is_complex())  # integers are indices

    def _key(self, tensor: Tensor) -> int:
        kept = tensor.untyped_storage() if tensor.layout is torch.strided else tensor
        self._storages.append(kept)
        return int(kept._cdata)


def _classifiers(layers: Mapping[str, nn.Module], executed: list[str], flow: _Flow, output: Any) -> set[str]:
    """Return the layers whose kernels are the model's outputs, whatever container holds these.

    They are the last ones on their way: no other weights take what they make. It need not come out, since an auxiliary
    head may be dropped in eval mode. Side outputs may be taken by later layers as well, and come out with as many
    channels as the last one's have.
    """
    outputs = [(flow.sources(tensor), tensor) for tensor in _tensors(output)]
    classes = set().union(*(_channels(tensor) for sources, tensor in outputs if not sources & flow.taken))
    side = {name for name in flow.sources(*_tensors(output)) if kernel_count(layers[name]) in classes}
    return {name for name in executed if name not in flow.taken or name in side}


def _per_channel(
    name: str,
    layers: Mapping[str, nn.Module],
    flow: _Flow,
    widths: Mapping[str, int],
    later: Mapping[str, tuple[str, ...]],
) -> tuple[str, ...] | None:
    """Return the modules that act on a layer's channels, and no other's, one by one; None if more does.

    Args:
        layers: those that were noted, depthwise convolutions among them.
        widths: by module that acts so, its channels.
        later: what is known of the layers that are executed later.
    """
    following = [module for module, sources in flow.per_channel.items() if name in sources]
    alone = all(flow.per_channel[module] == {name} and widths[module] == widths[name] for module in following)
    convolutions = [module for module in following if module in layers]
    plain = layers[name]._parameters.keys() <= {"weight", "bias"} and name not in flow.scaled
    if not (alone and plain and all(convolution in later for convolution in convolutions)):
        return None
    return (*following, *(module for convolution in convolutions for module in later[convolution]))


def _batch_norm(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what torch's own batch norm gives without data, which takes more time there than all else together."""
    channels = features.shape[1]
    return torch.empty_like(features), features.new_empty(channels), features.new_empty(channels)


def _channels(output: Tensor) -> set[int]:
    """Return how many channels an output may have: they come second or last."""
    return {output.shape[1], output.shape[-1]} if output.dim() > 1 else {1}


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield all tensors of nested containers, mappings and data classes."""
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from _tensors(dict(leaf))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors(vars(leaf))


# What is set aside meanwhile


class _StandIns:
    """Tensors without data for others of the same shape, strides, type and device."""

    def __init__(self) -> None:
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._made: dict[int, Tensor] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """Return the stand-in for a tensor, which is one for all its uses."""
        if id(tensor) not in self._made:
            shape = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
            # A model that was built on the meta device runs where its forward makes tensors of its own.
            device = torch.get_default_device() if tensor.is_meta else tensor.device
            self._made[id(tensor)] = stand_in = FakeTensor(self.fake_mode, shape, device)
            stand_in._is_param = isinstance(tensor, nn.Parameter)
        return self._made[id(tensor)]

    def all(self) -> list[Tensor]:
        """Return all stand-ins made so far."""
        return list(self._made.values())


@contextlib.contextmanager
def _set_aside(model: nn.Module, stand_ins: _StandIns) -> Iterator[None]:
    """Set a model's data and hooks aside, in eval mode, and put back in the end all that its modules held before."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    global_hooks = [value for name, value in vars(nn.modules.module).items() if _is_global_hooks(name, value)]
    held = [(holder, _content(holder)) for holder in (*_holders(modules), *global_hooks)]
    try:
        for hooks in global_hooks:
            hooks.clear()
        for module in modules:
            _empty(vars(module), stand_ins)
            module.training = False
        yield
    finally:
        for holder, content in held:
            _put_back(holder, content)
        for module, mode in zip(modules, modes, strict=True):
            if module.training != mode:  # of a scripted module, which keeps it elsewhere
                module.training = mode


def _empty(attributes: dict[str, Any], stand_ins: _StandIns) -> None:
    """Replace a module's tensors by stand-ins, and drop its hooks and compiled code."""
    for place in (attributes, attributes.get("_parameters"), attributes.get("_buffers")):
        if isinstance(place, dict):  # a scripted module keeps them elsewhere
            place.update({name: stand_ins.of(value) for name, value in place.items() if isinstance(value, Tensor)})
    for hooks in _HOOKS:
        if hooks in attributes:
            attributes[hooks].clear()
    attributes.pop("_compiled_call_impl", None)  # the class's own is None


def _is_global_hooks(name: str, value: Any) -> bool:
    return name.startswith("_global_") and isinstance(value, dict)


def _holders(modules: list[nn.Module]) -> list[Any]:
    """Return what a forward may leave something in: attributes of modules and of objects there, and all containers."""
    found: dict[int, Any] = {}
    pending: list[tuple[Any, bool]] = [(vars(module), True) for module in modules]
    while pending:
        holder, of_module = pending.pop()
        if id(holder) in found:
            continue
        found[id(holder)] = holder
        for value in holder.values() if isinstance(holder, dict) else holder:
            if isinstance(value, (dict, list, tuple, set, deque)):
                pending.append((value, of_module))
            elif of_module and not isinstance(value, (nn.Module, Tensor)):
                attributes = getattr(value, "__dict__", None)  # of a cache, say; what it refers to is others' own
                if isinstance(attributes, dict):
                    pending.append((attributes, False))
    return list(found.values())


def _content(holder: Any) -> Any:
    return dict(holder) if isinstance(holder, dict) else list(holder)


def _put_back(holder: Any, content: Any) -> None:
    """Give a container its former content again, in its order, if it has another now."""
    now, before = (
        [*items, *items.values()] if isinstance(items, dict) else items for items in (_content(holder), content)
    )
    if len(now) == len(before) and all(left is right for left, right in zip(now, before, strict=True)):
        return
    holder.clear()
    holder.update(content) if isinstance(holder, (dict, set)) else holder.extend(content)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Run without gradients, warnings, compiled code and others' dispatch modes, and keep the random states."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the one that others share
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # they are for runs that were asked for
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=devices))
        if "torch._dynamo" in sys.modules:  # otherwise nothing was compiled yet
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
