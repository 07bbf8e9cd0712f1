"""Class folders as users have them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from finetune.errors import InputError
from finetune.sources.folders import find_image_files, patients_of, read_class_folders
from small_folders import class_folders, write_images


def test_a_folder_per_class(tmp_path: Path) -> None:
    write_images(tmp_path, ["cat/b.png", "cat/a.jpg", "dog/deep/down/c.png"])
    listing = read_class_folders(tmp_path)
    assert listing.cases == ["cat/a.jpg", "cat/b.png", "dog/deep/down/c.png"]
    assert listing.labels == [("cat",), ("cat",), ("dog",)]
    assert listing.parts is None
    assert [Path(path) for path in listing.images.paths] == [tmp_path / case for case in listing.cases]


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["train", "val", "test"], ["train", "val", "test"]),
        (["Training", "Testing"], ["train", "test"]),
        (["TRAIN", "Valid", "test"], ["train", "val", "test"]),
        (["training", "validation"], ["train", "val"]),
    ],
)
def test_folders_of_splits_in_any_case(tmp_path: Path, names: list[str], parts: list[str]) -> None:
    write_images(tmp_path, [f"{name}/{label}/{k}.png" for name in names for label in ("cat", "dog") for k in range(2)])
    listing = read_class_folders(tmp_path)
    expected = dict(zip(names, parts, strict=True))
    assert [expected[case.split("/")[0]] for case in listing.cases] == listing.parts
    assert {case.split("/")[1] for case in listing.cases} == {name for (name,) in listing.labels} == {"cat", "dog"}


def test_folders_around_all_others_are_looked_through(tmp_path: Path) -> None:
    """As an archive leaves them; what lies beside, other than images, changes nothing."""
    class_folders(tmp_path / "archive" / "Brain MRI", parts="Training Testing", images=2)
    (tmp_path / "README.txt").write_text("from the web")
    listing = read_class_folders(tmp_path)
    assert listing.cases[0].startswith("Testing/cat/")
    assert set(listing.parts) == {"train", "test"}


def test_splits_beside_other_folders_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path, ["train/cat/a.png", "test/cat/b.png", "new/cat/c.png"])
    with pytest.raises(InputError, match="holds folders of splits and beside them new: expected either splits"):
        read_class_folders(tmp_path)


def test_no_image_and_no_folder_are_told(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with pytest.raises(InputError, match="holds no image: expected a folder per class"):
        read_class_folders(tmp_path)
    with pytest.raises(InputError, match="is no folder"):
        read_class_folders(tmp_path / "absent")


def test_a_tree_as_users_have_it(tmp_path: Path) -> None:
    """Each thing that is no image is left alone with a word, and every image is found once."""
    names = ["cat/a b.png", "cat/nested/in here/ü – 猫.png", "dog/one.JPG", "dog/two.tiff", "dog/.hidden.png"]
    write_images(tmp_path, [name for name in names if "hidden" not in name])
    (tmp_path / "dog/.hidden.png").write_bytes(b"")
    for junk in (".DS_Store", "cat/.DS_Store", "cat/Thumbs.db", "cat/notes.txt", "cat/labels.csv", "._cat"):
        (tmp_path / junk).write_bytes(b"junk")
    (tmp_path / "__MACOSX/cat").mkdir(parents=True)
    (tmp_path / "__MACOSX/cat/a b.png").write_bytes(b"junk")
    (tmp_path / "cat/empty.png").write_bytes(b"")
    (tmp_path / "cat/text.png").write_text("no image")
    os.symlink(tmp_path, tmp_path / "cat/loop")
    os.symlink(tmp_path / "dog/one.JPG", tmp_path / "dog/link.jpg")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "dog/dangling.png")
    os.symlink(tmp_path / "dog/itself.png", tmp_path / "dog/itself.png")
    os.mkfifo(tmp_path / "dog/pipe.png")
    (tmp_path / "bird").mkdir()
    (tmp_path / "stray.png").write_bytes(b"")
    listing = read_class_folders(tmp_path)
    assert listing.cases == [
        *("cat/a b.png", "cat/empty.png", "cat/nested/in here/ü – 猫.png", "cat/text.png"),
        *("dog/dangling.png", "dog/itself.png", "dog/link.jpg", "dog/one.JPG", "dog/pipe.png", "dog/two.tiff"),
    ]
    told = "\n".join(listing.notices)
    assert "cat/loop is a link to a folder that holds it, and is not followed" in told
    assert "The folder bird holds no image" in told
    assert "1 images lie in no class's folder and are left alone, such as stray.png" in told
    assert "the folder __MACOSX is one that systems leave, and is not looked into" in told
    for count in ("2 .DS_Store", "1 Thumbs.db", "1 .txt", "1 .csv", "1 .hidden.png", "1 ._cat"):
        assert count in told


def test_links_to_folders_are_followed_once_each(tmp_path: Path) -> None:
    write_images(tmp_path / "store", ["a.png", "b.png"])
    (tmp_path / "data/cat").mkdir(parents=True)
    write_images(tmp_path / "data", ["dog/c.png"], first=5)
    os.symlink(tmp_path / "store", tmp_path / "data/cat/linked")
    found, sentences = find_image_files(tmp_path / "data")
    assert [file.case for file in found] == ["cat/linked/a.png", "cat/linked/b.png", "dog/c.png"]
    assert not sentences


def test_names_that_are_no_text_can_be_written(tmp_path: Path) -> None:
    write_images(tmp_path, ["cat/a.png"])
    os.rename(os.fsencode(tmp_path / "cat/a.png"), os.fsencode(tmp_path) + b"/cat/\xff.png")
    (file,), _ = find_image_files(tmp_path)
    assert file.case == r"cat/\xff.png"
    assert file.case.encode("utf-8")
    assert Path(file.path).is_file()


def test_a_changed_file_has_another_key(tmp_path: Path) -> None:
    write_images(tmp_path, ["cat/a.png", "cat/b.png"])
    before = [file.key for file in find_image_files(tmp_path)[0]]
    write_images(tmp_path, ["cat/b.png"], first=9)
    os.utime(tmp_path / "cat/b.png", (1, 1))
    after = [file.key for file in find_image_files(tmp_path)[0]]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False]


def test_patients_by_a_regular_expression() -> None:
    assert patients_of(["cat/0017_left.png", "dog/0018_1.png"], re.compile(r"(\d+)_")) == ["0017", "0018"]
    with pytest.raises(InputError, match=r"names no patient in 1 of 2 images, such as dog/x.png"):
        patients_of(["cat/0017_left.png", "dog/x.png"], re.compile(r"(\d+)_"))
