"""Every command in README and docs has options that its parser knows; make docs-check also runs those that can be."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("tyro", reason="the recipes' libraries are not installed")
from commands import ROOT, commands, parse


def test_every_documented_command_can_be_parsed(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    told = commands()
    assert len(told) > 110
    assert ("tutorials.md", "python examples/plain_torch.py") in told  # of a block of code, behind others
    wrong = {}
    for page, command in told:
        try:
            parse(command)
        except (Exception, SystemExit) as error:
            wrong[f"{page}: {command}"] = (error, capsys.readouterr().err)
    assert not wrong


@pytest.mark.parametrize(
    "command",
    [
        "python recipes/medmnist2d.py --dataset digits --merge-prop 0.3",
        "accelerate launch --num_process recipes/chestxray.py",
        "accelerate launch recipes/imagefolder.py --lr -1",
        "inmerge inspect resnet18 --pretrain",
        "make everything",
        'pip install "inmerge_optim[all]"',
        "python benchmarks/no_such.py",
    ],
)
def test_a_mistake_in_a_command_is_noticed(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises((Exception, SystemExit)):
        parse(command)


def test_the_page_of_options_has_every_option_of_every_recipe(tmp_path):
    from option_pages import option_classes, write_option_pages

    assert set(option_classes()) == {path.stem for path in (ROOT / "recipes").glob("[a-z]*.py")}
    write_option_pages(tmp_path / "options.md")
    page = (tmp_path / "options.md").read_text(encoding="utf-8")
    tables = {
        part.split("\n", 1)[0]: set(re.findall(r"^\| `(?:--)?([\w-]+)`", part, re.M)) for part in page.split("\n## ")
    }
    of_all = tables["Every trial"] | tables["recipes/medmnist2d.py"]
    frozen = (ROOT / "tests" / "interface.txt").read_text(encoding="utf-8")
    options = re.findall(r"^(recipes/\S+|every trial) --([\w-]+)", frozen, re.M)
    assert len(options) > 100
    assert not [
        (owner, name) for owner, name in options if not {name, name.upper()} & (tables.get(owner, set()) | of_all)
    ]
