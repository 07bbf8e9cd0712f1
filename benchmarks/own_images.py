"""One's own images, as 100,000 small files: preparing them against plain PIL, its memory, ten kills, and an epoch.

    python benchmarks/own_images.py
    python benchmarks/own_images.py --images 10000

Speeds are per second of processor time, on which other work on the machine counts little; of two processes the time by
the clock stands beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from finetune.data.images import Split
from finetune.data.prepared import PreparedImages, prepare
from finetune.data.squares import Form
from finetune.sources.folders import read_class_folders
from finetune.training.batches import train_loader

SIDE, SIZE, FORM, BATCH, KILLS, REPEATS = 48, 32, Form(36, "pad"), 128, 10, 5
FORKED = multiprocessing.get_context("fork")


def make_folders(folder: Path, images: int) -> None:
    """Noise in two classes, a thousand files to a folder."""
    rng = np.random.default_rng(0)
    for k in range(images):
        place = folder / ("cat", "dog")[k % 2] / f"{k // 2000:03d}"
        if k % 2000 < 2:
            place.mkdir(parents=True)
        noise = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8))
        noise.save(place / f"{k:06d}.png", compress_level=1)


def processor_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(found.ru_utime + found.ru_stime for found in used)


def own_memory() -> float:
    """Of this process, in MB, without pages of the files that it maps, which the system takes back at will."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def measured(turn: Callable[[], object]) -> dict[str, float]:
    """Run it in a process of its own: seconds by the clock and of the processor, and the peak of its memory in MB."""
    queue = FORKED.SimpleQueue()

    def run() -> None:
        began, used = time.perf_counter(), processor_seconds()
        turn()
        peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        queue.put(
            {
                "clock": time.perf_counter() - began,
                "processor": processor_seconds() - used,
                "peak": peaks[0] / 1024,
                "worker": peaks[1] / 1024,
                "own": own_memory(),
            }
        )

    process = FORKED.Process(target=run)
    process.start()
    found = queue.get()
    process.join()
    return found


def with_pil(paths: list[str]) -> None:
    """Decode and resize, and nothing else."""
    for path in paths:
        with Image.open(path) as image:
            image.convert("L").resize((FORM.side, FORM.side), Image.Resampling.BILINEAR).tobytes()


def checksums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.arrow*"))}


def kill_ten_times(source: Any, folder: Path, seconds: float) -> list[int]:
    """Prepare, and kill that by SIGKILL at random moments of the time that is left; the files whole after each."""
    chance, whole = random.Random(0), []
    total = -(-len(source) // 512)
    for _ in range(KILLS):
        process = FORKED.Process(target=prepare, args=(source, FORM, folder, 2))
        process.start()
        left = seconds * (1 - (whole[-1] if whole else 0) / total)
        time.sleep(chance.uniform(0, left / 3))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        whole.append(len(list(folder.glob("*.arrow"))))
    return whole


def epoch_seconds(images: Any, count: int) -> float:
    """Of the processor, for all batches of an epoch as training takes them."""
    split = Split(images, np.zeros(count, dtype=np.int64), [str(k) for k in range(count)])
    loader = train_loader(split, batch_size=BATCH, grad_accum_steps=1, seed=0, stage="arm")
    began = time.process_time()
    for batch in loader:
        batch["images"].float().mean()
    return time.process_time() - began


def step_seconds(channels: int) -> float:
    """Of the processor, for a training step of a ResNet18 on one batch."""
    model = timm.create_model("resnet18", num_classes=2)
    images = torch.rand(BATCH, channels, SIZE, SIZE).expand(-1, 3, -1, -1)
    began = time.process_time()
    model(images).square().mean().backward()
    return time.process_time() - began


def compare_epochs(images: PreparedImages) -> None:
    """Prepared images against the same as an array, as the built-in sets have them: the batches alone, and training."""
    count = images.shape[0]
    array = images[list(range(count))]
    turns = {"prepared": images, "array": array}
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _, (name, held) in product(range(REPEATS), turns.items()):
        times[name].append(epoch_seconds(held, count))
    step = median(step_seconds(images.shape[1]) for _ in range(REPEATS)) / BATCH
    prepared, held = (median(found) / count for found in times.values())
    ratio = (step + prepared) / (step + held)
    print(
        f"Batches of an epoch: {1e6 * prepared:.1f} microseconds an image prepared, {1e6 * held:.1f} as an array; with "
        f"{1e6 * step:,.0f} for a ResNet18's step at {SIZE} px an epoch takes {ratio:.3f} of that over an array"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_folders(folder / "images", options.images)
        source = read_class_folders(folder / "images").images
        few = read_class_folders(folder / "images" / "cat").images if options.images > 2000 else source
        paths = source.paths[:: max(1, options.images // 10_000)]
        pil = len(paths) / measured(lambda: with_pil(paths))["processor"]
        print(f"PIL, decode and resize: {pil:,.0f} files per second of the processor")
        measures = {}
        for name, found, workers in (("half", few, 0), ("one process", source, 0), ("two processes", source, 2)):
            measures[name] = measured(lambda s=found, n=name, w=workers: prepare(s, FORM, folder / n, w))
            of = measures[name]
            print(
                f"prepared, {name}, {len(found):,} files: {len(found) / of['processor']:,.0f} per second of the "
                f"processor ({len(found) / of['processor'] / pil:.2f} of PIL), {len(found) / of['clock']:,.0f} by the "
                f"clock; peak {of['peak']:,.0f} MB, of a worker {of['worker']:,.0f} MB"
            )
        more = max(1, len(source) - len(few)) / 2**20
        peak, own = ((measures["one process"][kind] - measures["half"][kind]) / more for kind in ("peak", "own"))
        print(
            f"Per file more, of {FORM.side**2:,} pixels, the peak grows by {peak:,.0f} bytes, with pages of the files "
            f"that are mapped, and the process's own memory by {own:,.0f}"
        )
        whole = kill_ten_times(source, folder / "killed", measures["two processes"]["clock"])
        prepare(source, FORM, folder / "killed", 2)
        same = checksums(folder / "killed") == checksums(folder / "one process") == checksums(folder / "two processes")
        print(
            f"Killed after {', '.join(map(str, whole))} whole files: {'the same' if same else 'OTHER'} bytes at the end"
        )
        compare_epochs(prepare(source, FORM, folder / "one process", 0))


if __name__ == "__main__":
    main()
