"""The Hugging Face Trainer: its own optimizer with all of its arguments, wrapped, and what was merged in its logs.

python examples/huggingface_trainer.py
"""

from __future__ import annotations

import tempfile

from digits import SETTINGS, digits, say
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from inmerge_optim import InMergeOptimizer
from inmerge_optim.callbacks import TrainerMergeCallback


def main(epochs: int = 3) -> None:
    train, test = ([{"pixel_values": image, "labels": label} for image, label in data] for data in digits())
    widths = {"hidden_sizes": [16, 32, 64, 128], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=10, **widths))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            learning_rate=1e-3,
            weight_decay=0.01,
            warmup_steps=5,
            logging_steps=10,
            report_to=[],
            save_strategy="no",
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=train,
            eval_dataset=test,
            compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(1) == found.label_ids).mean()},
        )
        # Wrapping what create_optimizer makes keeps the learning rate, the weight decay and what it applies to.
        trainer.create_optimizer()
        optimizer = trainer.optimizer = InMergeOptimizer(trainer.optimizer, model, **SETTINGS)
        trainer.add_callback(TrainerMergeCallback(trainer))
        trainer.train()
        say(optimizer, trainer.evaluate()["eval_accuracy"])


if __name__ == "__main__":
    main()
