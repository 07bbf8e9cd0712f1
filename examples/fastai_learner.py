"""fastai's Learner: an OptimWrapper holds the wrapper, as it holds any optimizer of torch.

python examples/fastai_learner.py
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from digits import DEVICE, SETTINGS, accuracy, digits, network, say
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper

# What gives the learner fit_one_cycle, unfreeze and the like.
import fastai.callback.schedule  # noqa: F401 isort: skip

from inmerge_optim import InMergeOptimizer


def main(epochs: int = 3) -> None:
    train, test = digits()
    loaders = (DataLoader(data, bs=64, shuffle=data is train) for data in (train, test))
    model = network()

    def merging(parameters: Any, **options: Any) -> InMergeOptimizer:
        return InMergeOptimizer(torch.optim.SGD(parameters, **options), model, **SETTINGS)

    learner = Learner(
        DataLoaders(*loaders, device=DEVICE),
        model,
        loss_func=torch.nn.CrossEntropyLoss(),
        opt_func=partial(OptimWrapper, opt=merging),
    )
    learner.fit_one_cycle(epochs, lr_max=0.05)
    say(learner.opt.opt, accuracy(model, test))


if __name__ == "__main__":
    main()
