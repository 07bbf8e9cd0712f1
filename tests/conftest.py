"""What the tests share: one thread, and where the real data are."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

SHARED = Path(os.environ.get("INMERGE_TEST_DATA", Path(__file__).parents[2] / "shared"))


# Files that take minutes, begun first, so that no process waits for one at the end.
LONG = (
    "test_resume",
    "test_imagefolder",
    "test_robustness",
    "test_distributed",
    "test_divergence",
    "test_sigkill",
    "test_processes",
    "test_report",
    "test_sensitivity",
    "test_damaged_runs",
    "test_model_zoo",
    "test_arms",
    "test_medmnist2d",
    "test_summary",
    "test_chestxray",
    "test_signals",
)


def pytest_collection_modifyitems(items):
    """Docstrings show figures, which must be the same on any processor; and long files come first."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker("portable")
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


def pytest_collection_finish():
    """Spare the libraries' half a million objects from each collection, of which accelerate asks for two a stage."""
    gc.freeze()


def pytest_sessionfinish():
    """Keep what coverage has measured in a process of xdist, which is killed where it takes ten seconds to end."""
    measured = sys.modules["coverage"].Coverage.current() if "coverage" in sys.modules else None
    if measured is not None:
        measured.save()


@pytest.fixture(autouse=True)
def one_thread():
    """Equality to the bit is promised for one number of threads; tests run on one, unless another is tried."""
    torch.set_num_threads(int(os.environ.get("INMERGE_TEST_THREADS", "1")))


@pytest.fixture
def shared_file():
    """Return a real file by its path in the data folder, or skip the test, saying what is missing."""

    def find(relative: str) -> Path:
        path = SHARED / relative
        if not path.exists():
            pytest.skip(f"{relative} is not in the data folder (set INMERGE_TEST_DATA to the folder that holds it)")
        return path

    return find


def pytest_terminal_summary(terminalreporter):
    """Print where runs were killed, which belongs into the log of the tests."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "kills" and report.when == "call":
                terminalreporter.write_line(f"{report.nodeid}: {value}")
