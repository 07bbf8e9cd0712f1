"""Config files and command lines that are out of bounds end at once, in one sentence, before anything is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from finetune.errors import InputError
from finetune.options import parse_options
from finetune.sources.imagefolder import OwnImagesOptions
from finetune.sources.source import DatasetOptions

BOMB = "a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs: 2026-13-45\n", "month must be in 1..12"),
        ("epochs: !!int abc\n", "invalid literal for int()"),
        ("epochs: !!float abc\n", "could not convert string to float"),
        (f"lr: {'1' * 5000}\n", "Exceeds the limit"),
        (f"lr: 0x{'f' * 20000}\n", "gives lr a value that can't be used (Exceeds the limit"),
        ("epochs: " + "[" * 3000 + "]" * 3000, "line 1 has an alias, or nests too deep"),
        ("epochs: " + "{a: " * 3000 + "}" * 3000, "line 1 has an alias, or nests too deep"),
        (BOMB, "line 2 has an alias, or nests too deep"),
        ("a: &a [*a]\n", "line 1 has an alias"),
        ("x" * 100_000, "it has 100,000 bytes, more than 65,536"),
        ("lr: 1\n" * 10_000 + "#" * 10_000, "it has 70,000 bytes"),
        ("lr: !!python/object/apply:os.system ['touch canary']\n", "could not determine a constructor"),
        ("lr: !!python/name:os.system\n", "could not determine a constructor"),
        ("? [a, b]\n: 1\n", "while constructing a mapping"),
        ("lr: {a: 1}\n", "gives lr a value that can't be used (expected one value, or a list of them)"),
        ("seeds: [[1]]\n", "gives seeds a value that can't be used (expected one value, or a list of them)"),
        ("model: --help\n", "gives model a value that can't be used (it begins with --"),
        ("seeds: [1, --output=canary]\n", "gives seeds a value that can't be used (it begins with --"),
        ('output: !!str "a\\0b"\n', "can't be used (it has a NUL)"),
        ("lr: 0.1\nseeds: [1]\nlr: 0.2\n", "'lr' stands there twice"),
        ("batch-size: 8\nbatch_size: 16\n", "sets batch_size twice"),
        ("lr: .nan\n", "--lr must be at least 0, not nan"),
        ("lr: .inf\n", "--lr must be a finite number, not inf"),
        ("lr: 1e400\n", "--lr must be a finite number, not inf"),
        (f"epochs: {10**30}\n", "--epochs must be at most 100000"),
        ("lr: 0.1\n---\nlr: 0.2\n", "expected a single document"),
        ("\uff4cr: 0.1\n", "sets the unknown option 'ｌr'"),
        ("model: test_re\u200bsnet\n", "--model test_re\\u200bsnet"),
        ("model: !!binary aGk=\n", "gives model a value that can't be used"),
        ("seeds: !!set {1, 2}\n", "gives seeds a value that can't be used"),
        ("a: b: c\n", "mapping values are not allowed here"),
        ("\x00", "special characters are not allowed"),
        ("- 1\n- 2\n", "must hold `option: value` lines, not a list"),
        ("3\n", "must hold `option: value` lines, not a int"),
        ("? \n", "sets the unknown option None"),
    ],
    ids=lambda value: value[:25] if isinstance(value, str) else "",
)
def test_yaml_that_is_no_config(attack: Callable[..., str], tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert expected in attack("--dataset", "digits", "--config", "c.yaml")


@pytest.mark.parametrize("put", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_config_that_is_no_file(attack: Callable[..., str], tmp_path: Path, put: Callable[[Path], None]) -> None:
    put(tmp_path / "c.yaml")
    assert "--config c.yaml can't be read as YAML (it is no file" in attack("--dataset", "digits", "--config", "c.yaml")


def test_no_alias_of_any_file_is_ever_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser's events tell of it first; constructing the bomb would take all memory."""
    monkeypatch.setattr(yaml, "load", None)
    (tmp_path / "c.yaml").write_text(BOMB)
    with pytest.raises(InputError, match="alias"):
        parse_options(DatasetOptions, ["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--image-size", "40000"], "--image-size must be at most 4096, not 40000"),
        (["--split-seed", str(2**32)], "--split-seed must be at most 4294967295"),
        (["--seeds", "0", str(2**32)], "--seeds must be at most 4294967295"),
        (["--workers", "100000"], "--workers must be at most 512"),
        (["--lr", "inf"], "--lr must be a finite number, not inf"),
        (["--weight-decay", "nan"], "--weight-decay must be at least 0, not nan"),
        (["--merge-prob", "nan"], "--merge-prob must be a finite number"),
        (["--output", "a\0b"], "--output 'a\\x00b' can't be used (it has a NUL)"),
        (["--output", "~nobody-of-that-name/x"], "--output '~nobody-of-that-name/x' can't be used"),
        (["--output", os.fsdecode(b"a\xff")], "can't be used ('utf-8' codec can't encode"),
        (["--tracker", "\x1b[2J\x1b]0;owned\x07"], "--tracker \\x1b[2J\\x1b]0;owned\\x07 is unknown"),
        (["--model", "a\nb"], "--model a\\nb"),
        (["--output", "x" * 300], "can't be written (File name too long)"),
        (["--output", "/proc/inmerge/run"], "/proc/inmerge/run can't be written"),
        (["--output", "/dev/null/run"], "/dev/null/run can't be written"),
        (["--output", "/dev/null"], "/dev/null can't be written"),
    ],
    ids=lambda value: ascii(" ".join(value))[:40] if isinstance(value, list) else "",
)
def test_options_beyond_reason(attack: Callable[..., str], arguments: list[str], expected: str) -> None:
    assert expected in attack("--dataset", "digits", "--model", "test_resnet", "--no-pretrained", *arguments)


def test_home_is_expanded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pandas alone knew ~: a run trained to its end, and found no file of its own to report on."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("dataset: digits\ndata_dir: ~/data\n")
    (tmp_path / "own.yaml").write_text("hub: ~/images\n")
    found = parse_options(DatasetOptions, ["--config=~/c.yaml", "--output", "~/run", "--checkpoint", "~/a~b.pth"])
    assert [found.config, found.data_dir, found.output, found.checkpoint] == [
        tmp_path / name for name in ("c.yaml", "data", "run", "a~b.pth")
    ]
    assert parse_options(OwnImagesOptions, ["--config", str(tmp_path / "own.yaml")]).hub == str(tmp_path / "images")
    assert parse_options(OwnImagesOptions, ["--hub", "owner/name"]).hub == "owner/name"


def test_a_sentence_is_no_flood(attack: Callable[..., str]) -> None:
    message = attack("--dataset", "digits", "--model", "x" * 100_000)
    assert len(message) < 2100
    assert message.endswith(" [...]")


def test_options_that_the_run_folder_could_not_hold(attack: Callable[..., str]) -> None:
    """They were trained with, and config.yaml could not be read any more."""
    seeds = map(str, range(12_000))
    message = attack("--dataset", "digits", "--model", "test_resnet", "--no-pretrained", "--seeds", *seeds)
    assert "bytes, more than 65,536: give fewer or shorter" in message
