from torch import nn

from inmerge_optim.layers import *
from inmerge_optim.layers import kernel_layers as _kl
from inmerge_optim.layers import unwrap_model as unwrap


class KernelLayers(list):
    pass


def kernel_layers(model, skip_layers=0.6, *, layer_types=CONVOLUTIONS, example_inputs=None, names=None, exclude=None):
    return KernelLayers(_kl(model, skip_layers, layer_types=layer_types, input_size=example_inputs, names=names))


def layer_modules(model, layers):
    model = unwrap(model)
    return {l.name: model.get_submodule(l.name) for l in layers}


def obstacle(module):
    return "" if isinstance(module._parameters.get("weight"), nn.Parameter) else "parametrized"
