"""Reports of inmerge inspect: tables, JSON and CSV of any names, and files that are whole, regular and the user's."""

from __future__ import annotations

import csv
import io
import json
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from inmerge_optim import similarity_profile
from inmerge_optim.inspection import (
    Inspection,
    is_standard_output,
    obstacle,
    printable,
    to_csv,
    to_json,
    to_table,
    write,
)

SETTINGS = {"skip_layers": 0, "similarity_threshold": 0.3}


def inspection(names=("first", "second"), title="a model", **settings):
    """An inspection of two convolutions of these names."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module(names[0], nn.Conv2d(3, 8, 3))
    model.add_module(names[1], nn.Conv2d(8, 8, 3, groups=8))
    model.add_module("end", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)))
    return Inspection(title, similarity_profile(model, 0), SETTINGS, **settings)


def test_the_three_reports_tell_the_same():
    found = inspection()
    first, second = found.profiles
    content = json.loads(to_json(found))
    rows = list(csv.DictReader(io.StringIO(to_csv(found).decode())))
    table = to_table(found).splitlines()
    assert [layer["name"] for layer in content["layers"]] == [row["name"] for row in rows] == ["first", "second"]
    assert content["layers"][0]["mean"] == float(rows[0]["mean"]) == first.mean
    assert content["layers"][1]["mean"] is second.mean is None
    assert rows[1]["mean"] == ""
    assert content["expected_draws"] == found.expected_draws == first.expected_draws == pytest.approx(0.3 * 8)
    assert f"{first.mean:.2f}" in table[3].split()
    assert table[4].split()[-4:] == ["one", "kernel", "per", "group"]
    assert "2 layers, 2 counted, 1 selected." in table


def test_the_columns_of_a_table_stand_below_each_other():
    table = to_table(inspection(names=("f", "a_rather_long_name"))).splitlines()
    assert table[2].index("layer") == table[3].index("f ") == table[4].index("a_rather_long_name")
    assert table[2].index("remark") == table[4].index("one kernel per group")


def test_no_layers_make_an_empty_csv_and_a_table_of_none():
    found = Inspection("nothing", [], SETTINGS, rate=0.1)
    assert to_csv(found) == b""
    assert "0 layers, 0 counted, 0 selected." in to_table(found)
    assert "No layer is selected, so no threshold merges anything." in to_table(found)


STEERING = "\x1b[2J\x9b31m\r\b\u202e\u2028\x00\x7f"


def test_no_name_steers_the_terminal():
    found = inspection(names=(f"first{STEERING}", "second"), title=f"model{STEERING}")
    for text in (to_table(found), to_csv(found).decode()):
        assert all(char.isprintable() or char == "\n" for char in text)
        assert r"first\x1b[2J\x9b31m" in text
    assert json.loads(to_json(found))["layers"][0]["name"] == f"first{STEERING}"
    assert to_json(found).isascii()


def test_what_can_be_printed_stays_as_it_is():
    assert printable("größe 3×3, 核 … ½") == "größe 3×3, 核 … ½"
    assert printable(os.fsdecode(b"weights\xff.pth")) == r"weights\udcff.pth"


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)"])
def test_no_name_is_a_formula_in_a_spreadsheet(name):
    rows = list(csv.DictReader(io.StringIO(to_csv(inspection(names=(name, "second"))).decode())))
    assert rows[0]["name"] == f"'{name}"
    assert float(rows[0]["mean"]) == inspection().profiles[0].mean  # numbers may be negative


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Path.mkdir, "is a folder"),
        (os.mkfifo, "is a device, a pipe or a socket"),
        (make_socket, "is a device, a pipe or a socket"),
        (lambda path: path.symlink_to("target"), "is a symbolic link"),
        (lambda path: path.symlink_to("no_target"), "is a symbolic link"),
        (lambda path: path.symlink_to(path), "is a symbolic link"),
    ],
    ids=["folder", "pipe", "socket", "link", "dangling link", "loop"],
)
def test_only_regular_files_are_written_over(make, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("target").write_text("kept")
    make(tmp_path / "out")
    assert obstacle(Path("out")) == reason


def test_devices_and_other_places_are_refused(tmp_path):
    assert obstacle(Path("/dev/null")) == "is a device, a pipe or a socket"
    assert obstacle(tmp_path / "absent" / "out") == "lies in no folder that exists"
    assert obstacle(tmp_path / ("n" * 300)) == "is no possible place (File name too long)"
    (tmp_path / "file").touch()
    assert obstacle(tmp_path / "file" / "out") == "lies in no folder that exists"
    for free in (tmp_path / "file", tmp_path / "new", Path("-"), Path("/dev/stdout")):
        assert obstacle(free) == ""


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # as root, everything can
    assert obstacle(tmp_path / "out") == "lies in a folder that can't be written to"


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old and long")
    write(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("link", ["to a file", "to nowhere"])
def test_a_link_in_the_place_of_the_partial_file_is_not_followed(link, tmp_path):
    target = tmp_path / "target"
    if link == "to a file":
        target.write_bytes(b"kept")
    (tmp_path / "out.partial").symlink_to(target)
    write(tmp_path / "out", b"new")
    assert (tmp_path / "out").read_bytes() == b"new"
    assert not (tmp_path / "out").is_symlink()
    assert target.exists() == (link == "to a file")
    assert not target.exists() or target.read_bytes() == b"kept"


def test_a_link_that_appears_meanwhile_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: None)  # as if it came right after
    (tmp_path / "target").write_bytes(b"kept")
    (tmp_path / "out.partial").symlink_to("target")
    with pytest.raises(FileExistsError):
        write(tmp_path / "out", b"new")
    assert (tmp_path / "target").read_bytes() == b"kept"


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    path = tmp_path / "out"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_the_standard_output_is_written_through(name, capsysbinary):
    assert is_standard_output(Path(name))
    print("before", end=" ")
    write(Path(name), b"\x89 bytes")
    print(" after", end="")
    assert capsysbinary.readouterr().out == b"before \x89 bytes after"
    assert sys.stdout.writable()
    assert not is_standard_output(Path("./stdout"))
