"""timm's training tasks and the loop of its train.py: steps, averages of the weights and checkpoints."""

from __future__ import annotations

import pytest
import timm.utils
import torch
from timm.models import resume_checkpoint
from torch import nn
from toy import batch, loss_of, network, same, weights, wrapped

STEPS, DECAY, CLIP = 4, 0.5, 0.1


def trained_by_hand(clip=None):
    """Return the model that a plain loop leaves, and the average of its weights."""
    model = network()
    optimizer = wrapped(model)
    average = weights(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        average = {name: value.lerp(weights(model)[name], 1 - DECAY) for name, value in average.items()}
    return model, average


def test_a_training_task_averages_merged_weights_and_resumes():
    tasks = pytest.importorskip("timm.task")

    def make(seed=0):
        model = network(seed)
        task = tasks.ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
        task.setup_ema(decay=DECAY)
        return task, wrapped(model)

    def go(task, optimizer, steps):
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
    expected, averaged = trained_by_hand()
    assert same(resumed.trainable_module, expected)
    torch.testing.assert_close(weights(resumed.trainable_module_ema.module), averaged)


def test_the_loop_of_train_py_averages_merged_weights_and_resumes(tmp_path):
    def go(model, optimizer, scaler, average, steps):
        for step in steps:
            loss = loss_of(model, step)
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=CLIP, parameters=model.parameters())
            average.update(model)

    model = network()
    optimizer, scaler = wrapped(model), timm.utils.NativeScaler("cpu")
    average = timm.utils.ModelEmaV3(model, decay=DECAY)
    go(model, optimizer, scaler, average, range(2))
    places = {"checkpoint_dir": str(tmp_path), "recovery_dir": str(tmp_path)}
    timm.utils.CheckpointSaver(model, optimizer, model_ema=average, amp_scaler=scaler, **places).save_checkpoint(0)
    resumed = network(seed=1)
    optimizer, scaler = wrapped(resumed), timm.utils.NativeScaler("cpu")
    resume_checkpoint(resumed, str(tmp_path / "last.pth.tar"), optimizer, scaler, log_info=False)
    go(resumed, optimizer, scaler, average, range(2, STEPS))
    expected, averaged = trained_by_hand(CLIP)
    assert same(resumed, expected)
    torch.testing.assert_close(weights(average.module), averaged)
