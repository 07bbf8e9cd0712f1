"""MONAI's SupervisedTrainer.

python examples/monai_trainer.py
"""

from __future__ import annotations

import torch
from digits import DEVICE, SETTINGS, accuracy, digits, network, say
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler
from torch.utils.data import DataLoader

from inmerge_optim import InMergeOptimizer


def main(epochs: int = 3) -> None:
    train, test = digits()
    model = network().to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = InMergeOptimizer(optimizer, model, **SETTINGS)  # the one new line
    SupervisedTrainer(
        device=DEVICE,
        max_epochs=epochs,
        train_data_loader=DataLoader(train, batch_size=64, shuffle=True),
        network=model,
        optimizer=optimizer,
        loss_function=torch.nn.CrossEntropyLoss(),
        amp=DEVICE.type == "cuda",
        train_handlers=[LrScheduleHandler(torch.optim.lr_scheduler.StepLR(optimizer, 10), print_lr=False)],
    ).run()
    say(optimizer, accuracy(model, test))


if __name__ == "__main__":
    main()
