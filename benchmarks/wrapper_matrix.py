"""The same interactions with this wrapper and with its peers: which hold, which break and how.

    pip install -e ".[recipes,bench]"
    python benchmarks/wrapper_matrix.py

Each cell trains a small network for a few real steps, once in a plain loop and once in the way of its row, and
compares the weights to the bit; the rows are in interactions/. It prints a Markdown table; the exit code is 1 if a
row of this wrapper breaks.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import sys
import warnings
from collections.abc import Callable

import torch
from accelerate.state import PartialState
from interactions import ROWS
from interactions.peers import OURS, PEERS, Broken, NotApplicable, Peer


def cell(interaction: Callable[[Peer], str | None], peer: Peer) -> str:
    """Run one interaction with one wrapper, and say how it ended."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            note = interaction(peer)
    except NotApplicable as reason:
        return f"not applicable: {reason}"
    except Broken as symptom:
        return f"breaks: {symptom}"
    except Exception as error:  # whatever a wrapper raises is the symptom
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        return f"breaks: {type(error).__name__}: {lines[0][:100]}"
    return f"passes ({note})" if note else "passes"


def main() -> int:
    """Print the table and the versions."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    PartialState(cpu=True)
    packages = (
        "torch", "timm", "accelerate", "pytorch_optimizer", "schedulefree", "transformers", "lightning", "monai",
        "fastai", "peft",
    )  # fmt: skip
    print("Measured with " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages) + ".\n")
    print("| interaction | " + " | ".join(peer.name for peer in PEERS) + " |")
    print("|---" * (len(PEERS) + 1) + "|")
    ours_break = False
    for title, interaction in ROWS.items():
        cells = [cell(interaction, peer) for peer in PEERS]
        ours_break |= cells[PEERS.index(OURS)].startswith("breaks")
        print(f"| {title} | " + " | ".join(text.replace("|", "\\|") for text in cells) + " |", flush=True)
    return int(ours_break)


if __name__ == "__main__":
    sys.exit(main())
