"""What is refused or told of is told in one whole sentence: what it was, what was expected, what to do."""

from __future__ import annotations

import re
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from toy import network, sgd, wrapped

from inmerge_optim import InMergeOptimizer, kernel_layers, merge_kernels_

PAPER = {"merge_prob": 0.3, "merge_weight": 0.8, "similarity_threshold": 0.3}
NUMBERS = (
    "but kernels are merged in weights of float16, bfloat16, float32 or float64 with the kernels on their first "
    "dimension"
)
GONE = "and kernels no longer exist as such; use DDP or FSDP2"


def merge(weight, **changes):
    return merge_kernels_(weight, **PAPER | {"rng": np.random.default_rng(0)} | changes)


def of_weight(dtype):
    model = network()
    model.deep.weight = nn.Parameter(torch.zeros(8, 8, 3, 3).to(dtype), requires_grad=False)
    return model


def sharded(name, *bases):
    """A network of a class that FSDP makes of its own."""
    model = network()
    model.__class__ = type(name, (*bases, type(model)), {})
    return model


def quantised():
    return nn.Sequential(type("Conv2d", (type("WeightedQuantizedModule", (nn.Module,), {}),), {})())


def flattened(replace):
    """A wrapper whose parameters were flattened behind its back."""
    optimizer = wrapped(network())
    optimizer.param_groups[0]["params"] = replace(optimizer.param_groups[0]["params"])
    return optimizer


def flattened_matrix():
    """The same of a fully connected layer, whose weight has two dimensions, in a group of its own."""
    model = network()
    groups = [{"params": [model.head.weight]}, {"params": [model.head.bias]}]
    settings = {"names": ["head"], "layer_types": (nn.Linear,)}
    optimizer = wrapped(model, torch.optim.SGD(groups, lr=0.1), **settings)
    optimizer.param_groups[0]["params"] = [nn.Parameter(model.head.weight.detach().flatten())]
    return optimizer


def whole_channels():
    """A step where FSDP2 has sharded the weights alone."""
    model = network()
    optimizer = wrapped(model, merge_channels=True)
    with mock.patch("inmerge_optim.binding.is_sharded", lambda tensor: tensor.dim() > 1):
        optimizer.step()


def prepared_base():
    model = network()
    return wrapped(model, Accelerator(cpu=True).prepare_optimizer(sgd(model)))


def partitioned():
    model = network()
    model.deep.weight.data = model.deep.weight.data.flatten()[:10]
    return wrapped(model)


REFUSALS = {
    "the kind of numbers": (
        lambda: merge(torch.ones(4, 2, dtype=torch.int8)),
        TypeError,
        f"weight is torch.int8 of shape (4, 2), {NUMBERS}",
    ),
    "no generator": (
        lambda: merge(torch.ones(4, 2), rng=0),
        TypeError,
        "rng is 0, but it must be a NumPy generator: numpy.random.default_rng(0)",
    ),
    "groups": (
        lambda: merge(torch.ones(4, 3), groups=3),
        ValueError,
        "groups is 3, but it must divide the kernels of a weight of (4, 3)",
    ),
    "no groups": (
        lambda: merge(torch.ones(4, 2), groups=0),
        ValueError,
        "groups is 0, but it must divide the kernels of a weight of (4, 2)",
    ),
    "layer types": (
        lambda: kernel_layers(network(), layer_types=(nn.ConvTranspose2d,)),
        TypeError,
        "layer_types has ConvTranspose2d, but kernels are known for Conv1d, Conv2d, Conv3d and Linear and their "
        "subclasses alone, which have one per row of the weight",
    ),
    "quantised modules": (
        lambda: kernel_layers(quantised()),
        TypeError,
        "0 is a quantised Conv2d, which has no kernels to merge: take the model as it was before quantisation",
    ),
    "numbers of a layer": (
        lambda: kernel_layers(of_weight(torch.complex64), names="deep"),
        TypeError,
        "deep has a complex64 weight, but kernels are compared and averaged as real numbers of at least 16 bits: leave "
        "the layer out by exclude",
    ),
    "names of another kind": (
        lambda: kernel_layers(network(), names=7),
        TypeError,
        "names is 7, but it must be a regular expression or a sequence of names",
    ),
    "FSDP2": (
        lambda: kernel_layers(sharded("Sharded", FSDPModule)),
        ValueError,
        "Sharded is sharded by FSDP2 and can't be traced: call kernel_layers before sharding, and pass "
        "names=[layer for layer in layers if layer.selected]",
    ),
    "FSDP1": (
        lambda: wrapped(sharded("FullyShardedDataParallel")),
        ValueError,
        "FullyShardedDataParallel is sharded by FSDP1, which flattens the weights, and kernels no longer exist as "
        "such: use DDP or FSDP2 (fully_shard; in accelerate fsdp_version 2)",
    ),
    "no optimizer": (
        lambda: InMergeOptimizer(network(), network()),
        TypeError,
        "base_optimizer is a Sequential, but it must be a torch.optim.Optimizer",
    ),
    "wrapped twice": (
        lambda: wrapped(model := network(), wrapped(model)),
        TypeError,
        "base_optimizer is or holds an InMergeOptimizer already: wrap the bare optimizer, once",
    ),
    "prepared": (
        prepared_base,
        TypeError,
        "base_optimizer is prepared by accelerate already, and would be merged at steps that accumulation or an "
        "overflow skips: wrap first, then prepare the wrapper",
    ),
    "parameters for a model": (
        lambda: InMergeOptimizer(sgd(network()), [network()]),
        TypeError,
        "model is a list, but it must be the torch.nn.Module whose parameters the optimizer has",
    ),
    "no layers": (
        lambda: InMergeOptimizer(sgd(model := nn.Linear(4, 2)), model),
        ValueError,
        "Linear has no layer of the layer_types: there are no kernels to merge in it",
    ),
    "nothing selected": (
        lambda: InMergeOptimizer(sgd(model := network()), model, names="deep", exclude="deep"),
        ValueError,
        "no layer of Sequential is selected for merging (2 not named, 1 excluded): choose other skip_layers, or give "
        "names",
    ),
    "another model's optimizer": (
        lambda: wrapped(network(), sgd(network())),
        ValueError,
        "none of the selected layers of Sequential has its weight in the optimizer (2 not in the optimizer, 1 not "
        "named): build the base on this model's parameters, and wrap before DeepSpeed ZeRO or FSDP1 flatten them (they "
        "are not supported)",
    ),
    "partitioned": (
        partitioned,
        ValueError,
        "the weight of deep has shape (10,), but its layer has 8 kernels: the parameters were flattened or partitioned "
        f"(DeepSpeed ZeRO, FSDP1), {GONE}",
    ),
    "flattened": (
        lambda: flattened(lambda whole: [nn.Parameter(torch.cat([part.detach().flatten() for part in whole]))]).step(),
        RuntimeError,
        "the weight of deep had shape (8, 8, 3, 3) when the optimizer was wrapped, but its place among the parameters "
        "now holds one of shape (1140,): the parameters were flattened or replaced (DeepSpeed ZeRO, FSDP1), "
        f"{GONE}",
    ),
    "whole channels of a sharded weight": (
        whole_channels,
        RuntimeError,
        "the weight of deep is sharded and what else its channels have is not, so that merge_channels can't reach it: "
        "let FSDP2 reshard after the backward pass",
    ),
    "a flattened matrix": (
        lambda: flattened_matrix().step(),
        RuntimeError,
        "the weight of head had shape (4, 8) when the optimizer was wrapped, but its place among the parameters now "
        f"holds one of shape (32,): the parameters were flattened or replaced (DeepSpeed ZeRO, FSDP1), {GONE}",
    ),
}


@pytest.mark.parametrize(("refused", "error", "sentence"), REFUSALS.values(), ids=REFUSALS)
def test_what_is_refused_is_told_in_a_whole_sentence(refused, error, sentence):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model that has no layers is told of as well
        with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
            refused()


def test_capture_is_refused_in_a_whole_sentence(monkeypatch):
    optimizer = wrapped(network())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    sentence = (
        "a step of InMergeOptimizer is being captured in a CUDA graph, which would replay its random choices for ever: "
        "capture the forward and backward pass alone, and step outside the graph"
    )
    with pytest.raises(RuntimeError, match=f"^{sentence}$"):
        optimizer.step()


class Dependent(nn.Sequential):
    """Eleven layers whose depth depends on data."""

    def __init__(self):
        super().__init__(*[nn.Conv2d(3, 3, 1) for _ in range(11)])

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def test_warnings_are_whole_sentences():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kernel_layers(Dependent(), 10)
        model = network()
        optimizer = wrapped(model, sgd(model.deep))
        optimizer.merge_prob, optimizer.similarity_threshold = 1.0, 1.0
        optimizer.merge(rounds=1250)
    untraced, few, absent, nothing = (str(warning.message) for warning in caught)
    assert re.fullmatch(
        r"Dependent can't be traced with an input of \(3, 224, 224\) \(DataDependentOutputException: .*\): 11 of its "
        "11 layers are taken in the order of definition, and which of those act as fully connected is not known; "
        "example_inputs or names may help",
        untraced,
    )
    assert few == (
        "only 1 of the 11 counted layers of Dependent are selected for merging; the reason of each layer says why, "
        "skip_layers or names select others"
    )
    assert absent == (
        "1 of the 2 layers selected for merging are not in the optimizer and left alone: grouped; add_param_group "
        "binds them"
    )
    assert nothing == (
        "0 of the first 10000 drawn pairs of kernels were merged at a similarity_threshold of 1: so far this run is "
        "nearly a plain baseline; a lower threshold, one that fits each layer ('4sd', 'q0.9') or a model with "
        "pretrained weights merges more"
    )
