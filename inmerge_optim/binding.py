"""Where the weights of the selected layers are among an optimizer's parameters, whatever became of its groups since."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from inmerge_optim.callers import user_stacklevel
from inmerge_optim.merging import check_kernels
from inmerge_optim.selection import PER_CHANNEL, KernelLayers, layer_modules, obstacle, unwrap
from inmerge_optim.sharding import is_sharded

_Groups = list[dict[str, Any]]
_Referent = TypeVar("_Referent")


class Place(NamedTuple):
    """Where a weight was last found: the index of its group, its position there, and its shape."""

    group: int
    position: int
    shape: torch.Size


class Binding:
    """The selected layers and the parameters that hold their weights.

    A layer is bound by the identity of its parameter, wherever that is now. The place alone counts only where the
    parameter that stands there was unknown at wrapping, since FSDP2 and accelerate replace parameters in their places.
    A layer whose parameter has left the groups is bound no more, until it comes back.

    References to parameters and modules are weak, and stay behind when the binding is copied or pickled: a copy takes
    what stands in the places, and knows of no other layers.

    Attributes:
        listed: the layers of kernel_layers.
        places: the place of each layer that is bound, by its index in ``listed``.
        merge_channels: whether what else a channel has is bound along.
    """

    def __init__(self, listed: KernelLayers, model: nn.Module, groups: _Groups, merge_channels: bool) -> None:
        self.listed = listed
        self.merge_channels = merge_channels
        self.places: dict[int, Place] = {}
        modules = layer_modules(model, listed)
        self._modules = {layer.index: weakref.ref(modules[layer.name]) for layer in listed if layer.selected}
        self._per_channel = {
            layer.index: [weakref.ref(unwrap(model).get_submodule(name)) for name in layer.per_channel or ()]
            for layer in listed
            if layer.selected and merge_channels
        }
        self._parameters: dict[int, weakref.ref[Tensor]] = {}
        self._told: set[int] = set()
        self._known = _Identities([*unwrap(model).parameters(), *_parameters(groups)])
        self.weights(groups)

    def __getstate__(self) -> dict[str, Any]:
        names = ("listed", "places", "merge_channels", "_told")
        return {name: value for name, value in vars(self).items() if name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._modules, self._per_channel, self._parameters, self._known = {}, {}, {}, _Identities([])

    def bind_places(self, groups: _Groups) -> None:
        """Take the parameters that stand in the places for those of the layers: after a copy, whose are new."""
        self.weights(groups)
        self._known = _Identities(_parameters(groups))

    def weights(self, groups: _Groups) -> dict[int, Tensor]:
        """Return the weight of each layer that can be merged now, by its index, and remember their places.

        Raises:
            RuntimeError: parameters were flattened, and kernels no longer exist as such.
            TypeError: a weight has numbers that can't be merged.
        """
        found: dict[int, Tensor] = {}
        for index in sorted(self._modules.keys() | self.places.keys()):
            if (weight := self._find(index, groups)) is None:
                self.places.pop(index, None)
                continue
            self._told.discard(index)
            if not self.obstacle(index):
                found[index] = weight
        return found

    def channels(self, index: int, weight: Tensor) -> list[Tensor]:
        """Return what a layer's channels have beside their kernels, if that is merged along: an entry for each channel.

        Raises:
            RuntimeError: it is not known, since this is a copy, which knows of no modules; or FSDP2 keeps it whole at
                the moment, apart from the weight.
        """
        if not self.merge_channels:
            return []
        layer, *others = (
            _alive(reference) for reference in (self._modules.get(index), *self._per_channel.get(index, ()))
        )
        if layer is None or any(module is None for module in others):
            raise RuntimeError(
                f"merge_channels blends what else the channels of {self.listed[index].name} have, which a "
                "copied or unpickled optimizer doesn't know: wrap the base anew, with the model"
            )
        found = [
            getattr(layer, "bias", None),
            *(getattr(module, name, None) for module in others for name in PER_CHANNEL),
        ]
        channels = [values for values in found if isinstance(values, Tensor)]
        if is_sharded(weight) and any(
            isinstance(values, nn.Parameter) and not is_sharded(values) for values in channels
        ):
            raise RuntimeError(
                f"the weight of {self.listed[index].name} is sharded and what else its channels have is not, so that "
                "merge_channels can't reach it: let FSDP2 reshard after the backward pass"
            )
        return channels

    def obstacle(self, index: int) -> str:
        """Return why a layer can't be merged as its module stands now, or an empty string: one may be parametrized."""
        module = _alive(self._modules.get(index))
        return "" if module is None else obstacle(module)

    def warn_of_absent_layers(self) -> None:
        """Say once which selected layers are not in the optimizer, at wrapping or since."""
        selected = [layer for layer in self.listed if layer.selected]
        absent = [layer for layer in selected if layer.index not in self.places and layer.index not in self._told]
        if not absent:
            return
        self._told.update(layer.index for layer in absent)
        warnings.warn(
            f"{len(absent)} of the {len(selected)} layers selected for merging are not in the optimizer and left "
            f"alone: {', '.join(layer.name for layer in absent)}; add_param_group binds them",
            stacklevel=user_stacklevel(),
        )

    def _find(self, index: int, groups: _Groups) -> Tensor | None:
        """Return the weight of a layer and remember its place, or None if it is in no group."""
        weight, place = _alive(self._parameters.get(index)), self.places.get(index)
        standing = _at(groups, place)
        if weight is not None and place is not None and weight is standing:  # as at the last step
            if weight.shape != place.shape:  # by FSDP1, which keeps the parameter and flattens what it holds
                raise self._flattened(index, place, weight)
            return weight
        module = _alive(self._modules.get(index))
        for candidate in (weight, None if module is None else module._parameters.get("weight")):
            if candidate is not None and (position := _position(groups, candidate)) is not None:
                return self._bind(index, candidate, *position)
        if place is None:
            return None
        if standing is not None and standing not in self._known and standing.shape == place.shape:
            return self._bind(index, standing, place.group, place.position)
        self._check_not_flattened(index, groups, place)
        return None

    def _bind(self, index: int, weight: Tensor, group: int, position: int) -> Tensor:
        layer = self.listed[index]
        check_kernels(f"the weight of {layer.name}", weight)
        if weight.shape[0] != layer.kernels:
            raise ValueError(
                f"the weight of {layer.name} has shape {tuple(weight.shape)}, but its layer has {layer.kernels} "
                "kernels: the parameters were flattened or partitioned (DeepSpeed ZeRO, FSDP1), and kernels no longer "
                "exist as such; use DDP or FSDP2"
            )
        self.places[index], self._parameters[index] = Place(group, position, weight.shape), weakref.ref(weight)
        return weight

    def _check_not_flattened(self, index: int, groups: _Groups, place: Place) -> None:
        """Refuse parameters that were flattened, into one or each alone: a new one that could hold the weight."""
        parameters = groups[place.group]["params"] if place.group < len(groups) else []
        flat = _at(groups, place) if len(parameters) != 1 else parameters[0]
        if flat is None or flat in self._known or flat.dim() != 1 or len(place.shape) < 2:
            return
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if flat.numel() * (torch.distributed.get_world_size() if distributed else 1) >= place.shape.numel():
            raise self._flattened(index, place, flat)

    def _flattened(self, index: int, place: Place, found: Tensor) -> RuntimeError:
        return RuntimeError(
            f"the weight of {self.listed[index].name} had shape {tuple(place.shape)} when the optimizer was wrapped, "
            f"but its place among the parameters now holds one of shape {tuple(found.shape)}: the parameters were "
            "flattened or replaced (DeepSpeed ZeRO, FSDP1), and kernels no longer exist as such; use DDP or FSDP2"
        )


class _Identities:
    """A set of tensors by identity that doesn't keep them alive; an id alone may be another tensor's by now."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._references = {id(tensor): weakref.ref(tensor) for tensor in tensors}

    def __contains__(self, tensor: Tensor) -> bool:
        reference = self._references.get(id(tensor))
        return reference is not None and reference() is tensor


def _alive(reference: weakref.ref[_Referent] | None) -> _Referent | None:
    return None if reference is None else reference()


def _parameters(groups: _Groups) -> list[Tensor]:
    return [parameter for group in groups for parameter in group["params"]]


def _at(groups: _Groups, place: Place | None) -> Tensor | None:
    if place is None or place.group >= len(groups):
        return None
    parameters: list[Tensor] = groups[place.group]["params"]
    return parameters[place.position] if place.position < len(parameters) else None


def _position(groups: _Groups, weight: Tensor) -> tuple[int, int] | None:
    for index, group in enumerate(groups):
        for position, parameter in enumerate(group["params"]):
            if parameter is weight:
                return index, position
    return None
