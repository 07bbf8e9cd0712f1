"""How long a grid takes on Ray, over the time in one process: two single-threaded seeds on two cores.

    python benchmarks/grid_makespan.py
    python benchmarks/grid_makespan.py --epochs 20      # longer stages

Both ways run the zoo of one model on digits, which needs no files, from its command line to its table: a backbone and
two arms for each seed. On Ray the seeds run beside each other. What is left above a half is the start of a process per
stage, and the beginning and the end of the trial, which nothing else can run beside.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "recipes" / "model_zoo.py"
ENGINES = {"one process": [], "Ray": ["--engine", "ray"]}


def grid_of(model: str, epochs: int) -> list[str]:
    grid = ["--models", model, "--datasets", "digits", "--no-pretrained", "--image-size", "32", "--seeds", "0", "1"]
    return [*grid, "--epochs", str(epochs), "--inmerge-epochs", str(epochs)]


def makespan(engine: str, grid: list[str]) -> float:
    """Seconds of the whole command, which are told with those of its stages."""
    # Ray gives its tasks a lower priority by default, which tells where the machine has other work.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(RECIPE), *grid, *ENGINES[engine], "--output", str(Path(folder) / "zoo")]
        start = time.perf_counter()
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        stages = [sum(json.loads(path.read_text())["training_seconds"]) for path in Path(folder).rglob("timing.json")]
    told = f"{len(stages)} stages of {min(stages):.0f} to {max(stages):.0f} s"
    print(f"{engine}: {seconds:.0f} s, {told}", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--epochs", type=int, default=15, help="of each stage")
    options = parser.parse_args()
    alone, on_ray = (makespan(engine, grid_of(options.model, options.epochs)) for engine in ENGINES)
    print(f"Ray over one process: {on_ray / alone:.3f}")


if __name__ == "__main__":
    main()
