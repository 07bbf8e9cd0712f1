"""Trainers, and loops as others write them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastai.data.core
import fastai.data.load
import lightning
import timm.utils
import torch
import transformers
from accelerate.state import AcceleratorState
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from monai.engines import SupervisedTrainer
from timm.models import resume_checkpoint
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.optim import SGD, lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from inmerge_optim.callbacks import LightningMergeCallback, TrainerMergeCallback
from interactions.peers import (
    MOMENTUM,
    NotApplicable,
    Peer,
    backward,
    batch,
    expect,
    expect_same,
    loss_of,
    network,
    row,
    same,
    trained,
    weights,
)

STEPS = 4
DECAY = 0.5  # of averages


def examples() -> list[tuple[Tensor, Tensor]]:
    """Return the images and labels of the first steps' batches, one by one."""
    return [pair for step in range(STEPS) for pair in zip(*batch(step), strict=True)]


def loader() -> DataLoader[tuple[Tensor, Tensor]]:
    """Return the first steps' batches."""
    return DataLoader(examples(), batch_size=len(examples()) // STEPS)


# timm and torchvision


def trained_by_hand(peer: Peer, clip: float | None = None) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """Train in a plain loop; give the model and its averaged weights after each step."""
    model, optimizer = peer.build()
    average = weights(model)
    for step in range(STEPS):
        backward(model, optimizer, step)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        average = {name: value.lerp(weights(model)[name], 1 - DECAY) for name, value in average.items()}
        yield model, average


def expect_average(average: nn.Module, expected: dict[str, Tensor]) -> None:
    """Compare averaged weights, which are summed in another order."""
    expect_same(average, expected, "on average", within=1e-6)


@row("timm's ClassificationTask: its average, its checkpoint, resumed run")
def _(peer: Peer) -> None:
    peer.plain("the task steps without closures")

    def make(seed: int = 0) -> tuple[ClassificationTask, Any]:
        model, optimizer = peer.build(seed=seed)
        task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
        task.setup_ema(decay=DECAY)
        return task, optimizer

    def go(task: ClassificationTask, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            task(*batch(step))["loss"].backward()
            optimizer.step()
            task.update_ema()

    task, optimizer = make()
    go(task, optimizer, range(2))
    resumed, other = make(seed=1)
    for average, key in ((False, "state_dict"), (True, "state_dict_ema")):
        resumed.load_checkpoint_state(task.get_checkpoint_state(ema=average)[key], ema=average)
    other.load_state_dict(optimizer.state_dict())
    go(resumed, other, range(2, STEPS))
    *_, (expected, averaged) = trained_by_hand(peer)
    expect_same(resumed.trainable_module, expected, "after the resume")
    expect_average(resumed.trainable_module_ema.module, averaged)


@row("timm's train.py: NativeScaler, clipping, ModelEmaV3, CheckpointSaver, resumed run")
def _(peer: Peer) -> None:
    peer.plain("the loop steps without closures")

    def go(model: nn.Module, optimizer: Any, scaler: Any, average: Any, steps: range) -> None:
        second_order = hasattr(optimizer, "is_second_order") and optimizer.is_second_order
        for step in steps:
            loss = loss_of(model, step)
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=0.1, parameters=model.parameters(), create_graph=second_order)
            average.update(model)

    with tempfile.TemporaryDirectory() as folder:
        model, optimizer = peer.build()
        scaler, average = timm.utils.NativeScaler("cpu"), timm.utils.ModelEmaV3(model, decay=DECAY)
        go(model, optimizer, scaler, average, range(2))
        places = {"checkpoint_dir": folder, "recovery_dir": folder}
        timm.utils.CheckpointSaver(model, optimizer, model_ema=average, amp_scaler=scaler, **places).save_checkpoint(0)
        resumed, other = peer.build(seed=1)
        scaler = timm.utils.NativeScaler("cpu")
        resume_checkpoint(resumed, f"{folder}/last.pth.tar", other, scaler, log_info=False)
        go(resumed, other, scaler, average, range(2, STEPS))
    *_, (expected, averaged) = trained_by_hand(peer, clip=0.1)
    expect_same(resumed, expected, "after the resume")
    expect_average(average.module, averaged)


@row("torchvision's reference loop: GradScaler, clipping, AveragedModel, warm-up by SequentialLR")
def _(peer: Peer) -> None:
    peer.plain("the loop steps without closures")
    model, optimizer = peer.build()
    warm_up = lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=2)
    schedule = lr_scheduler.SequentialLR(optimizer, [warm_up, lr_scheduler.StepLR(optimizer, 100)], milestones=[2])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    average = AveragedModel(network(), multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    average.update_parameters(network())  # the first is copied
    for step in range(STEPS):
        loss = loss_of(model, step)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        average.update_parameters(model)
        schedule.step()
    *_, (expected, averaged) = trained_by_hand(peer, clip=0.1)
    expect_same(model, expected, "against a plain loop")
    expect_average(average.module, averaged)


# Hugging Face


class WithLoss(nn.Module):
    """The network as Hugging Face's Trainer wants it: named inputs, and the loss in its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def hugging_face(model: nn.Module, optimizer: Any, folder: str, **arguments: Any) -> transformers.Trainer:
    """Return a Trainer of six steps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = transformers.TrainingArguments(
        folder, max_steps=6, save_steps=3, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        disable_tqdm=True, **{"logging_strategy": "no", "warmup_steps": 2, **arguments},
    )  # fmt: skip
    data = [{"pixel_values": image, "labels": label} for image, label in examples()]
    return transformers.Trainer(WithLoss(model), settings, train_dataset=data, optimizers=(optimizer, None))


@row("Hugging Face Trainer(optimizers=...), its checkpoint, resumed run")
def _(peer: Peer) -> None:
    peer.plain("the Trainer steps without closures")
    with tempfile.TemporaryDirectory() as folder:
        whole = hugging_face(*peer.build(), folder)
        whole.train()
        resumed = hugging_face(*peer.build(seed=1), folder)
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    expect(not same(whole.model.model, network()), "nothing was trained")
    expect_same(resumed.model.model, whole.model.model, "after the resume")


@row("Hugging Face Trainer.create_optimizer(), wrapped: its learning rate, weight decay and schedule are kept")
def _(peer: Peer) -> None:
    peer.around()
    arguments = {"learning_rate": 0.02, "weight_decay": 0.3, "save_strategy": "no"}
    rates = []
    with tempfile.TemporaryDirectory() as folder:
        for wraps in (False, True):
            trainer = hugging_face(network(), None, folder, **arguments)
            base = trainer.create_optimizer()
            if wraps:
                trainer.optimizer = peer.wrap(trainer.model.model, lambda *_, base=base: base, {})
            trainer.train()
            rates.append([(group["lr"], group["weight_decay"]) for group in base.param_groups])
    expect(rates[0] == rates[1], f"(rate, decay) is {rates[1]}, not {rates[0]}")


@row("Hugging Face Trainer: a callback logs what is merged since the last log")
def _(peer: Peer) -> None:
    peer.ours("it has no callback")
    with tempfile.TemporaryDirectory() as folder:
        model, optimizer = peer.build()
        trainer = hugging_face(model, optimizer, folder, logging_strategy="steps", logging_steps=4)
        trainer.add_callback(TrainerMergeCallback(trainer, per_layer=True))
        trainer.train()
    expect_logged(trainer.state.log_history, optimizer, logs=2)


def expect_logged(history: list[dict[str, float]], optimizer: Any, logs: int) -> None:
    """Expect so many logs of merging, which add up to the optimizer's counts."""
    found = [log for log in history if "merge/drawn" in log]
    drawn = sum(count["drawn"] for count in optimizer.merge_counts().values())
    expect(len(found) == logs, f"{len(found)} logs, not {logs}")
    expect(sum(log["merge/drawn"] for log in found) == drawn > 0, f"{found} is not {drawn} in all")
    expect(all("merge/deep/mean_cosine" in log for log in found), "no layers")


# Lightning


class Lit(lightning.LightningModule):
    """The network as Lightning wants it."""

    def __init__(self, peer: Peer, seed: int) -> None:
        super().__init__()
        self.model = network(seed)
        self.peer = peer

    def training_step(self, many: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(many[0]), many[1])

    def configure_optimizers(self) -> Any:
        optimizer = self.peer.wrap(self.model, SGD, MOMENTUM)
        return {"optimizer": optimizer, "lr_scheduler": lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}


class Recorder(lightning.pytorch.loggers.logger.DummyLogger):
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append(dict(metrics))


def fit(
    peer: Peer, seed: int, epochs: int, checkpoint: Path | None = None, **options: Any
) -> tuple[nn.Module, lightning.Trainer]:
    """Train by Lightning; its closure comes without the first gradients."""
    if peer.needs_closure:
        raise NotApplicable("Lightning's closure comes without the first gradients (manual optimization is left)")
    module = Lit(peer, seed)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **{"logger": False, **options},
    )  # fmt: skip
    trainer.fit(module, loader(), ckpt_path=checkpoint)
    return module.model, trainer


@row("Lightning configure_optimizers, its checkpoint, resumed run")
def _(peer: Peer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole, _ = fit(peer, 0, 2)
        _, trainer = fit(peer, 0, 1)
        trainer.save_checkpoint(Path(folder, "half.ckpt"))
        resumed, _ = fit(peer, 1, 2, Path(folder, "half.ckpt"))
    expect(not same(whole, network()), "nothing was trained")
    expect_same(resumed, whole, "after the resume")


@row("Lightning: a callback logs what is merged since the last log")
def _(peer: Peer) -> None:
    peer.ours("it has no callback")
    recorder = Recorder()
    callback = LightningMergeCallback(per_layer=True)
    _, trainer = fit(peer, 0, 1, logger=recorder, log_every_n_steps=3, callbacks=[callback])
    expect_logged(recorder.logged, trainer.optimizers[0], logs=2)


# MONAI, fastai


@row("MONAI's SupervisedTrainer")
def _(peer: Peer) -> None:
    peer.plain("the trainer steps without closures")
    model, optimizer = peer.build()
    SupervisedTrainer(torch.device("cpu"), 1, loader(), model, optimizer, nn.CrossEntropyLoss()).run()
    expect_same(model, trained(peer, STEPS), "against a plain loop")


@row("fastai's Learner and OptimWrapper")
def _(peer: Peer) -> None:
    peer.plain("the learner steps without closures")
    model, optimizer = peer.build()
    batches = fastai.data.load.DataLoader(examples(), bs=len(examples()) // STEPS)
    loaders = fastai.data.core.DataLoaders(batches, batches, device=torch.device("cpu"))
    learner = Learner(loaders, model, nn.CrossEntropyLoss(), opt_func=OptimWrapper(opt=optimizer), default_cbs=False)
    learner.add_cb(fastai.learner.TrainEvalCallback())
    with learner.no_logging():
        learner.fit(1, lr=MOMENTUM["lr"])
    expect_same(model, trained(peer, STEPS), "against a plain loop")
