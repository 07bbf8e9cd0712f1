"""Images and splits from their sources."""

from __future__ import annotations

import medmnist
import numpy as np
from finetune.data.images import resize
from finetune.sources.digits import load_digits_data
from finetune.sources.medmnist import load_medmnist
from PIL import Image


def test_resize_equals_pil() -> None:
    """Up and down, every pixel within one grey level of PIL's bilinear, antialiased resize."""
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 28, 28), dtype=np.uint8)
    for size in (16, 64):
        found = resize(images, size, chunk=2)
        expected = [
            np.asarray(Image.fromarray(image.transpose(1, 2, 0)).resize((size, size), Image.Resampling.BILINEAR))
            for image in images
        ]
        difference = np.abs(found.transpose(0, 2, 3, 1).astype(int) - np.stack(expected).astype(int))
        assert difference.max() <= 1
    assert resize(images, 28) is images


def test_digits_are_split_once_by_class() -> None:
    """No image twice, none lost, the classes balanced; the split depends on its own seed alone."""
    data, again, other = (load_digits_data(8, seed) for seed in (0, 0, 1))
    cases = [case for split in (data.train, data.val, data.test) for case in split.cases]
    assert sorted(map(int, cases)) == list(range(1797))
    assert data.test.cases == again.test.cases != other.test.cases
    for split in (data.train, data.val, data.test):
        assert np.bincount(split.labels).min() > 0.09 * len(split)
    assert data.train.images.shape[1:] == (1, 8, 8)
    assert data.train.images.max() == 255


def test_medmnist_files_are_read_as_the_package_reads_them(shared_file) -> None:
    path = shared_file("data/medmnist/breastmnist.npz")
    data = load_medmnist("breastmnist", 28, None, path.parent, allow_modified=False)
    for name in ("train", "val", "test"):
        theirs = medmnist.BreastMNIST(name, root=str(path.parent))
        ours = getattr(data, name)
        np.testing.assert_array_equal(ours.images[:, 0], theirs.imgs)
        np.testing.assert_array_equal(ours.labels, theirs.labels[:, 0])
    assert data.task.classes == ("malignant", "normal, benign")
    assert data.files == {"breastmnist.npz": medmnist.INFO["breastmnist"]["MD5"]}


def test_colour_images_are_read_channels_first(made_medmnist) -> None:
    folder = made_medmnist("pathmnist", colour=True, classes=9, size=64, cases=8)
    data = load_medmnist("pathmnist", 64, None, folder, allow_modified=True)
    with np.load(folder / "pathmnist_64.npz") as arrays:
        np.testing.assert_array_equal(data.val.images.transpose(0, 2, 3, 1), arrays["val_images"])


def test_missing_file_is_downloaded_by_the_package(made_medmnist, tmp_path, monkeypatch) -> None:
    """It arrives beside its place and is renamed; what it says is then read as a local file is."""
    source = made_medmnist("octmnist", colour=False, classes=4, cases=8) / "octmnist.npz"
    asked = []

    def fetched(url: str, root: str, filename: str, md5: str) -> None:
        asked.append((url, md5))
        (tmp_path / root / filename).write_bytes(source.read_bytes())

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetched)
    (tmp_path / "data").mkdir()
    load_medmnist("octmnist", 28, None, tmp_path / "data", allow_modified=True)
    assert asked == [(medmnist.INFO["octmnist"]["url"], medmnist.INFO["octmnist"]["MD5"])]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["octmnist.npz"]
