"""Peak memory of preparing a synthetic ChestX-ray14 of full length, against a tenth of it.

    python benchmarks/prepare_memory.py
    python benchmarks/prepare_memory.py --side 256      # the real size on disk: 7.3 GB

The tree has NIH's form and the header of its label file; its images are hard links to a few small PNGs.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from small_trees import write_labels, write_lists

RECIPE = Path(__file__).parents[1] / "recipes" / "chestxray.py"
IMAGES, TEST_IMAGES, PER_PATIENT, PER_FOLDER = 112_120, 25_596, 4, 10_000


def make_tree(folder: Path, images: int) -> None:
    cases = [f"{1 + k // PER_PATIENT:08d}_{k % PER_PATIENT:03d}.png" for k in range(images)]
    pngs = [folder / f"{k}.png" for k in range(8)]
    rng = np.random.default_rng(0)
    for path in pngs:
        Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(path)
    for k, case in enumerate(cases):
        # A file system allows some tens of thousands of links to one file.
        place = folder / f"images_{1 + k // PER_FOLDER:03d}" / "images"
        place.mkdir(parents=True, exist_ok=True)
        os.link(pngs[k % len(pngs)], place / case)
    write_labels(folder, cases)
    train_val = (images - images * TEST_IMAGES // IMAGES) // PER_PATIENT * PER_PATIENT
    write_lists(folder, cases[:train_val], cases[train_val:])


def prepare(tree: Path, prepared: Path, side: int, workers: int) -> None:
    """Run the recipe with --prepare-only."""
    command = [sys.executable, str(RECIPE), "--data-dir", str(tree), "--prepare-only"]
    command += ["--prepared-dir", str(prepared), "--image-size", str(side), "--prepare-size", str(side)]
    subprocess.run(
        [*command, "--prepare-workers", str(workers)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=64, help="side of the prepared images in pixels")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode")
    options = parser.parse_args()
    peaks = []
    # The shorter first: what is read is the largest peak of all processes so far.
    for images in (IMAGES // 10, IMAGES):
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder) / "tree"
            tree.mkdir()
            make_tree(tree, images)
            start = time.perf_counter()
            prepare(tree, Path(folder) / "prepared", options.side, options.workers)
            written = sum(path.stat().st_size for path in (Path(folder) / "prepared").rglob("*.arrow"))
        peaks.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
        seconds = time.perf_counter() - start
        print(f"{images:>8,} images: peak {peaks[-1]:,.0f} MB, {written / 1e6:,.0f} MB written, {seconds:.0f} s")
    growth = (peaks[1] - peaks[0]) * 2**20 / (IMAGES - IMAGES // 10)
    print(f"The peak grows by {growth:,.0f} bytes per image (names and labels), not by its {options.side**2:,} pixels")


if __name__ == "__main__":
    main()
