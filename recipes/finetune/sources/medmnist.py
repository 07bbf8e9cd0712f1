"""The 2D data sets of MedMNIST, from local .npz files or downloaded by the medmnist package."""

import io
import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import medmnist
import numpy as np
from torchvision.datasets.utils import calculate_md5

from ..data.catalogue import PARTS
from ..data.images import ImageData, Split, resize
from ..data.opening import Opened, Window
from ..data.prepared import PreparedImages, prepare
from ..data.squares import Form
from ..data.tasks import Kind, Task
from ..errors import InputError, first_line, is_main_process
from ..files import regular_file
from .options import DatasetOptions, default_prepared_dir
from .source import Source

KINDS: dict[str, Kind] = {
    "binary-class": "binary",
    "multi-class": "multi-class",
    "multi-label, binary-class": "multi-label",
    "ordinal-regression": "ordinal",
}
# The class of a binary set that is looked for; breastmnist's class 1 is the healthy one.
POSITIVE = {"pneumoniamnist": 1, "breastmnist": 0}
_LARGEST_IN_MEMORY = 64  # side of the images, in pixels; of larger ones a set can be 30 GB
NAMES = [name for name in medmnist.INFO if not name.endswith("3d")]


def load_medmnist(
    name: str,
    source_size: int,
    image_size: int | None,
    data_dir: Path | None,
    allow_modified: bool,
    prepared_dir: Path | None = None,
) -> ImageData:
    """Read the official splits of one set, at `image_size`.

    Images of 28 and 64 pixels lie in memory. Larger ones are prepared once, and read by memory map.

    Args:
        source_size: which file, by the side of its images: 28, 64, 128 or 224 pixels.
        data_dir: where the file lies, or is put by the download; None: medmnist's own folder.
        allow_modified: accept a file whose md5 is not the one that medmnist knows.
        prepared_dir: the folder of all prepared images.
    """
    info = medmnist.INFO[name]
    suffix = "" if source_size == 28 else f"_{source_size}"
    path = _data_folder(data_dir) / f"{name}{suffix}.npz"
    url, md5 = info[f"url{suffix}"], info[f"MD5{suffix}"]
    if not path.exists():
        _download(info, source_size, path, url, md5)
    found = _checked_md5(path, url, md5, allow_modified)
    classes = tuple(info["label"][str(k)] for k in range(len(info["label"])))
    task = Task(KINDS[info["task"]], classes, POSITIVE.get(name, 1))
    size, colour = image_size or source_size, info["n_channels"] == 3
    splits: dict[str, Any] = {}
    for part in PARTS:
        with _part_told(path, part), np.load(path) as arrays:
            labels = _array(arrays, f"{part}_labels")
            name_of_images = f"{part}_images"
            in_memory = source_size <= _LARGEST_IN_MEMORY
            source = _array(arrays, name_of_images) if in_memory else ArrayImages(path, name_of_images, found)
        labels = _checked_labels(source, labels, path, part, colour, task)
        if isinstance(source, np.ndarray):
            planes = np.moveaxis(source, -1, 1) if colour else source[:, None]
            images: Any = resize(np.ascontiguousarray(planes), size)
        else:
            folder = (prepared_dir or default_prepared_dir()) / f"{path.stem}-{size}px" / part
            images = prepare(source, Form(size, decode=open_array), folder, workers=0)
        splits[part] = Split(
            images=images,
            labels=labels if task.multi_label else labels[:, 0],
            cases=[str(index) for index in range(len(labels))],
            pixel_hashes=images.pixel_hashes() if isinstance(images, PreparedImages) else None,
        )

    def own_scores(probabilities: np.ndarray) -> dict[str, float | None]:
        return _evaluator_scores(name, source_size, path.parent, probabilities)

    return ImageData(name, task, **splits, files={path.name: found}, own_scores=own_scores, suite=name)


def _data_folder(data_dir: Path | None) -> Path:
    folder = Path(data_dir or medmnist.info.DEFAULT_ROOT or Path.home() / ".medmnist").expanduser()
    if not folder.is_dir():
        raise InputError(f"--data-dir {folder} is no folder: give the folder that holds the .npz files")
    return folder


def _download(info: dict[str, Any], size: int, path: Path, url: str, md5: str) -> None:
    """Let the medmnist package download beside the place, so that no half a file is ever found there."""
    hint = f"download {url} (md5 {md5}) yourself and give its folder with --data-dir"
    if not is_main_process():
        raise InputError(f"{path} is not there: {hint}")
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            getattr(medmnist, info["python_class"])("val", download=True, root=folder, size=size)
            os.replace(Path(folder) / path.name, path)
    except Exception as error:  # whatever the network, the server or the disk raise
        raise InputError(f"{path.name} is not in {path.parent} and its download failed: {hint}") from error


def _checked_md5(path: Path, url: str, md5: str, allow_modified: bool) -> str:
    try:
        if not regular_file(path):
            raise ValueError("no file")
        with zipfile.ZipFile(path):
            pass
    except Exception as error:  # whatever zipfile raises on what is none
        raise InputError(
            f"{path} is no readable .npz file (cut short, or of another kind): download it again from {url} (md5 {md5})"
        ) from error
    found = calculate_md5(path)
    if found != md5 and not allow_modified:
        raise InputError(
            f"{path} has md5 {found}, medmnist's file has {md5}: download it again from {url}, or accept "
            "the changed file with --allow-modified"
        )
    return found


@contextmanager
def _part_told(path: Path, part: str) -> Iterator[None]:
    """Tell in one sentence whatever numpy and zipfile raise on a damaged file, or on one too large for the memory."""
    try:
        yield
    except Exception as error:
        raise InputError(
            f"{path} holds no readable {part} split ({first_line(error)}): expected {part}_images and {part}_labels"
        ) from error


class ArrayImages:
    """The images of an array in an .npz file, which are read one after another as they are asked for."""

    def __init__(self, path: Path, name: str, checksum: str) -> None:
        self._path, self._name, self._checksum = path, name, checksum
        self._stream: IO[bytes] | None = None
        self._next = 0
        with self._open() as stream:
            self.shape, self.dtype = _header(stream)

    def __len__(self) -> int:
        return self.shape[0]

    def key(self, row: int) -> str:
        return f"{self._checksum} {self._name} {row}"

    def read(self, row: int) -> bytes:
        """One image as an .npy file. Rows that are asked for out of their order are reached by reading on to them."""
        if self._stream is None or row < self._next:
            self._stream, self._next = self._open(), 0
            _header(self._stream)
        size = int(np.prod(self.shape[1:]))
        with _part_told(self._path, self._name.partition("_")[0]):
            while self._next <= row:
                pixels = self._stream.read(size)
                self._next += 1
            image = np.frombuffer(pixels, dtype=np.uint8).reshape(self.shape[1:])
        encoded = io.BytesIO()
        np.save(encoded, image)
        return encoded.getvalue()

    def _open(self) -> IO[bytes]:
        return zipfile.ZipFile(self._path).open(f"{self._name}.npy")


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and kind of the array that begins in a stream, which is left at its first value."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(stream)
    if by_columns and len(shape) > 1:
        raise ValueError("its array is stored by columns")
    return shape, dtype


def open_array(encoded: bytes, window: Window) -> Opened:
    """Decode an image of ArrayImages."""
    return Opened(np.load(io.BytesIO(encoded), allow_pickle=False))


def _checked_labels(
    images: np.ndarray | ArrayImages, labels: np.ndarray, path: Path, part: str, colour: bool, task: Task
) -> np.ndarray:
    """The labels as int64, of images and labels that are as MedMNIST has them."""
    shape = images.shape
    square = len(shape) == 3 + colour and shape[1] == shape[2] and 0 not in shape
    if images.dtype != np.uint8 or not square or (colour and shape[3] != 3):
        raise InputError(
            f"{path} has {part}_images of {images.dtype} and shape {shape}: expected square uint8 images "
            f"{'with three channels last' if colour else 'without a channel axis'}"
        )
    if labels.dtype.kind not in "iu":
        raise InputError(f"{path} has {part}_labels of {labels.dtype}: expected whole numbers")
    labels = labels.astype(np.int64)
    outputs = len(task.classes)
    width, values = (outputs, 2) if task.multi_label else (1, outputs)
    if labels.shape != (len(images), width):
        raise InputError(
            f"{path} has {part}_labels of shape {labels.shape} for {len(images)} images: expected "
            f"{(len(images), width)}"
        )
    if labels.min() < 0 or labels.max() >= values:
        raise InputError(
            f"{path} has {part}_labels between {labels.min()} and {labels.max()}: expected values from 0 to "
            f"{values - 1}"
        )
    return labels


def _array(arrays: Any, name: str) -> np.ndarray:
    array = arrays[name]
    if not isinstance(array, np.ndarray):  # numpy hands on the bytes of what is none
        raise ValueError(f"{name} is no array")
    return array


def _evaluator_scores(name: str, size: int, root: Path, probabilities: np.ndarray) -> dict[str, float | None]:
    """AUC and ACC by medmnist's own Evaluator; None where it can't compute (a class that no case has)."""
    evaluator = medmnist.Evaluator(name, "test", size=size, root=str(root))
    try:
        auc, accuracy = evaluator.evaluate(probabilities)
    except ValueError:
        return {"medmnist_auc": None, "medmnist_acc": None}
    return {
        "medmnist_auc": float(auc) if np.isfinite(auc) else None,
        "medmnist_acc": float(accuracy) if np.isfinite(accuracy) else None,
    }


def _check(options: DatasetOptions) -> None:
    if options.split_seed and options.limit_train is None and not options.label_noise:
        raise InputError(
            f"--split-seed has no effect on {options.dataset}, which has official splits, without --limit-train or "
            "--label-noise: leave it out"
        )
    if options.prepared_dir and options.source_size <= _LARGEST_IN_MEMORY:
        raise InputError(
            f"--prepared-dir has no effect on images of {options.source_size} pixels, which lie in memory: leave it out"
        )


def _load(options: DatasetOptions) -> ImageData:
    return load_medmnist(
        options.dataset,
        options.source_size,
        options.image_size,
        options.data_dir,
        options.allow_modified,
        options.prepared_dir,
    )


MEDMNIST = Source(_check, _load)
