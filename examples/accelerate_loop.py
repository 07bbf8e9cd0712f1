"""A loop of accelerate, with accumulated gradients and a checkpoint.

accelerate launch examples/accelerate_loop.py
"""

from __future__ import annotations

import tempfile

import torch
from accelerate import Accelerator
from digits import SETTINGS, accuracy, digits, network, say
from torch import nn
from torch.utils.data import DataLoader

from inmerge_optim import InMergeOptimizer


def main(epochs: int = 3) -> None:
    accelerator = Accelerator(gradient_accumulation_steps=2)
    train, test = digits()
    loader = DataLoader(train, batch_size=32, shuffle=True)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = InMergeOptimizer(optimizer, model, **SETTINGS)  # wrap first, then prepare
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * len(loader))
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for _ in range(epochs):
        for images, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(images), labels))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)  # the merging goes on from it to the bit
        accelerator.load_state(folder)
    if accelerator.is_main_process:
        say(optimizer.optimizer, accuracy(accelerator.unwrap_model(model), test))


if __name__ == "__main__":
    main()
