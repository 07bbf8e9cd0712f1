"""What the callbacks for the Hugging Face Trainer and Lightning log, and what they need installed."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
import types

import pytest
import torch
from torch import nn
from toy import MERGED, batch, network, sgd, train, wrapped

from inmerge_optim import callbacks

STEPS, EVERY = 7, 3  # two logs at the trainer's steps, and one of the rest


def dataset():
    images, labels = zip(*(batch(step) for step in range(STEPS)), strict=True)
    return list(zip(torch.cat(images), torch.cat(labels), strict=True))


def assert_logged(logged, optimizer, layers=("",)):
    """Assert that what was logged adds up to the counts, by layer or in all, and that shares and cosines fit."""
    counts = optimizer.merge_counts()
    for layer in layers:
        prefix = f"merge/{layer}/" if layer else "merge/"
        of = [counts[layer]] if layer else list(counts.values())
        logs = [log for log in logged if f"{prefix}drawn" in log]
        assert len(logs) == 3
        for name in ("drawn", "merged"):
            assert sum(log[f"{prefix}{name}"] for log in logs) == sum(count[name] for count in of) > 0
        for log in logs:
            assert log[f"{prefix}share"] == pytest.approx(log[f"{prefix}merged"] / log[f"{prefix}drawn"])
        cosines = sum(log[f"{prefix}mean_cosine"] * log[f"{prefix}merged"] for log in logs)
        assert cosines == pytest.approx(sum(count["mean_cosine"] * count["merged"] for count in of), abs=1e-4)


@pytest.fixture
def trainer(tmp_path):
    """Return a maker of Hugging Face Trainers around an optimizer of a network."""
    transformers = pytest.importorskip("transformers")

    class WithLoss(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, pixel_values, labels):
            return {"loss": nn.functional.cross_entropy(self.model(pixel_values), labels)}

    def make(model, optimizer):
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=STEPS, logging_steps=EVERY, per_device_train_batch_size=6, use_cpu=True,
            report_to=[], disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        data = [{"pixel_values": image, "labels": label} for image, label in dataset()]
        return transformers.Trainer(WithLoss(model), arguments, train_dataset=data, optimizers=(optimizer, None))

    return make


@pytest.mark.parametrize("per_layer", [False, True])
def test_the_trainer_logs_what_was_merged_since_its_last_log(trainer, per_layer):
    model = network()
    optimizer = wrapped(model)
    train(model, optimizer, 1)  # before the training: none of its business
    before = {name: dict(count) for name, count in optimizer.merge_counts().items()}
    trains = trainer(model, optimizer)
    trains.add_callback(callbacks.TrainerMergeCallback(trains, per_layer=per_layer))
    trains.train()
    merges = [log for log in trains.state.log_history if any(name.startswith("merge/") for name in log)]
    assert [log["step"] for log in merges] == [3, 6, 7]
    assert [log["step"] for log in trains.state.log_history if "loss" in log] == [3, 6]
    assert sum(log["merge/drawn"] for log in merges) == sum(
        count["drawn"] - before[name]["drawn"] for name, count in optimizer.merge_counts().items()
    )
    assert any("merge/deep/share" in log for log in merges) == per_layer


def test_every_reporter_of_the_trainer_is_told_whatever_its_place(trainer):
    transformers = pytest.importorskip("transformers")

    class Reporter(transformers.TrainerCallback):
        def __init__(self):
            self.logged = []

        def on_log(self, args, state, control, logs, **kwargs):
            self.logged.append(dict(logs))

    model = network()
    optimizer = wrapped(model)
    trains = trainer(model, optimizer)
    first, last = Reporter(), Reporter()
    for callback in (first, callbacks.TrainerMergeCallback(trains, per_layer=True), last):
        trains.add_callback(callback)
    trains.train()
    for reporter in (first, last):
        assert_logged(reporter.logged, optimizer, ["", *MERGED])


def test_the_trainer_without_a_wrapped_optimizer_is_told_so(trainer):
    model = network()
    trains = trainer(model, sgd(model))
    trains.add_callback(callbacks.TrainerMergeCallback(trains))
    with pytest.raises(ValueError, match="trains with AcceleratedOptimizer, SGD, and nothing is merged"):
        trains.train()


@pytest.fixture
def fit():
    """Return a function that trains by Lightning with a callback; it returns what every logger was told."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.loggers.logger import DummyLogger

    class Recorder(DummyLogger):
        def __init__(self):
            super().__init__()
            self.logged = []

        def log_metrics(self, metrics, step=None):
            self.logged.append({**metrics, "step": step})

    class Lit(lightning.LightningModule):
        def __init__(self, model, optimizers):
            super().__init__()
            self.model, self.optimizers_of_it = model, optimizers
            self.automatic_optimization = len(optimizers) == 1

        def training_step(self, many, _):
            loss = nn.functional.cross_entropy(self.model(many[0]), many[1])
            if not self.automatic_optimization:
                self.manual_backward(loss)
                for optimizer in self.optimizers():
                    optimizer.step()
                self.zero_grad()
            return loss

        def configure_optimizers(self):
            return self.optimizers_of_it

    def train_by_lightning(model, optimizers, callback, **options):
        recorder = Recorder()
        lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=recorder, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, log_every_n_steps=EVERY, callbacks=[callback], **options,
        ).fit(Lit(model, optimizers), torch.utils.data.DataLoader(dataset(), batch_size=6))  # fmt: skip
        return recorder.logged

    return train_by_lightning


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and devices
def test_lightning_logs_what_was_merged_since_its_last_log(fit):
    model = network()
    optimizer = wrapped(model)
    logged = fit(model, [optimizer], callbacks.LightningMergeCallback(per_layer=True))
    assert [log["step"] for log in logged if "merge/drawn" in log] == [2, 5, 6]  # it counts from 0
    assert_logged(logged, optimizer, ["", *MERGED])


@pytest.mark.filterwarnings("ignore")
def test_two_optimizers_in_lightning_are_logged_apart(fit):
    model = network()
    optimizers = [wrapped(model, names=["deep"]), wrapped(model, names=["grouped"], seed=1)]
    logged = fit(model, optimizers, callbacks.LightningMergeCallback())
    for index, optimizer in enumerate(optimizers):
        (count,) = optimizer.merge_counts().values()
        assert sum(log.get(f"merge_{index}/drawn", 0) for log in logged) == count["drawn"] > 0


@pytest.mark.filterwarnings("ignore")
def test_lightning_without_a_wrapped_optimizer_is_told_so(fit):
    model = network()
    with pytest.raises(ValueError, match="trains with SGD, and nothing is merged"):
        fit(model, [sgd(model)], callbacks.LightningMergeCallback())


@pytest.mark.parametrize("library", ["transformers", "lightning"])
def test_callbacks_are_found_again_by_pickle(library):
    pytest.importorskip(library)
    kind = callbacks.TrainerMergeCallback if library == "transformers" else callbacks.LightningMergeCallback
    assert pickle.loads(pickle.dumps(kind)) is kind
    assert "per_layer" in kind.__doc__


def test_the_package_and_its_callbacks_import_neither_library_unasked():
    script = (
        "import sys, inmerge_optim.callbacks\nfrom inmerge_optim import InMergeOptimizer\n"
        "print({'transformers', 'lightning', 'pytorch_lightning'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"


@pytest.fixture
def fresh(monkeypatch):
    """Return a function that loads the callbacks anew where some libraries are stand-ins and no other is installed."""
    bases = {"transformers": "TrainerCallback", "lightning.pytorch": "Callback", "pytorch_lightning": "Callback"}

    def load(*installed):
        for library, base in bases.items():
            stand_in = types.ModuleType(library)
            setattr(stand_in, base, type(base, (), {"library": library}))
            monkeypatch.setitem(sys.modules, library, stand_in if library in installed else None)
        spec = importlib.util.find_spec("inmerge_optim.callbacks")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize(
    ("callback", "installed"),
    [
        ("TrainerMergeCallback", "transformers"),
        ("LightningMergeCallback", "lightning.pytorch"),
        ("LightningMergeCallback", "pytorch_lightning"),
    ],
)
def test_a_callback_needs_its_own_library_alone(fresh, callback, installed):
    assert getattr(fresh(installed), callback).library == installed


def test_a_missing_library_is_named(fresh):
    module = fresh()
    with pytest.raises(ImportError, match=r"TrainerMergeCallback needs transformers.*: pip install transformers$"):
        module.TrainerMergeCallback  # noqa: B018
    with pytest.raises(ImportError, match=r"LightningMergeCallback needs lightning.*: pip install lightning$"):
        module.LightningMergeCallback  # noqa: B018


def test_a_name_that_is_no_callback_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'MergeCallback'"):
        callbacks.MergeCallback  # noqa: B018
    assert dir(callbacks) == ["LightningMergeCallback", "TrainerMergeCallback"]
