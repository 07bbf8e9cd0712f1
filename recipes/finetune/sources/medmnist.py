"""The 2D data sets of MedMNIST, from local .npz files or downloaded by the medmnist package."""

import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import medmnist
import numpy as np
from torchvision.datasets.utils import calculate_md5

from ..data.images import ImageData, Split, resize
from ..data.tasks import Kind, Task
from ..errors import InputError, first_line, is_main_process
from ..files import regular_file
from .source import DatasetOptions, Source

KINDS: dict[str, Kind] = {
    "binary-class": "binary",
    "multi-class": "multi-class",
    "multi-label, binary-class": "multi-label",
    "ordinal-regression": "ordinal",
}
# The class of a binary set that is looked for; breastmnist's class 1 is the healthy one.
POSITIVE = {"pneumoniamnist": 1, "breastmnist": 0}
NAMES = [name for name in medmnist.INFO if not name.endswith("3d")]


def load_medmnist(
    name: str, source_size: int, image_size: int | None, data_dir: Path | None, allow_modified: bool
) -> ImageData:
    """Read the official splits of one set, at `image_size`.

    Args:
        source_size: which file, by the side of its images: 28, 64, 128 or 224 pixels.
        data_dir: where the file lies, or is put by the download; None: medmnist's own folder.
        allow_modified: accept a file whose md5 is not the one that medmnist knows.
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
    with np.load(path) as arrays:
        splits = [
            _read_split(arrays, part, path, info, task, image_size or source_size) for part in ("train", "val", "test")
        ]

    def own_scores(probabilities: np.ndarray) -> dict[str, float | None]:
        return _evaluator_scores(name, source_size, path.parent, probabilities)

    return ImageData(name, task, *splits, files={path.name: found}, own_scores=own_scores, suite=name)


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


def _read_split(arrays: Any, part: str, path: Path, info: dict[str, Any], task: Task, image_size: int) -> Split:
    try:
        images, labels = (_array(arrays, f"{part}_{kind}") for kind in ("images", "labels"))
    except Exception as error:  # whatever numpy and zipfile raise on a damaged file, or one too large for the memory
        raise InputError(
            f"{path} holds no readable {part} split ({first_line(error)}): expected {part}_images and {part}_labels"
        ) from error
    colour = info["n_channels"] == 3
    if images.dtype != np.uint8 or images.ndim != 3 + colour or images.shape[1] != images.shape[2] or not images.size:
        raise InputError(
            f"{path} has {part}_images of {images.dtype} and shape {images.shape}: expected square uint8 images "
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
    images = np.moveaxis(images, -1, 1) if colour else images[:, None]
    return Split(
        images=resize(np.ascontiguousarray(images), image_size),
        labels=labels if task.multi_label else labels[:, 0],
        cases=[str(index) for index in range(len(images))],
    )


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
    if options.split_seed and options.limit_train is None:
        raise InputError(
            f"--split-seed has no effect on {options.dataset}, which has official splits, without --limit-train: leave "
            "it out"
        )


def _load(options: DatasetOptions) -> ImageData:
    return load_medmnist(
        options.dataset, options.source_size, options.image_size, options.data_dir, options.allow_modified
    )


MEDMNIST = Source(_check, _load)
