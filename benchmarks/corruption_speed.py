"""How many images a second each corruption makes on one core, at the sizes that models see.

    python benchmarks/corruption_speed.py --sides 28 224

Each figure is the median over severities and both repeats, by the time that the core spent on it, so that other work on
the machine counts little. Severities may differ several times: a wide blur takes longer than a narrow one.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from finetune.data.corruptions import SUITES, corrupt, suite_for

REPEATS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[28, 64, 224])
    parser.add_argument("--count", type=int, default=32, help="images per call")
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = [(side, channels) for side in options.sides for channels in (1, 3)]
    print(f"{'images/s on one core':22}", *(f"{f'{side} px x {channels}':>12}" for side, channels in columns))
    found = [speeds(side, channels, options.count) for side, channels in columns]
    for name in dict.fromkeys(name for column in found for name in column):
        cells = [f"{column[name]:12,.0f}" if name in column else f"{'-':>12}" for column in found]
        print(f"{name:22}", *cells)


def speeds(side: int, channels: int, count: int) -> dict[str, float]:
    images = np.random.default_rng(0).integers(0, 256, (count, channels, side, side), dtype=np.uint8)
    cases = list(map(str, range(count)))
    suites = [suite_for(name, channels).severities for name in SUITES]
    seconds: dict[str, list[float]] = {}
    for name, parameters in {name: values for suite in suites for name, values in suite.items()}.items():
        for parameter in parameters * REPEATS:
            start = time.process_time()
            corrupt(images, cases, name, parameter)
            seconds.setdefault(name, []).append(time.process_time() - start)
    return {name: count / statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
