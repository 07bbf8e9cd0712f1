"""What a model is called with, and what is told where it can't be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_nets import Net, trace
from torch import nn

from inmerge_optim import kernel_layers


class Two(Net):
    """An image, and a number beside it."""

    def forward(self, image, age=None):
        assert image.shape[1:] == (3, 20, 30)
        assert age is None or age.dtype == torch.int64
        return self.head(self.deep(self.stem(image)).mean((2, 3)) + (0 if age is None else age[:, None]))


class OfDict(Two):
    """Both in one argument."""

    def forward(self, batch):
        return super().forward(batch["image"], batch["age"])


@pytest.mark.parametrize(
    ("model", "example_inputs"),
    [
        (Two, (3, 20, 30)),
        (Two, [3, 20, 30]),
        (Two, torch.Size((3, 20, 30))),
        (Two, tuple(np.array([3, 20, 30]))),
        (Two, torch.zeros(2, 3, 20, 30)),
        (Two, torch.zeros(2, 3, 20, 30, device="meta")),
        (Two, torch.zeros(2, 3, 20, 30, dtype=torch.float64)),
        (Two, ((3, 20, 30),)),
        (Two, (torch.zeros(4, 3, 20, 30), torch.zeros(4, dtype=torch.int64))),
        (Two, ((3, 20, 30), None)),
        (Two, {"age": torch.zeros(1, dtype=torch.int64, device="meta"), "image": (3, 20, 30)}),
        (OfDict, {"age": torch.zeros(4, dtype=torch.int64), "image": torch.zeros(4, 3, 20, 30)}),
        (OfDict, ({"age": torch.zeros(1, dtype=torch.int64), "image": (3, 20, 30)},)),
    ],
)
def test_example_inputs_say_what_a_model_is_called_with(model, example_inputs):
    assert trace(model(), example_inputs).executed == ["stem", "deep"]
    assert trace(model().bfloat16(), example_inputs).executed == ["stem", "deep"]


@pytest.mark.parametrize(
    ("example_inputs", "error", "message"),
    [
        (224, TypeError, "example_inputs is 224, but it must be a size such as"),
        ("3x32x32", TypeError, "example_inputs is '3x32x32', but"),
        ((3, 32.0, 32), TypeError, r"example_inputs is \(3, 32.0, 32\), but"),
        ({}, TypeError, "example_inputs is {}, but"),
        ((), TypeError, r"example_inputs is \(\), but"),
        ((3, 0, 32), ValueError, r"example_inputs has the size \(3, 0, 32\), but each of its lengths"),
    ],
)
def test_example_inputs_of_another_kind_are_refused(example_inputs, error, message):
    with pytest.raises(error, match=message):
        kernel_layers(Net(), example_inputs=example_inputs)


def test_inputs_that_do_not_fit_are_told_of():
    with pytest.warns(
        UserWarning, match=r"Net can't be traced with an input of \(5, 32, 32\) \(RuntimeError: .*channels"
    ):
        kernel_layers(Net(), 0, example_inputs=(5, 32, 32))
    with pytest.warns(UserWarning, match="Net can't be traced with the example_inputs"):
        kernel_layers(Net(), 0, example_inputs=torch.zeros(1, 5, 32, 32))


def test_nothing_is_computed():
    model = nn.Sequential(nn.Conv3d(1, 4096, 3), nn.Conv3d(4096, 8, 3))  # its features would take 180 GB
    assert trace(model, (1, 224, 224, 224)).executed == ["0", "1"]
