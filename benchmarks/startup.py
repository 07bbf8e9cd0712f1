"""What it takes until something happens: importing InMergeOptimizer beside torch and timm, and --help.

    python benchmarks/startup.py

Seconds of the processor, medians of several processes each, which take turns.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

RECIPES = Path(__file__).parents[1] / "recipes"
IMPORTS = {
    "import torch, timm": ["-c", "import torch, timm"],
    "inmerge --help": ["-m", "inmerge_optim", "--help"],
}
# Timed within a process: two imports of torch differ by more.
BESIDE = "InMergeOptimizer, beside these"
PROGRAM = """
import time, torch, timm
start = time.process_time()
from inmerge_optim import InMergeOptimizer
print(time.process_time() - start)
"""
HELP = sorted(path.stem for path in RECIPES.glob("[!_]*.py"))


def seconds_of(arguments: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def seconds_beside() -> float:
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    commands = IMPORTS | {f"recipes/{name}.py --help": [str(RECIPES / f"{name}.py"), "--help"] for name in HELP}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(options.repeats + 1):  # the first round fills the caches
        for name, arguments in commands.items():
            times[name].append(seconds_of(arguments))
        times.setdefault(BESIDE, []).append(seconds_beside())
    print("| | seconds |\n|---|---|")
    for name, found in times.items():
        print(f"| {name} | {median(found[1:]):.2f} |")


if __name__ == "__main__":
    main()
