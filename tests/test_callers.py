"""Warnings name the line of the user, however deep inside the package they are given."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from torch import nn

import inmerge_optim
from inmerge_optim import InMergeOptimizer, kernel_layers, similarity_profile
from inmerge_optim.callers import user_stacklevel


class Untraceable(nn.Sequential):
    """Eleven layers that can't be run; all but one are skipped below: two reasons to warn."""

    def __init__(self):
        super().__init__(*[nn.Conv2d(3, 3, 1) for _ in range(11)])

    def forward(self, x):
        raise RuntimeError("it depends on data")


def by_the_wrapper(model, skip_layers):
    InMergeOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, skip_layers=skip_layers)


@pytest.mark.parametrize("call", [kernel_layers, similarity_profile, by_the_wrapper])
def test_warnings_about_a_model_name_the_line_that_gave_it(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(Untraceable(), skip_layers=10)
    assert [warning.filename for warning in caught] == [__file__] * 2


@pytest.mark.parametrize("package", [inmerge_optim, torch])
def test_a_package_that_is_called_nearly_alike_is_a_users(package):
    neighbour = os.path.dirname(package.__file__) + "vision/models.py"
    namespace = {"user_stacklevel": user_stacklevel}
    exec(compile("def level(): return user_stacklevel()", neighbour, "exec"), namespace)
    assert namespace["level"]() == 1
