"""Files of data that are not what they say: .npz, the label file and the lists of ChestX-ray14, and parquet."""

from __future__ import annotations

import csv
import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import chestxray
import datasets
import imagefolder
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finetune.data.catalogue import Catalogue, ImageFiles
from finetune.data.splits import SPLIT, read_split, split_table
from finetune.data.tasks import Task
from finetune.files import write_csv
from finetune.sources.nih_tree import read_nih_tree
from malicious_files import WritesAFile
from small_folders import write_images
from small_trees import HEADER, case_names, make_tree, write_boxes, write_labels

NPZ = ["--dataset", "breastmnist", "--data-dir", ".", "--allow-modified", "--model", "test_resnet", "--no-pretrained"]
NPZ += ["--batch-size", "4", "--output", "run"]
PARTS = ("train", "val", "test")


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def header(text: str, content: bytes = b"") -> bytes:
    """A .npy file with any text for a header."""
    padded = text.encode() + b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + content


def shape(text: str) -> bytes:
    return header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {text}, }}")


IMAGES = npy(np.zeros((8, 28, 28), np.uint8))
LABELS = npy(np.arange(8).reshape(8, 1) % 2)
CODE = np.array([WritesAFile(Path("canary"))], dtype=object)


def npz(images: bytes = IMAGES, labels: bytes = LABELS, encrypted: bool = False) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in PARTS:
            archive.writestr(f"{part}_images.npy", images)
            archive.writestr(f"{part}_labels.npy", labels)
    content = bytearray(file.getvalue())
    if encrypted:  # says a bit of each entry
        for mark, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
            start = content.find(mark)
            while start >= 0:
                content[start + offset] |= 1
                start = content.find(mark, start + 1)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is no readable .npz file"),
        (b"<html>", "is no readable .npz file"),
        (npz()[:-30], "is no readable .npz file"),
        (pickle.dumps(WritesAFile(Path("canary"))), "is no readable .npz file"),
        (npz(npy(CODE, allow_pickle=True)), "holds no readable train split (Object arrays cannot be loaded"),
        (npz(labels=npy(CODE, allow_pickle=True)), "holds no readable train split (Object arrays cannot be loaded"),
        (npz(pickle.dumps(WritesAFile(Path("canary")))), "holds no readable train split"),
        (npz(encrypted=True), "holds no readable train split"),
        (npz(b"not an array"), "(train_images is no array)"),
        (
            npz(header("{'descr': '|u1', 'fortran_order': False, 'shape': (10000000000000, 28, 28), }")),
            "no readable train",
        ),
        (npz(header("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 28, 28), }")), "no readable train split"),
        (npz(header("__import__('os').system('touch canary')")), "no readable train split"),
        (npz(header("(" * 5000)), "no readable train split"),
        (npz(npy(np.zeros((8, 28, 28), np.float32))), "train_images of float32"),
        (npz(npy(np.zeros((8, 28, 28, 3), np.uint8))), "train_images of uint8 and shape (8, 28, 28, 3)"),
        (npz(npy(np.zeros((8, 28, 30), np.uint8))), "train_images of uint8 and shape (8, 28, 30)"),
        (npz(npy(np.zeros((8, 0, 0), np.uint8))), "train_images of uint8 and shape (8, 0, 0)"),
        (npz(npy(np.zeros((0, 28, 28), np.uint8))), "train_images of uint8 and shape (0, 28, 28)"),
        (npz(npy(np.uint8(3))), "train_images of uint8 and shape ()"),
        (npz(labels=npy(np.full((8, 1), 0.7))), "train_labels of float64: expected whole numbers"),
        (npz(labels=npy(np.full((8, 1), np.nan))), "train_labels of float64: expected whole numbers"),
        (npz(labels=npy(np.full((8, 1), "a"))), "train_labels of <U1: expected whole numbers"),
        (npz(labels=npy(np.full((8, 1), 2**63, np.uint64))), "train_labels between -9223372036854775808"),
        (npz(labels=npy(np.full((8, 1), -1))), "train_labels between -1 and -1"),
        (npz(labels=npy(np.zeros((8, 0), int))), "train_labels of shape (8, 0) for 8 images: expected (8, 1)"),
        (npz(labels=npy(np.zeros((7, 1), int))), "train_labels of shape (7, 1) for 8 images: expected (8, 1)"),
    ],
)
def test_npz(attack: Callable[..., str], tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "breastmnist.npz").write_bytes(content)
    assert expected in attack(*NPZ)


@pytest.mark.parametrize("put", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_npz_that_is_no_file(attack: Callable[..., str], tmp_path: Path, put: Callable[[Path], None]) -> None:
    put(tmp_path / "breastmnist.npz")
    assert "is no readable .npz file" in attack(*NPZ)


# ChestX-ray14, as NIH distributes it.

XRAY = [
    "--model",
    "test_resnet",
    "--no-pretrained",
    "--image-size",
    "16",
    "--batch-size",
    "16",
    "--prepare-workers",
    "0",
]
XRAY += ["--prepared-dir", "prepared", "--output", "run"]
ROW = "00000001_000.png,Mass,0,1,058,M,PA,1,1,1,1"


def labels(*rows: str) -> Callable[[Path], None]:
    return lambda tree: (tree / "Data_Entry_2017.csv").write_text("\n".join([HEADER, *rows, ""]))


def listed(text: bytes) -> Callable[[Path], None]:
    return lambda tree: (tree / "test_list.txt").write_bytes(text)


def replaced(name: str, put: Callable[[Path], None]) -> Callable[[Path], None]:
    def replace(tree: Path) -> None:
        (tree / name).unlink()
        put(tree / name)

    return replace


ZERO = Path("/dev/zero")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (labels(), "names 40 images that Data_Entry_2017.csv doesn't"),
        (labels("00000001_000.png,Mass"), "line 2, 00000001_000.png: expected an image, its labels and its patient"),
        (labels(ROW.replace(",1,058", ",,058")), "line 2, 00000001_000.png: expected an image, its labels and its"),
        (labels(ROW.replace("Mass", "")), "line 2, 00000001_000.png: expected an image"),
        (labels(ROW.replace("Mass", "Mass|")), "has the label ''"),
        (labels(ROW.replace("Mass", "=cmd|calc")), "has the label '=cmd'"),
        (labels(ROW.replace("Mass", "\x1b[2J")), r"has the label '\x1b[2J'"),
        (labels(ROW, ROW), "line 3, 00000001_000.png stands there twice"),
        (labels('"' + "x" * 200_000), "can't be read as CSV (field larger than field limit"),
        (listed(b"\xff\xfe"), "test_list.txt can't be read"),
        (listed(b"../../etc/passwd"), "names 1 images that Data_Entry_2017.csv doesn't, such as ../../etc/passwd"),
        (listed(b"\x1b]0;x\x07"), r"such as \x1b]0;x\x07"),
        (listed(b""), "has no image in its test split"),
        (listed(b"00000001_000.png"), "share 1 images, such as 00000001_000.png"),
        (replaced("test_list.txt", os.mkfifo), "test_list.txt is no file"),
        (replaced("test_list.txt", lambda path: path.symlink_to(ZERO)), "test_list.txt is no file"),
        (replaced("train_val_list.txt", Path.mkdir), "train_val_list.txt is no file"),
        (replaced("Data_Entry_2017.csv", os.mkfifo), "holds no label file"),
        (replaced("Data_Entry_2017.csv", lambda path: path.symlink_to(ZERO)), "holds no label file"),
        (lambda tree: write_boxes(tree, ["a.png,Mass,1e400,0,1,1"]), "the box inf, 0, 1, 1 is not in 1024 x 1024"),
        (lambda tree: write_boxes(tree, ["a.png,Mass," + "9" * 5000 + ",0,1,1"]), "the box inf, 0, 1, 1 is not in"),
    ],
)
def test_label_files_and_lists(
    attack: Callable[..., str], tmp_path: Path, spoil: Callable[[Path], object], expected: str
) -> None:
    spoil(make_tree(tmp_path / "tree"))
    assert expected in attack("--data-dir", "tree", *XRAY, recipe=chestxray.main)


def test_ages_of_any_length(tmp_path: Path) -> None:
    """Python refuses to read numbers of 5,000 digits."""
    tree = make_tree(tmp_path / "tree")
    write_labels(tree, case_names(30))
    text = (tree / "Data_Entry_2017.csv").read_text()
    (tree / "Data_Entry_2017.csv").write_text(text.replace(",058,", f",{'9' * 5000},", 1))
    assert read_nih_tree(tree, allow_missing=False).subgroups["age"][0] is None


def test_options_are_refused_before_images_are_prepared(attack: Callable[..., str], tmp_path: Path) -> None:
    """It took an hour on the whole data set to hear of --merge-prob 1.5."""
    make_tree(tmp_path / "tree")
    for only in ([], ["--prepare-only"]):
        message = attack("--data-dir", "tree", *XRAY, "--merge-prob", "1.5", *only, recipe=chestxray.main)
        assert "merge_prob" in message


# ChestX-ray14 as parquet.


def table(**columns: pa.Array) -> pa.Table:
    """Six images of three patients, with other columns as they are given."""
    image = pa.array([{"bytes": b"no image", "path": f"{k}.png"} for k in range(6)])
    patients = pa.array([1, 1, 2, 2, 3, 3])
    lists = pa.array([["No Finding"]] * 6)
    return pa.table({"image": image, "patient_id": patients, "labels": lists} | columns)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"labels": pa.array(["Mass"] * 6)}, "has labels of the kind"),
        ({"labels": pa.array([3] * 6)}, "has labels of the kind"),
        ({"labels": pa.array([[3]] * 6)}, "has labels of the kind"),
        ({"labels": pa.nulls(6)}, "has labels of the kind"),
        (
            {"labels": pa.array([["Mass"], None] * 3)},
            "row 1 has no labels: expected 'No Finding' where nothing",
        ),
        ({"labels": pa.array([["Mass"], ["Mass", None]] * 3)}, "row 1 has no labels: expected 'No Finding'"),
        ({"labels": pa.array([["Mass"], ["Covid"]] * 3)}, "row 1 has the label 'Covid'"),
        ({"patient_id": pa.array([1, None, 2, 2, 3, 3])}, "row 1 has no patient: expected one in every row"),
        ({"patient_id": pa.array(["a", "", "b", "b", "c", "c"])}, "row 1 has no patient"),
        ({"patient_id": pa.nulls(6)}, "row 0 has no patient"),
        ({"image": pa.array([1] * 6)}, "has columns of other kinds than images, patients and lists of labels"),
    ],
)
def test_parquet(
    attack: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: dict, expected: str
) -> None:
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        pq.write_table(table(**columns), folder / f"{part}-00000-of-00001.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert expected in attack("--hub", "hub", *XRAY, recipe=chestxray.main, may_change="cache")


@pytest.mark.parametrize(
    "put",
    [
        os.mkfifo,
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PAR1" + b"\xff" * 100 + b"PAR1"),
        lambda path: path.write_text("<html>"),
    ],
)
def test_parquet_that_is_none(
    attack: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put: Callable[[Path], None]
) -> None:
    (tmp_path / "hub").mkdir()
    pq.write_table(table(), tmp_path / "hub" / "test.parquet")
    put(tmp_path / "hub" / "train.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    message = attack("--hub", "hub", *XRAY, recipe=chestxray.main, may_change="cache")
    assert "--hub hub can't be loaded" in message or "train.parquet is no file that can be read" in message


# One's own images, by a table.


@pytest.mark.parametrize("put", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_table_that_is_no_file(attack: Callable[..., str], tmp_path: Path, put: Callable[[Path], None]) -> None:
    (tmp_path / "images").mkdir()
    put(tmp_path / "t.csv")
    own = ["--data-dir", "images", "--csv", "t.csv", "--model", "test_resnet", "--no-pretrained", "--output", "run"]
    assert "--csv t.csv can't be read as a table (it is no file" in attack(*own, recipe=imagefolder.main)


OWN = ["--data-dir", "images", "--csv", "t.csv", "--model", "test_resnet", "--no-pretrained", "--output", "run"]
OWN += ["--prepared-dir", "prepared", "--prepare-workers", "0", "--image-size", "16"]
ROWS = b"a.png,x\nb.png,y\nc.png,x\nd.png,y\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "can't be read as a table"),
        (b"path,label\n", "has no row"),
        (b"\x00" * 1000, "has no row"),
        (b"path,label\na\x00.png,x\nb.png,y\n", "1 images|can't be read|missing"),
        ("path,label\na.png,x\n".encode("utf-16"), "can't be read as a table"),
        (b'path,label\n"a.png,x\n', "can't be read as a table"),
        (b"path,label\na.png,x,more\n", "can't be read as a table \\(Length of header"),
        (b"path,label\n../secret.png,x\na.png,y\n", "lead out of the folder images, such as ../secret.png"),
        (b"path,label\n/etc/passwd,x\na.png,y\n", "lead out of the folder images, such as /etc/passwd"),
        (b"path,label\n" + b"x" * 5000 + b",x\na.png,y\n", r"1 of 2 images can't be used \(xxx.* \[\.\.\.\]$"),
        (b"," * 1_000_000 + b"\n", "it has 1,000,001 columns, more than 10,000"),
        (b",".join(b"c%d" % k for k in range(2000)) + b"\n" + b"x," * 1999 + b"x\n", r"columns c0, .* \[\.\.\.\]$"),
        (b"path,path,label\na.png,b.png,x\n", "the one class 'x'"),
        (b"path,label,path \na.png,x,b.png\n", "the one class 'x'"),
        (b"path,label,patient\na.png,x,\nb.png,y,1\n", "row 2: the column patient is empty"),
        (b"path,label,split\na.png,x,=1+1\n", "the column split has '=1\\+1', expected train, val or test"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_tables(attack: Callable[..., str], tmp_path: Path, content: bytes, expected: str) -> None:
    write_images(tmp_path / "images", ["a.png", "b.png"])
    write_images(tmp_path, ["secret.png"])
    (tmp_path / "t.csv").write_bytes(content)
    assert re.search(expected, attack(*OWN, recipe=imagefolder.main, may_change="prepared"))


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (pa.table({"path": ["a.png"], "label": [["x", "y"]]}), "its column label has lists; --hub reads those"),
        (pa.table({"path": ["a.png"], "label": [{"x": 1}]}), "its column label has lists; --hub reads those"),
        (pa.table([["a.png"], ["x"], ["y"]], ["path", "label", "label"]), "can't be read as a table"),
        (pa.table({"path": pa.nulls(1), "label": ["x"]}), "row 2: the column path is empty"),
        (pa.table({"path": ["a.png"], "label": pa.nulls(1)}), "row 2: the column label is empty"),
    ],
)
def test_parquet_tables(attack: Callable[..., str], tmp_path: Path, table: pa.Table, expected: str) -> None:
    write_images(tmp_path / "images", ["a.png", "b.png"])
    pq.write_table(table, tmp_path / "t.parquet")
    assert expected in attack(*OWN, "--csv", "t.parquet", recipe=imagefolder.main, may_change="prepared")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "can't be read (it is no file, or not there)"),
        (b"", "has no column"),
        (b"case,split\n\xff,train\n", "can't be read"),
        (b"case,split\n" + b"x" * 200_000 + b",train\n", "can't be read (field larger than field limit"),
        (b"split,case\ntrain\n", "names 1 images that images doesn't have"),
        (b"case,split\nx/a.png,=1\n", "has the split '=1': expected train, val, test"),
        (b"case,split\n../../etc/passwd,train\n", "names 1 images that images doesn't have, such as ../../etc/passwd"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_split_files(attack: Callable[..., str], tmp_path: Path, content: bytes | None, expected: str) -> None:
    write_images(tmp_path / "images", ["x/a.png", "x/b.png", "y/c.png", "y/d.png"])
    if content is None:
        os.mkfifo(tmp_path / "split.csv")
    else:
        (tmp_path / "split.csv").write_bytes(content)
    own = ["--data-dir", "images", *OWN[4:], "--split-file", "split.csv"]
    assert expected in attack(*own, recipe=imagefolder.main, may_change="prepared")


def test_names_like_formulas_come_back_from_the_split_file(tmp_path: Path) -> None:
    """A spreadsheet computes what begins so; a quote stands before it in the file, and not in the case."""
    cases = ["=1+1.png", "+a.png", "-1.png", "@b.png", "\tc.png", "\rd.png", "'=e.png", "plain.png"]
    images = ImageFiles([None] * len(cases), cases)
    split = np.array(["train", "val", "test", "train", "", "val", "test", "train"])
    task = Task("binary", ("=x", "y"))
    catalogue = Catalogue("c", task, cases, np.arange(8) % 2, split, images, patients=[f"@{case}" for case in cases])
    write_csv(tmp_path / "split.csv", *split_table(catalogue, SPLIT, split))
    with (tmp_path / "split.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if cell[:1] and cell[0] in "=+-@\t\r"]
    np.testing.assert_array_equal(read_split(tmp_path / "split.csv", catalogue, SPLIT), split)


# One's own images as parquet.


LISTS = datasets.List(datasets.ClassLabel(names=["x", "y"]))


@pytest.mark.parametrize(
    ("labels", "kind", "expected"),
    [
        ([["x"], None, ["y"], []], datasets.List(datasets.Value("string")), "row 1: the column label has a null or an"),
        ([["x"], [None], ["y"], []], datasets.List(datasets.Value("string")), "row 1: the column label has a null or"),
        ([["x"], ["x", ""], ["y"], []], datasets.List(datasets.Value("string")), "row 1: the column label has a null"),
        ([[0], None, [1], []], LISTS, "row 1: the column label has a null or an empty name among its labels"),
        ([[0], [-1], [1], []], LISTS, "the column label has values without a name"),
        ([0, -1, 1, 0], datasets.ClassLabel(names=["x", "y"]), "the column label has values without a name"),
        (["x", None, "y", "x"], datasets.Value("string"), "row 1: the column label is empty"),
        ([1.5, None, 2.5, 1.5], datasets.Value("float64"), "row 1: the column label is empty"),
        ([None] * 4, datasets.Value("null"), "row 0: the column label is empty"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_labels_of_own_parquet(
    attack: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    labels: list,
    kind: object,
    expected: str,
) -> None:
    """A null is no image without findings: nobody may have looked at it."""
    columns = {"image": [{"bytes": b"no image", "path": f"{k}.png"} for k in range(4)], "label": labels}
    features = datasets.Features({"image": datasets.Image(decode=False), "label": kind})
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "hub" / "train.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    message = attack("--hub", "hub", *OWN[4:], recipe=imagefolder.main, may_change="cache")
    assert expected in message


def test_own_options_are_refused_before_images_are_prepared(attack: Callable[..., str], tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["x/a.png", "y/b.png"])
    for only in ([], ["--prepare-only"]):
        own = ["--data-dir", "images", *OWN[4:], "--merge-prob", "1.5", *only]
        assert "merge_prob" in attack(*own, recipe=imagefolder.main)


def test_all_tables_are_written_by_one_function() -> None:
    """By which no text is a formula; that of ``inmerge inspect`` has its own test."""
    recipes = Path(imagefolder.__file__).parent
    writers = [
        path.name for path in recipes.rglob("*.py") if re.search(r"csv\.writer|DictWriter|to_csv", path.read_text())
    ]
    assert writers == ["files.py"]
