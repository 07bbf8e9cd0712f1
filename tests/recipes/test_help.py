"""The recipes answer --help before they load what trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("[!_]*.py")))
def test_help_is_given_without_torch(recipe: str) -> None:
    program = (
        "import runpy, sys\n"
        "path = sys.argv.pop(1)\n"
        "try:\n"
        "    runpy.run_path(path, run_name='__main__')\n"
        "finally:\n"
        "    print(sorted({'torch', 'timm', 'datasets', 'pandas', 'sklearn'} & sys.modules.keys()), file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(RECIPES)!r})\n{program}"]
    done = subprocess.run([*command, str(RECIPES / f"{recipe}.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert done.stderr.strip() == "[]"
