"""Tables of images: which columns say what, how labels are read, and where images are looked for."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest
from finetune.errors import InputError
from finetune.sources.columns import Columns
from finetune.sources.listing import Listing
from finetune.sources.tables import read_table
from small_folders import write_images, write_table

CASES = ["a.png", "b.png", "c.png", "d.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", CASES)
    return tmp_path / "images"


def read(path: Path, folder: Path, allow_outside: bool = False, **columns: object) -> Listing:
    return read_table(path, folder, Columns(**columns), allow_outside)


def table(folder: Path, header: list[str], *columns: list[object], name: str = "t.csv", **options: str) -> Path:
    return write_table(folder.parent / name, header, zip(*columns, strict=True), **options)


def test_columns_of_usual_names_are_taken_and_told(folder: Path) -> None:
    path = table(
        folder,
        ["Image Index", "Diagnosis", "Patient ID", "Split", "Patient Sex", "Age", "weight"],
        *(CASES, list("xyxy"), [1, 1, 2, 3], ["train", "Training", "VAL", "test"], list("FMFM"), [5, 70, "", "041Y"]),
        [1, 2, 3, 4],
    )
    listing = read(path, folder)
    assert listing.cases == CASES
    assert listing.labels == [("x",), ("y",), ("x",), ("y",)]
    assert listing.patients == ["1", "1", "2", "3"]
    assert listing.parts == ["train", "train", "val", "test"]
    assert listing.subgroups == {"sex": list("FMFM"), "age": ["0-17", "65-100", None, "40-64"]}
    assert listing.notices[0].startswith("Columns taken by their names: Image Index (--image-column), Patient ID")


def test_columns_that_are_named_are_taken(folder: Path) -> None:
    path = table(
        folder, ["f", "what", "who", "where", "image"], CASES, list("xyxy"), list("1123"), list("abab"), "    "
    )
    listing = read(path, folder, image="f", labels=("what",), patient="who", subgroups=("where",))
    assert (listing.cases, listing.patients, listing.parts) == (CASES, list("1123"), None)
    assert listing.subgroups == {"where": list("abab")}
    with pytest.raises(InputError, match=r"--patient-column whom is no column of --csv .*: did you mean who"):
        read(path, folder, image="f", labels=("what",), patient="whom")


def test_labels_joined_in_one_column(folder: Path) -> None:
    """By | or ;, with spaces; what says that there is none, and stands by itself alone, is no label."""
    path = table(folder, ["path", "findings"], CASES, ["Mass|Edema", "No Finding", "Edema; Mass", "Edema"])
    listing = read(path, folder)
    assert listing.multi_label
    assert listing.labels == [("Mass", "Edema"), (), ("Edema", "Mass"), ("Edema",)]
    assert "'No Finding' is taken for no label" in listing.notices


def test_labels_in_columns_of_0_and_1(folder: Path) -> None:
    path = table(folder, ["path", "mass", "edema", "note"], CASES, [1, 0, 0, 1], ["1.0", "0.0", 1, 0], list("abcd"))
    listing = read(path, folder)
    assert listing.multi_label
    assert listing.classes == ("mass", "edema")
    assert listing.labels == [("mass", "edema"), (), ("edema",), ("mass",)]
    assert "mass, edema (--label-columns)" in listing.notices[0]


def test_one_label_in_each_row_makes_classes(folder: Path) -> None:
    path = table(folder, ["path", "mel", "nv"], CASES, [1, 0, 0, 1], [0, 1, 1, 0])
    listing = read(path, folder)
    assert not listing.multi_label
    assert listing.labels == [("mel",), ("nv",), ("nv",), ("mel",)]
    assert "Each image has one of the labels, which are taken for classes" in listing.notices


@pytest.mark.parametrize("kind", ["csv ;", "tsv", "parquet", "csv with BOM"])
def test_kinds_of_tables(folder: Path, kind: str) -> None:
    content = pd.DataFrame({"path": CASES, "label": [3, 4, 3, 4], "patient": [7, 7, 8, 9]})
    path = folder.parent / f"t.{kind.split()[0]}"
    if kind == "parquet":
        content.to_parquet(path)
    else:
        separator = {"csv ;": ";", "tsv": "\t"}.get(kind, ",")
        content.to_csv(path, sep=separator, index=False, encoding="utf-8-sig" if "BOM" in kind else "utf-8")
    listing = read(path, folder)
    assert listing.labels == [("3",), ("4",), ("3",), ("4",)]
    assert listing.patients == ["7", "7", "8", "9"]


def test_images_are_found_by_name_with_or_without_suffix(folder: Path) -> None:
    """Where they are not at their paths; Windows' paths too."""
    write_images(folder, ["deep/e.png", "deep/f.png", "deep/g.png"], first=10)
    path = table(folder, ["path", "label"], ["e.png", "f", "deep\\g.png", "gone.png"], list("xyxy"))
    found = read(path, folder).images.paths
    assert [file and Path(file).name for file in found] == ["e.png", "f.png", "g.png", None]
    write_images(folder, ["other/e.png"], first=20)
    with pytest.raises(InputError, match=r"names e.png, and there are deep/e.png and other/e.png: expected paths"):
        read(path, folder)


@pytest.mark.parametrize("escape", ["../secret.png", "absolute", "link.png", "linked/secret.png"])
def test_no_path_leads_out_of_the_folder(folder: Path, escape: str) -> None:
    """Upwards, from the root, or through a link; with --allow-outside each is read."""
    write_images(folder.parent, ["secret.png"], first=30)
    secret = folder.parent / "secret.png"
    os.symlink(secret, folder / "link.png")
    os.symlink(folder.parent, folder / "linked")
    case = str(secret) if escape == "absolute" else escape
    path = table(folder, ["path", "label"], [*CASES[:3], case], list("xyxy"))
    with pytest.raises(InputError, match=r"1 paths of --csv .* lead out of the folder .*, such as .*--allow-outside"):
        read(path, folder)
    listing = read(path, folder, allow_outside=True)
    assert listing.images.read(3) == secret.read_bytes()


@pytest.mark.parametrize(
    ("header", "columns", "expected"),
    [
        (["path", "label"], [["a.png", "b.png", "a.png"], list("xyx")], r"t.csv, row 4: a.png stands in row 2 already"),
        (["path", "label"], [["a.png", ""], list("xy")], r"t.csv, row 3: the column path is empty"),
        (["path", "label"], [["a.png", "b.png"], ["x", ""]], r"row 3: the column label is empty"),
        (
            ["path", "label", "patient"],
            [["a.png", "b.png"], list("xy"), ["1", ""]],
            "row 3: the column patient is empty",
        ),
        (
            ["path", "label", "split"],
            [["a.png", "b.png"], list("xy"), ["train", "dev2"]],
            "row 3: the column split has 'dev2'",
        ),
        (["what", "label"], [["a.png"], ["x"]], "has the columns what, label: name that of paths by --image-column"),
        (["path", "kind"], [["a.png"], ["x"]], "none of them called label or all of 0 and 1: name those of labels"),
        (["path", "label"], [[], []], "has no row: expected one per image"),
    ],
)
def test_bad_tables_are_told_by_row(
    folder: Path, header: list[str], columns: list[list[object]], expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        read(table(folder, header, *columns), folder)


def test_a_value_other_than_0_and_1_is_told(folder: Path) -> None:
    path = table(folder, ["path", "mass", "edema"], CASES, [1, 0, "u", 1], [1, 0, 1, 0])
    with pytest.raises(InputError, match=r"row 4: the column mass has 'u', expected 0 or 1"):
        read(path, folder, labels=("mass", "edema"))


@pytest.mark.parametrize("content", [b"", b"path,label\n\xff\xfe,x\n", b'path,label\n"a.png,x\n', b"PAR1"])
def test_what_is_no_table_is_told(folder: Path, content: bytes) -> None:
    path = folder.parent / ("t.parquet" if content == b"PAR1" else "t.csv")
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"can't be read as a table \(.*\): give a CSV or TSV file in UTF-8"):
        read(path, folder)
    with pytest.raises(InputError, match="can't be read as a table"):
        read(folder.parent / "absent.csv", folder)
