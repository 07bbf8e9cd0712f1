"""Lightning: the wrapper is made in configure_optimizers, and a callback logs what was merged.

python examples/lightning_module.py
"""

from __future__ import annotations

from typing import Any

import torch
from digits import SETTINGS, accuracy, digits, network, say
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from inmerge_optim import InMergeOptimizer
from inmerge_optim.callbacks import LightningMergeCallback


class Classifier(LightningModule):
    """The network as Lightning wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        optimizer = InMergeOptimizer(optimizer, self.network, **SETTINGS)  # the one new line
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(epochs: int = 3) -> None:
    train, test = digits()
    classifier = Classifier()
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[LightningMergeCallback()],
        log_every_n_steps=10,
        logger=False,  # put yours here
        enable_checkpointing=False,
    )
    trainer.fit(classifier, DataLoader(train, batch_size=64, shuffle=True))
    say(trainer.optimizers[0], accuracy(classifier.network, test))


if __name__ == "__main__":
    main()
