"""A plain loop of torch, with a schedule and mixed precision.

python examples/plain_torch.py
"""

from __future__ import annotations

import torch
from digits import DEVICE, SETTINGS, accuracy, digits, network, say
from torch import nn
from torch.utils.data import DataLoader

from inmerge_optim import InMergeOptimizer


def main(epochs: int = 3) -> None:
    train, test = digits()
    loader = DataLoader(train, batch_size=64, shuffle=True)
    model = network().to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = InMergeOptimizer(optimizer, model, **SETTINGS)  # the one new line
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=epochs * len(loader))
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=DEVICE.type == "cuda")
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            with torch.autocast(DEVICE.type, torch.float16, enabled=scaler.is_enabled()):
                loss = nn.functional.cross_entropy(model(images.to(DEVICE)), labels.to(DEVICE))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
    say(optimizer, accuracy(model, test))


if __name__ == "__main__":
    main()
