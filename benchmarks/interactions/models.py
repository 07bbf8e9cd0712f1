"""Models of unusual make; what merges kernels must know their layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import SGD

from inmerge_optim import InMergeOptimizer
from interactions.peers import MOMENTUM, Peer, expect, network, row, train

NO_LAYERS = "it looks at no layers"


def reasons(model: nn.Module) -> dict[str, str]:
    """Return by layer why it is left alone, if it is, when no layer counts as shallow."""
    optimizer = InMergeOptimizer(SGD(model.parameters(), lr=0.1), model, skip_layers=0)
    return {layer.name: layer.reason for layer in optimizer.layers}


class Segmenter(nn.Module):
    """Two features and two outputs, the last of which are the model's; ``form`` says what it returns."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.coarse, self.fine = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.form = form

    def forward(self, images: Tensor) -> Any:
        early = self.first(images).relu()
        return self.form(self.fine(self.second(early).relu()), self.coarse(early))


@row("models that return a tuple, a list (deep supervision) or a dict: output layers are left alone")
def _(peer: Peer) -> None:
    peer.ours(NO_LAYERS)
    forms = {
        "tuple": lambda fine, coarse: (fine, coarse),
        "list": lambda fine, coarse: [fine, coarse],
        "dict": lambda fine, coarse: {"seg": fine, "deep": [coarse]},
    }
    for form, make in forms.items():
        found = reasons(Segmenter(make))
        expect(found["fine"] == found["coarse"] == "classifier", f"{form}: {found}")
        expect(found["first"] == found["second"] == "", f"{form}: {found}")


class Holder(nn.Module):
    """A model with an attribute called module, as wrappers have one."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.decoder = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.decoder(self.module(images).relu()).mean((2, 3)))


@row("a model with an attribute called module: all of its layers are seen")
def _(peer: Peer) -> None:
    peer.ours(NO_LAYERS)
    found = reasons(Holder())
    expect(found == {"module": "", "decoder": ""}, str(found))


class Half(nn.Module):
    """A parametrization by half of a weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@row("a weight parametrized after wrapping: its original is left alone")
def _(peer: Peer) -> None:
    peer.ours(NO_LAYERS)
    model, optimizer = peer.build(lr=1e-30)
    parametrize.register_parametrization(model.deep, "weight", Half())
    before = model.deep.parametrizations.weight.original.clone()
    train(peer, model, optimizer, 3)
    expect(torch.equal(model.deep.parametrizations.weight.original, before), "it is merged")
    expect(optimizer.merge_counts()["grouped"]["merged"] > 0, "the other layer is not merged")


@row("peft's adapters of convolutions (LoRA): left alone")
def _(peer: Peer) -> None:
    peer.ours(NO_LAYERS)
    model = peft.get_peft_model(network(), peft.LoraConfig(target_modules=["deep"], modules_to_save=["grouped"], r=4))
    optimizer = InMergeOptimizer(SGD(model.parameters(), **MOMENTUM), model, skip_layers=0, merge_prob=1.0)
    found = {layer.name.split("base_model.model.")[-1]: layer.reason for layer in optimizer.layers}
    adapters = {reason for name, reason in found.items() if "lora" in name}
    expect(adapters == {"adapter"}, str(found))
