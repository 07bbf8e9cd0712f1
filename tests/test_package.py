"""The package's public names: told of, all of them, and imported only when they are asked for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import inmerge_optim


def test_every_public_name_can_be_had_and_is_told_of():
    assert inmerge_optim.__all__ == sorted(inmerge_optim.__all__)
    assert inmerge_optim.__all__ == list(inmerge_optim._HOMES)
    assert {*inmerge_optim.__all__, "__version__"} <= set(dir(inmerge_optim))
    for name in inmerge_optim.__all__:
        assert getattr(inmerge_optim, name).__doc__
        assert re.search(rf"^    {name} ", inmerge_optim.__doc__, re.MULTILINE), f"help() does not show {name}"


def test_no_other_name_can_be_had():
    with pytest.raises(AttributeError, match="module 'inmerge_optim' has no attribute 'merge_all'"):
        inmerge_optim.merge_all  # noqa: B018


def test_the_names_are_listed_without_importing_torch():
    program = "import sys, inmerge_optim; print('InMergeOptimizer' in dir(inmerge_optim), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"


def test_one_version_is_told_everywhere():
    root = Path(__file__).parents[1]
    assert f'version = "{inmerge_optim.__version__}"' in (root / "pyproject.toml").read_text().splitlines()
    assert f"version: {inmerge_optim.__version__}" in (root / "CITATION.cff").read_text().splitlines()
