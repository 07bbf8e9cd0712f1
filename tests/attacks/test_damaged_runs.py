"""Run folders that a disk has spoiled, or that come from a stranger: report.py, --resume and the zoo say so."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import report
from attacking import sentence, snapshot, time_limit
from finetune.errors import CheckpointWarning
from finetune.files import sha256_of, write_json
from finetune.reports import pages
from finetune.runs.sections import Section, write_sections
from small_runs import assert_same, run_recipe

RUN = ["--dataset", "digits", "--model", "test_resnet", "--no-pretrained", "--image-size", "16", "--hflip", "0.5"]
RUN += ["--epochs", "2", "--inmerge-epochs", "2", "--similarity-threshold", "-0.5", "--output", "run", "--resume"]
ARM = "seed_0/inmerge"


@pytest.fixture
def run(digits_run: Path, tmp_path: Path) -> Path:
    """A finished run, of which attacks may damage this copy."""
    return Path(shutil.copytree(digits_run, tmp_path / "run"))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without the trial's own sections, whose pictures take seconds."""
    monkeypatch.setattr(pages, "SECTIONS", ())


def edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def nest(path: Path) -> None:
    path.write_text("[" * 100_000)


def to_fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


DAMAGES = {
    "cut": cut,
    "binary": lambda path: path.write_bytes(b"\xff\xfe\x00\x89PNG"),
    "null": lambda path: path.write_text("null"),
    "object": lambda path: path.write_text("{}"),
    "nested": nest,
    "gone": Path.unlink,
    "fifo": to_fifo,
}
FILES = ["config.yaml", "versions.json", "data.json", "summary.json", f"{ARM}/result.json", f"{ARM}/metrics.csv"]
FILES += [f"{ARM}/merges.csv", f"{ARM}/predictions_test.csv", f"{ARM}/predictions_val.csv"]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_report_of_a_damaged_run(
    run: Path, file: str, damage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is made, or refused in one sentence, and then nothing outside the run folder has changed."""
    monkeypatch.chdir(run.parent)
    DAMAGES[damage](run / file)
    before = {name for name in snapshot(run.parent) if not name.startswith("run")}
    with time_limit():
        try:
            report.main(["run"])
        except SystemExit as exit_:
            assert exit_.code == 2  # noqa: PT017
            assert "run" in sentence(capsys.readouterr().err)
        else:
            assert file not in ("config.yaml", f"{ARM}/result.json", f"{ARM}/predictions_test.csv")
    assert {name for name in snapshot(run.parent) if not name.startswith("run")} == before


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (file, damage)
        for file in ("config.yaml", "versions.json", "summary.json", f"{ARM}/result.json")
        for damage in ("cut", "null", "nested", "gone", "fifo")
        if (file, damage) != ("summary.json", "gone")  # it is made anew
    ],
)
def test_resume_of_a_damaged_run(
    run: Path, file: str, damage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run is told of, or refused in one sentence; no arm is trained anew from what is damaged."""
    monkeypatch.chdir(run.parent)
    monkeypatch.setattr("finetune.training.stage.train_epoch", None)
    DAMAGES[damage](run / file)
    before = snapshot(run.parent)
    with time_limit():
        try:
            run_recipe(*RUN)
        except SystemExit as exit_:
            assert exit_.code == 2  # noqa: PT017
            sentence(capsys.readouterr().err)
        else:
            assert (file, damage == "fifo") == (f"{ARM}/result.json", False)
    after = snapshot(run.parent)
    assert {name for name in before if before[name] != after.get(name)} <= {"run/report.html"}


def test_an_edited_figure_is_noticed(
    run: Path, digits_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once an accuracy that somebody wrote into result.json stood in the summary."""
    monkeypatch.chdir(run.parent)
    edit(run / ARM / "result.json", lambda result: result["last"]["test"].update(accuracy=1.0))
    with pytest.raises(SystemExit, match="2"):
        report.main(["run"])
    assert "run/seed_0/inmerge is damaged (result.json has another checksum)" in capsys.readouterr().err
    (run / "summary.json").unlink()
    with pytest.warns(CheckpointWarning, match=r"result.json has another checksum\): running this stage again"):
        run_recipe(*RUN)
    assert_same(run, digits_run)


def seal(stage: Path) -> None:
    """What a stranger can do as well as we: make checksums of what was changed."""

    def seal_all(result: dict) -> None:
        result["files"] = {name: sha256_of(stage / name) for name in result["files"]}
        del result["checksum"]

    edit(stage / "result.json", seal_all)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[:-1],  # a case is missing
        lambda rows: [rows[0], *reversed(rows[1:])],  # others stand against each other
        lambda rows: [*rows, rows[-1]],
        lambda rows: [rows[0], "0" + rows[1], *rows[2:]],  # another name
        lambda rows: rows[:1],
        lambda rows: [],
        lambda rows: [rows[0], "\0", *rows[1:]],
        lambda rows: [row.replace("0.", "nan", 1) for row in rows],
    ],
)
@pytest.mark.parametrize("part", ["val", "test"])
def test_predictions_that_are_no_pair(
    attack: Callable[..., str], run: Path, change: Callable[[list[str]], list[str]], part: str
) -> None:
    """Arms are compared case by case, so that all must have the same cases in the same order."""
    path = run / ARM / f"predictions_{part}.csv"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    seal(run / ARM)
    assert "run" in attack("run", recipe=report.main, may_change="run")


@pytest.mark.parametrize("key", [b"lr: ", b"seeds:", b"margin_chosen: f", b"a"])
def test_settings_cut_where_they_still_are_yaml(attack: Callable[..., str], run: Path, key: bytes) -> None:
    content = (run / "config.yaml").read_bytes()
    (run / "config.yaml").write_bytes(content[: content.index(key) + len(key)])
    for arguments in (["run"], RUN):
        message = attack(*arguments, **({"recipe": report.main} if arguments == ["run"] else {}))
        assert "config.yaml is not as it was written (it was cut or edited)" in message


def test_result_vouches_for_its_own_folder_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def point_elsewhere(result: dict) -> None:
        result["files"]["../../config.yaml"] = sha256_of(run / "config.yaml")
        del result["checksum"]

    edit(run / ARM / "result.json", point_elsewhere)
    with pytest.raises(SystemExit, match="2"):
        report.main([str(run)])
    assert "(../../config.yaml has another checksum)" in capsys.readouterr().err


# Links out of the folder, pictures from elsewhere, and names that are more than names.


def link_plots(run: Path, outside: Path) -> None:
    shutil.rmtree(run / "plots", ignore_errors=True)
    (run / "plots").symlink_to(outside)


def link_picture(run: Path, outside: Path) -> None:
    (run / "plots").mkdir(exist_ok=True)
    (run / "plots" / "stolen.png").symlink_to(outside / "secret")


def link_to_itself(run: Path, _: Path) -> None:
    (run / "loop").symlink_to("loop")


def link_arm(run: Path, outside: Path) -> None:
    shutil.move(run / ARM, outside / "arm")
    (run / ARM).symlink_to(outside / "arm")


@pytest.mark.parametrize("put", [link_plots, link_picture, link_to_itself, link_arm])
def test_links_out_of_a_run_folder(
    attack: Callable[..., str], run: Path, tmp_path: Path, put: Callable[[Path, Path], None]
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("mine")
    put(run, tmp_path / "outside")
    assert re.search("is a link out of run: put there|is neither a file nor", attack("run", recipe=report.main))
    assert re.search("is a link out of run: put there|is neither a file nor", attack(*RUN))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("picture", ["../secret", "/etc/hostname", "plots/absent.png", "seed_0"])
def test_pictures_of_a_stranger(attack: Callable[..., str], run: Path, tmp_path: Path, picture: str) -> None:
    """Once any file on the disk could be embedded in report.html, to be sent on by whoever made it."""
    (tmp_path / "secret").write_text("mine")
    write_sections(run, [Section("Here", figures=[(picture, "a picture")])])
    assert f"names the picture {picture}, which is not in the run folder" in attack(
        "run", recipe=report.main, may_change="run"
    )


def test_partial_files_are_no_way_out(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("mine")
    (tmp_path / "x.json.partial").symlink_to(tmp_path / "other")
    write_json(tmp_path / "x.json", {"a": 1})
    assert (tmp_path / "other").read_text() == "mine"
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_names_are_shown_as_they_are(run: Path) -> None:
    """HTML, formulas of TeX, pictures from elsewhere and Python are all text."""
    name = '$\\frac{$ <script>alert(1)</script> ![](http://x/y) "); raise SystemExit(3) #'
    edit(run / "data.json", lambda data: data.update(name=name, classes=[name + str(k) for k in range(10)]))
    report.main([str(run)])
    page, text = (run / "report.html").read_text(), (run / "report.md").read_text()
    card = (run / ARM / "README.md").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    for markdown in (text, card.split("---\n", 2)[2]):
        assert not re.search(r"(?<!\\)<script", markdown)
        assert "![](" not in markdown
    code = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[0]
    compile(code, "card", "exec")


@pytest.mark.usefixtures("no_pictures")
def test_a_models_name_in_a_card_is_a_text(run: Path) -> None:
    config = (run / "config.yaml").read_text().partition("\n")[2]  # one without a checksum
    name = 'x"); raise SystemExit(3); ("'
    (run / "config.yaml").write_text(config.replace("model: test_resnet", f"model: {json.dumps(name)}"))
    report.main([str(run)])
    (code,) = re.findall(r"```python\n(.*?)```", (run / ARM / "README.md").read_text(), flags=re.DOTALL)
    assert name in [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]


# What stands where files are to be written.


@pytest.mark.usefixtures("no_pictures")
def test_side_by_side_is_not_written_over_others(attack: Callable[..., str], run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "other")
    (tmp_path / "README.md").write_text("# Mine\n")
    message = attack("run", "run", "--output", "README.html", recipe=report.main)
    assert "README.md is there, and not by inmerge_optim: move it away, or choose another --output" in message
    (tmp_path / "both.md").symlink_to("README.md")
    message = attack("run", "run", "--output", "both.html", recipe=report.main)
    assert "both.md is there, and not by inmerge_optim" in message
    for _ in range(2):  # over its own
        report.main([str(run), str(run), "--output", str(tmp_path / "side.html")])
    assert (tmp_path / "side.md").read_text().startswith("<!-- by inmerge_optim -->")
