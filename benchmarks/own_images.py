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
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from finetune.data.images import Split
from finetune.data.prepared import PreparedImages, prepare
from finetune.data.squares import Form
from finetune.sources.folders import read_class_folders
from finetune.training.batches import train_loader

SIDE, FORM, BATCH, KILLS = 48, Form(36, "pad"), 128, 10
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


def epoch(images: Any, count: int) -> None:
    """All batches of an epoch, as training takes them from a set of images in memory or prepared."""
    split = Split(images, np.zeros(count, dtype=np.int64), [str(k) for k in range(count)])
    loader = train_loader(split, batch_size=BATCH, grad_accum_steps=1, seed=0, stage="arm")
    for batch in loader:
        batch["images"].float().mean()


def epochs_compared(images: PreparedImages, repeats: int = 5) -> tuple[float, float]:
    """Median seconds of the processor for an epoch of prepared images, and of the same images as an array."""
    count = images.shape[0]
    array = images[list(range(count))]
    times: dict[str, list[float]] = {"prepared": [], "array": []}
    for _ in range(repeats):
        for name, held in (("prepared", images), ("array", array)):
            began = time.process_time()
            epoch(held, count)
            times[name].append(time.process_time() - began)
    return median(times["prepared"]), median(times["array"])


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
        growth = (measures["one process"]["peak"] - measures["half"]["peak"]) * 2**20
        print(f"The peak grows by {growth / (len(source) - len(few) or 1):,.0f} bytes per file more")
        whole = kill_ten_times(source, folder / "killed", measures["two processes"]["clock"])
        prepare(source, FORM, folder / "killed", 2)
        same = checksums(folder / "killed") == checksums(folder / "one process") == checksums(folder / "two processes")
        print(
            f"Killed after {', '.join(map(str, whole))} whole files: {'the same' if same else 'OTHER'} bytes at the end"
        )
        prepared, array = epochs_compared(prepare(source, FORM, folder / "one process", 0))
        print(f"An epoch's batches take {prepared / array:.2f} of the time that they take from an array in memory")


if __name__ == "__main__":
    main()
