"""Print the names of mutants, as many of each file, drawn by a fixed seed: for a look where all of them take too long.

    mutmut run; python benchmarks/mutant_sample.py 120 | xargs mutmut run

The mutants must have been made: the first command makes them before it runs any, and may be stopped then.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path


def sample(meta: Path, size: int) -> list[str]:
    """Return the names of some mutants of one file, which mutmut describes in ``meta``."""
    names = sorted(json.loads(meta.read_text())["exit_code_by_key"])
    random.Random(0).shuffle(names)
    return names[:size]


def main() -> None:
    """Print a name a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", type=int, help="how many of each file")
    for meta in sorted(Path("mutants").rglob("*.meta")):
        print(*sample(meta, parser.parse_args().size), sep="\n")


if __name__ == "__main__":
    main()
