"""Equal channels taken out: a smaller network that computes the same.

Kernels that merging has made equal, with their bias and batch norm, make equal channels. One of them is enough, if
every layer that reads them adds up the weights by which it does. Which layers those are, through concatenations, sums,
pools and flattening, is known from torch-pruning's dependency graph (extra ``compact``).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from inmerge_optim.models import first_line
from inmerge_optim.selection import CONVOLUTIONS, PER_CHANNEL, unwrap
from inmerge_optim.sharding import is_sharded
from inmerge_optim.tables import to_lines
from inmerge_optim.tracing import is_depthwise, kernel_count

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PER_CHANNEL = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)
_ROUNDING = 1e-9  # of outputs in float64, relative to the largest
_PAIRS_AT_ONCE = 1024
_HOST = torch.device("cpu")
_SLACK = 1e-7  # by which a squared distance that is computed from products is off at most, relative to the squares

Removal = tuple[str, tuple[int, ...]]
_Inputs = tuple[Any, ...] | dict[str, Any]


@contextmanager
def _on_host() -> Iterator[None]:
    """Make tensors on the host, those of torch-pruning as well, whatever torch's default device is."""
    with _HOST:
        yield


class CompactedLayer(NamedTuple):
    """How many kernels a layer had and has, and why it keeps all of them."""

    name: str
    before: int
    after: int
    reason: str


@dataclass(frozen=True)
class CompactionReport:
    """What compact has done; printed, it is a table.

    Attributes:
        layers: a CompactedLayer per convolution and linear layer.
        parameters: how many numbers the parameters hold, before and after.
        macs: multiplications and additions of matrix products and convolutions for the inputs given, before and after.
        largest_difference: between the outputs of both models for these inputs, in float64.
        largest_output: of the model as it was, to compare that with.
        removed: by layer the kernels taken out, in the order in which they were: what ``remove_channels`` takes.
    """

    layers: list[CompactedLayer]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    largest_difference: float
    largest_output: float
    removed: list[Removal]

    def __str__(self) -> str:
        rows = [(layer.name, str(layer.before), str(layer.after), layer.reason) for layer in self.layers]
        lines = to_lines(("layer", "kernels", "left", "remark"), rows, left_aligned=("layer", "remark"))
        for name, (before, after) in (("parameters", self.parameters), ("MACs", self.macs)):
            lines.append(f"{name}: {before:,} -> {after:,} ({_percent(before, after)})")
        lines.append(
            f"Outputs differ by {self.largest_difference:.2g} at most, the largest being {self.largest_output:.2g}."
        )
        return "\n".join(lines)


def compact(model: nn.Module, example_inputs: Any, tolerance: float = 1e-3) -> tuple[nn.Module, CompactionReport]:
    """Take out equal channels, so that a smaller model computes the same.

    Channels are equal where the kernels that make them are, along with all that acts on a single channel: biases, batch
    norms, and depthwise kernels. Of each group of such channels one is left: its mean, read by the sum of the weights
    that read them all. Where two branches are added, channels must be equal in both.

    Args:
        model: the model; it stays as it is.
        example_inputs: a tensor, a tuple of arguments or a dict of named ones. A copy of the model is run on them, on
            the host and in float64, before and after each layer, to see that nothing else changes.
        tolerance: how far apart two kernels may be, as a share of the larger one's norm; of the numbers that a channel
            has one of (a bias, say) as a share of their root mean square over the channels. 0 takes out what is equal
            to the bit.

    Returns:
        The smaller model, in eval mode, on the devices of the model, and the report.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: a tolerance below 0; a model that is sharded or can't be traced with these inputs.
        TypeError: no module.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> _ = model[0].weight.data[5].copy_(model[0].weight[2]), model[0].bias.data[5].copy_(model[0].bias[2])
        >>> smaller, report = compact(model, torch.randn(1, 3, 16, 16))
        >>> smaller[0].out_channels, report.removed
        (7, [('0', (5,))])
    """
    if not isinstance(tolerance, (int, float)) or isinstance(tolerance, bool) or not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance!r}, but it must be a number from 0")
    return _compact(model, example_inputs, lambda _, channels: _clusters(channels, tolerance))


def compact_clusters(
    model: nn.Module, example_inputs: Any, choose: Callable[[str, Tensor], Sequence[Sequence[int]]]
) -> tuple[nn.Module, CompactionReport]:
    """Take out channels as compact does, but those that are said to be alike, as far as they are from equal.

    What the model computes changes by what they differ in.

    Args:
        model: as for compact, as is ``example_inputs``.
        choose: called with the name of a layer and the kernels that make its channels, a row for each (of all branches
            that are added, side by side); returns clusters of two and more channels, each of which becomes one.

    Returns:
        As compact.
    """

    def clusters(name: str, channels: _Channels) -> tuple[Sequence[Sequence[int]], str]:
        found = choose(name, channels.kernels())
        return found, "" if found else "none chosen"

    return _compact(model, example_inputs, clusters)


@_on_host()
def _compact(
    model: nn.Module,
    example_inputs: Any,
    choose: Callable[[str, _Channels], tuple[Sequence[Sequence[int]], str]],
) -> tuple[nn.Module, CompactionReport]:
    """Leave one channel of each cluster, layer by layer; ``choose`` returns these, or why there are none."""
    model, inputs = unwrap(model), _in_float64(example_inputs)
    graph = _Graph(_copy_in_float64(model), inputs)
    kernels = _kernel_counts(model)
    reasons: dict[str, str] = {}
    removed: list[Removal] = []
    for name in kernels:
        if name in reasons:  # told with another layer, whose channels are the same
            continue
        channels = graph.channels_of(name)
        if isinstance(channels, str):
            reasons[name] = channels
            continue
        clusters, reason = choose(name, channels)
        if clusters:
            kept = copy.deepcopy(graph.model)
            taken = tuple(sorted(member for cluster in clusters for member in cluster[1:]))
            reason = _take_out(graph, name, channels, clusters, taken)
            if reason:
                graph = _Graph(kept, inputs)
            else:
                removed.append((name, taken))
        reasons |= dict.fromkeys((maker for maker in channels.makers if maker in kernels), reason)
    report = compare(model, graph.model, inputs, removed, reasons)
    return _as_before(graph.model, model), report


@_on_host()
def compare(
    model: nn.Module,
    smaller: nn.Module,
    example_inputs: Any,
    removed: Sequence[Removal],
    reasons: Mapping[str, str] = MappingProxyType({}),
) -> CompactionReport:
    """Report what is left of a model in a smaller one of its architecture.

    Args:
        model: before channels were taken out.
        smaller: what remove_channels made of it, or compact.
        example_inputs: as for compact.
        removed: as in the report.
        reasons: by layer why it keeps all of its kernels.
    """
    inputs, kernels = _in_float64(example_inputs), _kernel_counts(model)
    copies, left = (_copy_in_float64(model), _copy_in_float64(smaller)), _kernel_counts(smaller)
    before, after = (_outputs(copied, inputs) for copied in copies)
    return CompactionReport(
        layers=[CompactedLayer(name, kernels[name], left[name], reasons.get(name, "")) for name in kernels],
        parameters=(_parameter_count(model), _parameter_count(smaller)),
        macs=(_macs(copies[0], inputs), _macs(copies[1], inputs)),
        largest_difference=max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True)),
        largest_output=max(float(a.abs().max()) for a in before),
        removed=list(removed),
    )


def _take_out(
    graph: _Graph, name: str, channels: _Channels, clusters: Sequence[Sequence[int]], taken: Sequence[int]
) -> str:
    """Leave one channel of each cluster; return why that changes what the model computes, or an empty string."""
    channels.equalise(clusters)
    expected = graph.outputs()
    try:
        channels.add_up(clusters)
        graph.remove(name, taken)
        found = graph.outputs()
    except Exception as error:  # whatever a model raises whose code counts its channels
        return f"needed in this number ({type(error).__name__})"
    if [output.shape for output in found] != [output.shape for output in expected]:
        return "the model's outputs"
    largest = max(float(output.abs().max()) for output in expected)
    same = all(
        torch.allclose(a, b, rtol=0, atol=_ROUNDING * largest, equal_nan=True)
        for a, b in zip(expected, found, strict=True)
    )
    return "" if same else "mixed by an operation between them and their readers"


@_on_host()
def remove_channels(model: nn.Module, example_inputs: Any, removed: Sequence[Removal]) -> nn.Module:
    """Return a copy of ``model`` without the channels that compact has taken out of another of its architecture.

    Its other weights are the model's: load those of the compacted model into it.

    Args:
        model: as the architecture is built anew.
        example_inputs: as for compact.
        removed: ``report.removed`` of compact.

    Returns:
        The smaller copy, in eval mode; ``model`` stays as it is.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: the model has no such layer or channel, or can't be traced with these inputs.

    Example:
        >>> build = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> remove_channels(build(), torch.randn(1, 3, 16, 16), [("0", (5,))])[2].in_channels
        7
    """
    model = unwrap(model)
    graph = _Graph(_copy_in_float64(model), _in_float64(example_inputs))
    known = dict(graph.model.named_modules())
    for name, taken in removed:
        layer = known.get(name)
        if layer is None or not _is_root(layer) or not all(0 <= channel < kernel_count(layer) for channel in taken):
            raise ValueError(
                f"{name} of {type(model).__name__} has no kernels {tuple(taken)}: removed is of another model"
            )
        graph.remove(name, taken)
    return _as_before(graph.model, model)


class _Values(NamedTuple):
    """A tensor with an entry, a row or several per channel of a group.

    Attributes:
        holder: the module, or the model for a parameter of its own.
        name: of the tensor in it.
        dim: on which the channels lie.
        rows: their places there, (k,).
        channels: of the group, to which these belong, (k,).
    """

    holder: nn.Module
    name: str
    dim: int
    rows: Tensor
    channels: Tensor

    @property
    def tensor(self) -> Tensor:
        held: Tensor = getattr(self.holder, self.name)
        return held.detach()

    def matrix(self) -> Tensor:
        """The values, a row per place: (k, values)."""
        return self.tensor.movedim(self.dim, 0).index_select(0, self.rows).reshape(len(self.rows), -1)


class _Channels(NamedTuple):
    """Channels that can be taken out only together: of one layer, and of those that are added to it.

    Attributes:
        size: how many there are.
        makers: the layers that make them, by their names.
        own: what acts on a single channel.
        read: the weights that read them.
    """

    size: int
    makers: list[str]
    own: list[_Values]
    read: list[_Values]

    def kernels(self) -> Tensor:
        """What the layers that make the channels have for each: (size, weights)."""
        of_makers = [values for values in self.own if values.name == "weight" and values.tensor.dim() > 1]
        return torch.cat([values.matrix()[values.channels.argsort()] for values in of_makers], 1)

    def equalise(self, clusters: Sequence[Sequence[int]]) -> None:
        """Give the channels of each cluster the mean of what they have."""
        for values in self.own:
            place = dict(zip(values.channels.tolist(), values.rows.tolist(), strict=True))
            tensor = values.tensor.movedim(values.dim, 0)
            for cluster in clusters:
                rows = [place[channel] for channel in cluster if channel in place]
                tensor[rows] = tensor[rows].mean(0, keepdim=True)

    def add_up(self, clusters: Sequence[Sequence[int]]) -> None:
        """Give the first channel of each cluster the sum of the weights that read its channels."""
        for values in self.read:
            tensor = values.tensor.movedim(values.dim, 0)
            for cluster in clusters:
                first, *others = (values.rows[values.channels == channel] for channel in cluster)
                for rows in others:
                    tensor[first] += tensor[rows]


class _Graph:
    """A model with what torch-pruning knows of how its layers depend on each other."""

    def __init__(self, model: nn.Module, inputs: _Inputs) -> None:
        self.model = model
        self._inputs = inputs
        self._modules = dict(model.named_modules())
        self._names = {module: name for name, module in self._modules.items()}
        self._graph = _dependencies(model, inputs)

    def outputs(self) -> list[Tensor]:
        return _outputs(self.model, self._inputs)

    def remove(self, name: str, taken: Sequence[int]) -> None:
        """Take channels of a layer out, and all that belongs to them."""
        self._group(name, taken).prune(record_history=False)

    def channels_of(self, name: str) -> _Channels | str:
        """Return the channels that a layer makes, or why they can't be taken out."""
        layer = self._modules[name]
        if layer not in self._graph.module2node:
            return "not executed"
        makers: list[str] = []
        own: list[_Values] = []
        read: list[_Values] = []
        for item in self._group(name, range(kernel_count(layer))):
            module, places = item.dep.target.module, (torch.tensor(item.idxs), torch.tensor(item.root_idxs))
            if isinstance(module, nn.Parameter):
                holder, _, attribute = self._graph._param_to_name[module].rpartition(".")
                own.append(_Values(self.model.get_submodule(holder), attribute, item.dep.target.pruning_dim, *places))
            elif isinstance(module, _PER_CHANNEL):
                own += [_Values(module, vector, 0, *places) for vector in PER_CHANNEL if _has_channels(module, vector)]
            elif _is_root(module) or isinstance(module, _TRANSPOSED):
                if getattr(module, "groups", 1) > 1 and not is_depthwise(module):
                    return f"in the grouped convolution {self._names[module]}"
                out, into = (1, 0) if isinstance(module, _TRANSPOSED) else (0, 1)
                if self._graph.is_out_channel_pruning_fn(item.dep.handler):
                    makers.append(self._names[module])
                    own.append(_Values(module, "weight", out, *places))
                    own += [_Values(module, "bias", 0, *places)] if module.bias is not None else []
                else:
                    read.append(_Values(module, "weight", into, *places))
            elif module in self._names and any(True for _ in module.parameters()):
                return f"mixed by {self._names[module]} ({type(module).__name__})"
        if any(len(values.channels.unique()) < len(values.channels) for values in own):
            return "split, and used side by side"
        return _Channels(kernel_count(layer), makers, own, read)

    def _group(self, name: str, channels: Iterable[int]) -> Any:
        import torch_pruning

        layer = self._modules[name]
        linear = isinstance(layer, nn.Linear)
        function = torch_pruning.prune_linear_out_channels if linear else torch_pruning.prune_conv_out_channels
        return self._graph.get_pruning_group(layer, function, list(channels))


def _dependencies(model: nn.Module, inputs: _Inputs) -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError("compact needs torch-pruning: pip install 'inmerge_optim[compact]'") from error
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters outside of layers, which are told apart here
        try:
            return torch_pruning.DependencyGraph().build_dependency(model, inputs, verbose=False)
        except Exception as error:  # whatever a user-defined forward raises
            raise ValueError(
                f"{type(model).__name__} can't be run on the example_inputs ({type(error).__name__}: "
                f"{first_line(error)}): give a batch as it is trained on"
            ) from error


# Which channels are equal


def _clusters(group: _Channels, tolerance: float) -> tuple[list[list[int]], str]:
    """Return the groups of two and more equal channels, the first of each the one to stay, or why there are none."""
    equal = torch.ones(group.size, group.size, dtype=torch.bool)
    in_a_layer = False
    for values in group.own:
        found = _equal(values, group.size, tolerance)
        equal &= found
        in_a_layer |= values.name == "weight" and values.tensor.dim() > 1 and bool(found.triu(1).any())
    clusters, taken = [], torch.zeros(group.size, dtype=torch.bool)
    for channel in range(group.size):
        if not taken[channel]:
            members = (equal[channel] & ~taken).nonzero().flatten().tolist()
            taken[members] = True
            clusters += [members] if len(members) > 1 else []
    if clusters:
        return clusters, ""
    if not in_a_layer:
        return [], "no equal kernels"
    others = f": {', '.join(group.makers)}" if len(group.makers) > 1 else ""
    return [], "equal kernels, but not in all that makes the channels" + others


def _equal(values: _Values, size: int, tolerance: float) -> Tensor:
    """Say which channels have equal values: (size, size), of booleans."""
    found = torch.eye(size, dtype=torch.bool)
    absent = torch.ones(size, dtype=torch.bool).index_fill_(0, values.channels, False)
    found |= absent[:, None] & absent
    rows = values.matrix()
    first, second = _near_pairs(rows, tolerance)
    first, second = values.channels[first], values.channels[second]
    found[first, second] = found[second, first] = True
    return found


def _near_pairs(rows: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return the pairs of rows, (m, d), that are no further apart than the tolerance."""
    squares = rows.square().sum(1)
    scales = squares.mean().expand_as(squares) if rows.shape[1] == 1 else squares
    limits = tolerance * torch.maximum(scales[:, None], scales).sqrt()
    near = squares[:, None] + squares - 2 * rows @ rows.T <= limits.square() + _SLACK * (squares[:, None] + squares)
    pairs = near.triu(1).nonzero()
    apart = [(rows[a] - rows[b]).norm(dim=1) for a, b in (chunk.unbind(1) for chunk in pairs.split(_PAIRS_AT_ONCE))]
    first, second = pairs[torch.cat(apart) <= limits[pairs[:, 0], pairs[:, 1]]].unbind(1) if apart else pairs.unbind(1)
    return first, second


# A model and its inputs on the host, where there is float64, and back


def _in_float64(example_inputs: Any) -> _Inputs:
    inputs = example_inputs if isinstance(example_inputs, (tuple, dict)) else (example_inputs,)
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(inputs)):
        raise TypeError(f"example_inputs is {example_inputs!r}, but it must be a tensor, or a tuple or dict of them")
    converted: _Inputs = tree_map(_to_float64, inputs)
    return converted


def _to_float64(item: Any) -> Any:
    if not isinstance(item, Tensor):
        return item
    return item.to(_HOST, torch.float64 if item.is_floating_point() else item.dtype)


def _copy_in_float64(model: nn.Module) -> nn.Module:
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} is sharded: gather its weights in one process first")
    return copy.deepcopy(model).to(_HOST, torch.float64).eval().requires_grad_(True)


def _as_before(smaller: nn.Module, model: nn.Module) -> nn.Module:
    """Give the tensors of the smaller model the types and devices that they had; what was frozen is so again."""
    for name, parameter in model.named_parameters():
        of_smaller = smaller.get_parameter(name)
        of_smaller.data = of_smaller.data.to(parameter.device, parameter.dtype)
        of_smaller.requires_grad_(parameter.requires_grad)
    for name, buffer in model.named_buffers():
        holder, _, attribute = name.rpartition(".")
        setattr(smaller.get_submodule(holder), attribute, smaller.get_buffer(name).to(buffer.device, buffer.dtype))
    return smaller


@torch.no_grad()
def _outputs(model: nn.Module, inputs: _Inputs) -> list[Tensor]:
    output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _macs(model: nn.Module, inputs: _Inputs) -> int:
    with FlopCounterMode(display=False) as counter:
        _outputs(model, inputs)
    return int(counter.get_total_flops()) // 2


def _parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _kernel_counts(model: nn.Module) -> dict[str, int]:
    return {name: kernel_count(module) for name, module in model.named_modules() if _is_root(module)}


def _is_root(module: nn.Module) -> bool:
    return isinstance(module, (*CONVOLUTIONS, nn.Linear))


def _has_channels(module: nn.Module, name: str) -> bool:
    vector = getattr(module, name, None)
    return vector is not None and vector.numel() > 1


def _percent(before: int, after: int) -> str:
    return f"{100 * after / before:.1f} % left"
