"""Averages of weights over training, as arms to compare with, and batch norm statistics that fit the weights."""

from collections.abc import Iterable
from typing import Literal

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn, update_bn

Average = Literal["ema", "swa"]
EMA_DECAY = 0.9998


def create_average(kind: Average, model: nn.Module) -> ModelEmaV3 | AveragedModel:
    """A copy of the model that will hold the average, of batch norm's running statistics too.

    "ema" is timm's exponential moving average over steps, whose decay grows to EMA_DECAY, so that it forgets its start
    in a short stage as well; "swa" is torch's equal average over the ends of the epochs.
    """
    if kind == "ema":
        return ModelEmaV3(model, decay=EMA_DECAY, use_warmup=True)
    # By default CUDA averages all tensors of a kind at once, and refuses batch norm's counts, which are integers.
    return AveragedModel(model, avg_fn=get_swa_avg_fn(), use_buffers=True)


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def recalibrate_batch_norm(accelerator: Accelerator, model: nn.Module, inputs: Iterable[torch.Tensor]) -> None:
    """Estimate the running statistics anew for the weights as they are; every process sees its share of `inputs`."""
    update_bn(inputs, model)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for statistic in (module.running_mean, module.running_var):
                if statistic is not None:
                    statistic.copy_(accelerator.reduce(statistic, reduction="mean"))
