"""Images per second that reach the model, against decoding the 1024 px PNGs of ChestX-ray14 in every epoch.

    python benchmarks/input_pipeline.py --data-dir DIR

All turns run in this process on one thread and alternate; the ratios are of their median CPU times, so that other work
on the machine counts little. Files are warm: each is read once before.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from finetune.data.images import Split
from finetune.data.prepared import PreparedImages, prepare
from finetune.data.squares import Form
from finetune.sources.nih_tree import read_nih_tree
from finetune.training.batches import ImageDataset, channel_statistics, crop, crop_corners, flip_mask, model_input

SOURCE, PREPARED, SIZE, BATCH = 1024, 256, 224, 128
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
MEAN, STD = channel_statistics(IMAGENET, channels=3)


def pil_batch(paths: list[str], rng: np.random.Generator) -> torch.Tensor:
    """Decode, resize, crop, flip and normalise image by image, as most scripts do."""
    images = []
    for path in paths:
        with Image.open(path) as file:
            image = file.convert("RGB").resize((PREPARED, PREPARED), Image.Resampling.BILINEAR)
        top, left = rng.integers(PREPARED - SIZE + 1, size=2).tolist()
        pixels = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))
        pixels = pixels[:, ::-1] if rng.random() < 0.5 else pixels
        scaled = torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float().div_(255)
        images.append((scaled - MEAN) / STD)
    return torch.stack(images)


def turns(paths: list[str], images: PreparedImages) -> dict[str, tuple[int, Callable[[], object]]]:
    """What is timed, with the images that each turn handles."""
    rng = np.random.default_rng(0)
    count = images.shape[0]
    data = ImageDataset(Split(images, np.zeros((count, 14), dtype=np.int64), [str(row) for row in range(count)]))
    corners, flipped = crop_corners(count, PREPARED - SIZE, 0, "arm", 0), flip_mask(count, 0.5, 0, "arm", 0)

    def uint8_batch() -> dict[str, torch.Tensor]:
        return data.__getitems__(rng.integers(count, size=BATCH).tolist())

    def float_batch() -> torch.Tensor:
        batch = uint8_batch()
        rows = batch["rows"]
        return model_input(crop(batch["images"], SIZE, corners[rows]), MEAN, STD, flipped[rows])

    return {
        f"PIL, {SOURCE} px PNG to {SIZE} px float": (16, lambda: pil_batch(rng.choice(paths, 16).tolist(), rng)),
        f"prepared, uint8 batches of {BATCH} at {PREPARED} px": (BATCH, uint8_batch),
        f"prepared, cropped, flipped, normalised to {SIZE} px float": (BATCH, float_batch),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="NIH's folder, or a part of it")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = read_nih_tree(options.data_dir, allow_missing=True).images
    paths = [path for path in source.paths if path is not None and Image.open(path).size == (SOURCE, SOURCE)]
    if not paths:
        parser.error(f"{options.data_dir} holds no image of {SOURCE} x {SOURCE}")
    with tempfile.TemporaryDirectory() as folder:
        images = prepare(source, Form(PREPARED), Path(folder), workers=0)
        images = images.select(np.setdiff1d(np.arange(len(source)), list(images.absent())))
        timed = turns(paths, images)
        times: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(options.repeats + 1):
            for name, (count, turn) in timed.items():
                start = time.process_time()
                turn()
                times[name].append((time.process_time() - start) / count)
    medians = {name: median(values[1:]) for name, values in times.items()}
    first = next(iter(medians.values()))
    print(f"{len(paths)} images of {SOURCE} px, {images.shape[0]} prepared images, median of {options.repeats} turns")
    for name, seconds in medians.items():
        print(f"{name:<60}{1 / seconds:>10,.0f} images/s{first / seconds:>8.1f} x")


if __name__ == "__main__":
    main()
