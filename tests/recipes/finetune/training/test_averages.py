"""Averages of weights over training."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from finetune.training.averages import create_average
from torch import nn


@pytest.mark.parametrize("foreach", [[], ["cpu"]], ids=["one by one", "all at once, as on CUDA"])
def test_swa_is_the_mean_of_weights_and_statistics(foreach: list[str]) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    average = create_average("swa", model)
    seen = []
    with mock.patch("torch.optim.swa_utils._get_foreach_kernels_supported_devices", return_value=foreach):
        for _ in range(3):
            with torch.no_grad():
                for values in (*model.parameters(), model[1].running_mean):
                    values.normal_()
            seen.append({name: values.clone() for name, values in model.state_dict().items()})
            average.update_parameters(model)
    for name in ("0.weight", "1.bias", "1.running_mean"):
        mean = torch.stack([weights[name] for weights in seen]).mean(0)
        torch.testing.assert_close(average.module.state_dict()[name], mean)
