"""timm's pieces as its train.py puts them together: optimizer, schedule, scaler, averaged weights, Lookahead.

python examples/timm_loop.py
"""

from __future__ import annotations

from digits import DEVICE, SETTINGS, accuracy, digits, network, say
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler
from torch import autocast, float16, nn
from torch.utils.data import DataLoader

from inmerge_optim import InMergeOptimizer


def main(epochs: int = 3) -> None:
    train, test = digits()
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)
    model = network().to(DEVICE)
    optimizer = create_optimizer_v2(model, "lookahead_momentum", lr=0.05, weight_decay=1e-4)
    optimizer = InMergeOptimizer(optimizer, model, **SETTINGS)  # the one new line
    scaler = NativeScaler(DEVICE.type)
    average = ModelEmaV3(model, decay=0.9)
    scheduler, epochs = create_scheduler_v2(optimizer, num_epochs=epochs, updates_per_epoch=len(loader))
    for epoch in range(epochs):
        for batch, (images, labels) in enumerate(loader):
            with autocast(DEVICE.type, float16, enabled=DEVICE.type == "cuda"):
                loss = nn.functional.cross_entropy(model(images.to(DEVICE)), labels.to(DEVICE))
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            average.update(model)  # after the step: it averages merged weights
            scheduler.step_update(num_updates=epoch * len(loader) + batch + 1)
        if hasattr(optimizer, "sync_lookahead"):
            optimizer.sync_lookahead()  # while there are gradients: timm skips weights that have none
        scheduler.step(epoch + 1)
    say(optimizer, accuracy(average.module, test))


if __name__ == "__main__":
    main()
