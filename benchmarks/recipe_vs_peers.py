"""Whole epochs with evaluation: the recipe against a loop around timm's loader and MedMNIST's published way.

    python benchmarks/recipe_vs_peers.py
    python benchmarks/recipe_vs_peers.py --image-size 64 --threads 2
    python benchmarks/recipe_vs_peers.py --chestxray DIR --prepared-dir DIR     # the recipe alone, against its floor

All train the same model on the same images in batches of the same size, with the same optimizer and threads:

- recipe: recipes/medmnist2d.py as it is; an epoch evaluates validation and writes a checkpoint
- timm: MedMNIST's dataset class behind timm's create_loader, and a bare loop; an epoch evaluates validation
- MedMNIST: the dataset class, torchvision's transforms of PIL images, torch's DataLoader; an epoch evaluates training,
  validation and test set, by MedMNIST's Evaluator, as its published script does
- floor: forward, backward and step, and the forward of validation, on tensors that are there already

The images are random numbers in a file of MedMNIST's form, since time doesn't depend on what they show. The ways take
turns, and the figures are means over their epochs, of which those that are the best so far cost the recipe more. On one
thread the time is the processor's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from unittest import mock

import medmnist
import numpy as np
import timm
import torch
from timm.data import create_loader
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import chestxray
import finetune.training.stage as stage
import medmnist2d

CLASSES = 2
PARTS = ("train", "val", "test")
Times = dict[str, list[float]]


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def write_images(folder: Path, dataset: str) -> None:
    rng, arrays = np.random.default_rng(0), {}
    for part, count in medmnist.INFO[dataset]["n_samples"].items():
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}_labels"] = rng.permutation(np.arange(count) % CLASSES)[:, None].astype(np.uint8)
    np.savez(folder / f"{dataset}.npz", **arrays)


def new_model(options: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = timm.create_model(options.model, num_classes=CLASSES)
    return model, torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True, fused=True
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator) -> None:
    model.train()
    for images, labels in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels.flatten()).backward()
        optimizer.step()


def predict(model: nn.Module, batches: Iterator) -> np.ndarray:
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(images).softmax(1) for images, _ in batches]).numpy()


@contextlib.contextmanager
def timed_epochs(found: Times, prefix: str = "") -> Iterator[None]:
    """Time each epoch of a recipe's stages, from the start of its training to the end of its checkpoint."""
    run_epoch, save_checkpoint = stage._run_epoch, stage.save_checkpoint
    began = [0.0, ""]

    def begin(session, progress):
        began[:] = clock(), prefix + Path(session.stage.folder).name
        return run_epoch(session, progress)

    def end(*arguments, **keywords):
        save_checkpoint(*arguments, **keywords)
        found.setdefault(began[1], []).append(clock() - began[0])

    with mock.patch.multiple(stage, _run_epoch=begin, save_checkpoint=end):
        yield


def recipe(run: Callable[[list[str]], None], options: argparse.Namespace, found: Times, *arguments: str) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        timed_epochs(found, "recipe, "),
    ):
        run(
            [
                *("--model", options.model, "--no-pretrained", "--image-size", str(options.image_size)),
                *("--batch-size", str(options.batch_size), "--epochs", "1", "--inmerge-epochs", str(options.epochs)),
                *("--output", f"{folder}/run", *arguments),
            ]
        )


def timm_way(folder: Path, options: argparse.Namespace) -> Callable[[], None]:
    side, (model, optimizer) = options.image_size, new_model(options)
    kind = getattr(medmnist, medmnist.INFO[options.dataset]["python_class"])
    loaders = {
        part: create_loader(
            kind(part, root=folder, as_rgb=True),
            input_size=(3, side, side),
            batch_size=options.batch_size,
            is_training=part == "train",
            no_aug=True,
            use_prefetcher=False,
            num_workers=0,
        )
        for part in ("train", "val")
    }

    def epoch() -> None:
        train(model, optimizer, loaders["train"])
        predict(model, loaders["val"])

    return epoch


def medmnist_way(folder: Path, options: argparse.Namespace) -> Callable[[], None]:
    side, (model, optimizer) = options.image_size, new_model(options)
    steps = [transforms.ToTensor(), transforms.Normalize(mean=[0.5], std=[0.5])]
    if side != 28:
        steps.insert(0, transforms.Resize((side, side), interpolation=transforms.InterpolationMode.NEAREST))
    kind = getattr(medmnist, medmnist.INFO[options.dataset]["python_class"])
    sets = {part: kind(part, root=folder, as_rgb=True, transform=transforms.Compose(steps)) for part in PARTS}
    training = DataLoader(sets["train"], batch_size=options.batch_size, shuffle=True)
    loaders = {part: DataLoader(images, batch_size=options.batch_size) for part, images in sets.items()}
    evaluators = {part: medmnist.Evaluator(options.dataset, part, root=folder) for part in PARTS}

    def epoch() -> None:
        train(model, optimizer, training)
        for part, loader in loaders.items():
            evaluators[part].evaluate(predict(model, loader))

    return epoch


def floor(training: int, validation: int, options: argparse.Namespace, channels: int = 3) -> Callable[[], None]:
    side, size, (model, optimizer) = options.image_size, options.batch_size, new_model(options)
    images, labels = torch.randn(size, channels, side, side), torch.arange(size) % CLASSES
    held_out = [size] * (validation // size) + [validation % size] * bool(validation % size)

    def epoch() -> None:
        train(model, optimizer, ((images, labels) for _ in range(training // size)))
        predict(model, ((images[:count], labels) for count in held_out))

    return epoch


def print_table(found: Times) -> None:
    seconds = {name: fmean(times) for name, times in found.items()}
    print("| way | an epoch | over the floor | not forward, backward, step | epochs |\n|---|---|---|---|---|")
    for name, value in seconds.items():
        share = 1 - seconds["floor"] / value
        print(f"| {name} | {value:.2f} s | {value / seconds['floor']:.3f} | {share:.1%} | {len(found[name])} |")


def against_peers(options: argparse.Namespace) -> None:
    found: Times = {}
    counts = medmnist.INFO[options.dataset]["n_samples"]  # which the class insists on
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, options.dataset)
        ways = {
            "timm's loader": timm_way(folder, options),
            "MedMNIST's way": medmnist_way(folder, options),
            "floor": floor(counts["train"], counts["val"], options),
        }
        for _ in range(options.rounds):
            recipe(
                medmnist2d.main, options, found, "--dataset", options.dataset, "--data-dir", name, "--allow-modified"
            )
            for way, epoch in ways.items():
                for _ in range(options.epochs):
                    start = clock()
                    epoch()
                    found.setdefault(way, []).append(clock() - start)
    found.pop("recipe, backbone")  # the first epoch warms up
    print_table(found)


def chestxray_epochs(options: argparse.Namespace) -> None:
    """Time the recipe on prepared ChestX-ray14 against forward, backward and step of as many images."""
    found: Times = {}
    sizes = []
    run_epoch = stage._run_epoch

    def counted(session, progress):
        sizes[:] = len(session.data.train), len(session.data.val)
        return run_epoch(session, progress)

    with mock.patch.object(stage, "_run_epoch", counted):
        extra = ("--prepared-dir", str(options.prepared_dir)) if options.prepared_dir else ()
        recipe(chestxray.main, options, found, "--data-dir", str(options.chestxray), "--allow-missing", *extra)
    found.pop("recipe, backbone")
    epoch = floor(*sizes, options)
    for _ in range(options.epochs + 1):
        start = clock()
        epoch()
        found.setdefault("floor", []).append(clock() - start)
    found["floor"] = found["floor"][1:]
    print(f"{sizes[0]:,} training and {sizes[1]:,} validation images")
    print_table(found)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--dataset", default="breastmnist", help="of two classes: breastmnist, or pneumoniamnist")
    parser.add_argument("--image-size", type=int, default=28)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=2, help="in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--chestxray", type=Path, help="NIH's folder, or a part of it")
    parser.add_argument("--prepared-dir", type=Path, help="where prepared images of it are kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # of random weights and images
    os.environ["TQDM_DISABLE"] = "1"
    print(
        f"torch {torch.__version__}, timm {timm.__version__}, {options.threads} thread(s), {options.model} at "
        f"{options.image_size} px, batches of {options.batch_size}, means"
    )
    if options.chestxray:
        chestxray_epochs(options)
    else:
        against_peers(options)


if __name__ == "__main__":
    main()
