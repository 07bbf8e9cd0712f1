"""The package's public names: told of, all of them, and imported only when they are asked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import inmerge_optim

ROOT = Path(__file__).parents[1]


def test_every_public_name_can_be_had_and_is_told_of():
    assert inmerge_optim.__all__ == sorted(inmerge_optim.__all__)
    assert inmerge_optim.__all__ == list(inmerge_optim._HOMES)
    assert {name for name in dir(inmerge_optim) if not name.startswith("_")} == set(inmerge_optim.__all__)
    assert "__version__" in dir(inmerge_optim)
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
    assert f'version = "{inmerge_optim.__version__}"' in (ROOT / "pyproject.toml").read_text().splitlines()
    assert f"version: {inmerge_optim.__version__}" in (ROOT / "CITATION.cff").read_text().splitlines()


def test_the_wheel_has_the_recipes_and_runs_them_from_anywhere(tmp_path):
    pytest.importorskip("tyro", reason="the recipes' libraries are not installed")
    build = [
        "from hatchling.builders.wheel import WheelBuilder",
        f"next(WheelBuilder({str(ROOT)!r}).build(directory={str(tmp_path)!r}))",
    ]
    subprocess.run([sys.executable, "-c", "; ".join(build)], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}

    def recipes(*arguments):
        command = [sys.executable, "-m", "inmerge_recipes", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert recipes("--help").returncode == 0
    assert "demo.yaml" in recipes().stdout
    assert recipes("no_such_recipe").returncode == 2
    told = recipes("medmnist2d", "--config", "demo.yaml", "--lr", "-1")
    assert (told.returncode, told.stderr.count("\n")) == (2, 1), told.stderr
    assert "--lr must be at least 0, not -1" in told.stderr
    program = "import sys, runpy; sys.modules['tyro'] = None; runpy.run_module('inmerge_recipes', run_name='__main__')"
    command = [sys.executable, "-c", program, "medmnist2d"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "inmerge-recipes lacks a library" in done.stderr
    assert done.stderr.endswith("pip install 'inmerge_optim[recipes]'\n")
    assert "finetune/reports/templates/report.html.j2" in {
        name.removeprefix("inmerge_recipes/") for name in zipfile.ZipFile(wheel).namelist()
    }


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_of_a_page_outside_the_site_lead_somewhere(page):
    """Those of docs/ are checked where the site is built."""
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    for path, _, anchor in (link.partition("#") for link in links if not link.startswith("https://")):
        assert (ROOT / path).exists(), f"{page} links to {path}, which is not there"
        headings = re.findall(r"^#+ (.*)$", (ROOT / (path or page)).read_text(encoding="utf-8"), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings}
