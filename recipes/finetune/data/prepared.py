"""Images decoded and resized once, in Arrow files that training reads by memory map.

The prepared images lie in files of `SHARD` rows. Each is named by a hash of what it was made from, written beside its
place and renamed. So preparing goes on where it was killed, a changed source image makes one file anew, and what is
there can be trusted. Processes that prepare the same folder wait for one another by a file lock, which the system
releases when its holder dies.
"""

import hashlib
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..errors import InputError, is_main_process
from ..files import PARTIAL, flush
from .catalogue import LEFT_OUT, PARTS, Catalogue, EncodedImages, check_complete
from .images import ImageData, Split
from .opening import Unreadable
from .squares import Form, Square, make_square

SHARD = 512
FEATURES = datasets.Features(
    {
        "pixels": datasets.Value("binary"),  # of a Square, as are the next four; null where the image can't be read
        "width": datasets.Value("int32"),
        "height": datasets.Value("int32"),
        "pixel_hash": datasets.Value("binary"),
        "header": datasets.Value("string"),  # as JSON
        "problem": datasets.Value("string"),  # why it can't be read, or null
    }
)
_BATCH = 64


class PreparedImages:
    """Squares in a fixed order, uint8 of shape (N, 1 or 3, side, side); none is read before it is asked for.

    They have three channels if any of them does; grey ones are expanded when they are read.
    """

    def __init__(self, data: datasets.Dataset, side: int, rows: np.ndarray, channels: int) -> None:
        self._data, self._side, self._rows, self._channels = data, side, rows, channels

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self._rows), self._channels, self._side, self._side

    def __getitem__(self, rows: list[int]) -> np.ndarray:
        column = self._data.data.column("pixels")
        images = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)
        for image, row in zip(images, self._rows[rows].tolist(), strict=True):
            image[:] = np.frombuffer(column[row].as_buffer(), dtype=np.uint8).reshape(-1, self._side, self._side)
        return images

    def select(self, rows: np.ndarray) -> "PreparedImages":
        return PreparedImages(self._data, self._side, self._rows[rows], self._channels)

    def problems(self) -> list[str | None]:
        """Why each image can't be read, None where it can."""
        return self._facts("problem")

    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of each image before it was fitted; of readable images alone."""
        return list(zip(self._facts("width"), self._facts("height"), strict=True))

    def colours(self) -> np.ndarray:
        """Which images have colours, bool (N,)."""
        return _colours(self._data, self._side)[self._rows]

    def pixel_hashes(self) -> list[bytes | None]:
        """The pixel_hash of each image, None where it can't be read."""
        return self._facts("pixel_hash")

    def headers(self) -> list[dict[str, str]]:
        """What each file says of its image, see Opened."""
        return [json.loads(header or "{}") for header in self._facts("header")]

    def _facts(self, column: str) -> list[Any]:
        return self._data.data.column(column).take(pa.array(self._rows)).to_pylist()


def _colours(data: datasets.Dataset, side: int) -> np.ndarray:
    lengths = pc.binary_length(data.data.column("pixels"))
    return pc.equal(lengths, 3 * side * side).fill_null(False).to_numpy()


def prepared_data(
    catalogue: Catalogue, form: Form, *, prepared_dir: Path, image_size: int, workers: int, allow_missing: bool
) -> ImageData:
    """Prepare the images of a catalogue, or find them prepared, and part them as the catalogue does.

    Args:
        form: what is prepared of each image.
        prepared_dir: the folder of all prepared images.
        image_size: side of what the model sees of a square.
        workers: processes that decode; 0: this one.
        allow_missing: go on without images that are missing or can't be read.
    """
    check_parts(catalogue)
    images = prepare(catalogue.images, form, prepared_folder(prepared_dir, catalogue, form), workers)
    return as_image_data(without_unreadable(catalogue, images, allow_missing), images, form, image_size)


def prepared_folder(prepared_dir: Path, catalogue: Catalogue, form: Form) -> Path:
    """Where the images of a catalogue are prepared."""
    return prepared_dir / f"{catalogue.name}-{form.side}px"


def without_unreadable(catalogue: Catalogue, images: PreparedImages, allow_missing: bool) -> Catalogue:
    """The catalogue with what can't be read left out of its parts, where that is allowed."""
    problems = {row: problem for row, problem in enumerate(images.problems()) if problem is not None}
    told = [f"{catalogue.cases[row]} {problem}" for row, problem in problems.items()]
    check_complete(told, len(catalogue.cases), "can't be used", allow_missing)
    split = catalogue.split.copy()
    split[list(problems)] = LEFT_OUT
    return replace(catalogue, split=split, description={**catalogue.description, "left_out": told})


def as_image_data(catalogue: Catalogue, images: PreparedImages, form: Form, image_size: int) -> ImageData:
    """The parts of a catalogue with their prepared images."""
    check_parts(catalogue)
    rows = {part: catalogue.rows(part) for part in PARTS}
    splits = {part: _split(catalogue, images, found) for part, found in rows.items()}
    return ImageData(
        catalogue.name,
        catalogue.task,
        **splits,
        image_size=image_size,
        files={**catalogue.files, "cases": catalogue.checksum(np.concatenate(list(rows.values())).tolist())},
        description={
            **catalogue.description,
            "prepare_size": form.side,
            "image_size": image_size,
            "splits": {part: _counts(catalogue, split) for part, split in splits.items()},
        },
    )


def check_parts(catalogue: Catalogue) -> None:
    """Refuse a catalogue with an empty part."""
    for part in PARTS:
        if not len(catalogue.rows(part)):
            raise InputError(f"{catalogue.name} has no image in its {part} split: all of {', '.join(PARTS)} are needed")


def _split(catalogue: Catalogue, images: PreparedImages, rows: np.ndarray) -> Split:
    return Split(
        images=images.select(rows),
        labels=catalogue.labels[rows],
        cases=[catalogue.cases[row] for row in rows],
        patients=catalogue.patients and [catalogue.patients[row] for row in rows],
        subgroups={name: [values[row] for row in rows] for name, values in catalogue.subgroups.items()},
        pixel_hashes=images.select(rows).pixel_hashes(),
    )


def _counts(catalogue: Catalogue, split: Split) -> dict[str, Any]:
    """Images, patients where they are known, and cases per class or label, of a multi-label task also those of none."""
    task, labels = catalogue.task, split.labels
    found = labels.sum(axis=0) if task.multi_label else np.bincount(labels, minlength=len(task.classes))
    counts = dict(zip(task.classes, found.tolist(), strict=True))
    if task.multi_label:
        counts["none"] = int((labels.sum(axis=1) == 0).sum())
    patients = None if split.patients is None else len(set(split.patients))
    return {"images": len(split), "patients": patients, "labels": counts}


def prepare(source: EncodedImages, form: Form, folder: Path, workers: int) -> PreparedImages:
    """Decode and fit the images that the folder doesn't hold yet, and open them all.

    Args:
        workers: processes that decode; 0: this one.
    """
    files = _files(source, form, folder)
    if not all(map(Path.exists, files)):
        with _storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with _lock_of(folder):
                # Looked for again, because the one that had the lock may have written them all.
                absent = {path: rows for path, rows in files.items() if not path.exists()}
                if absent:
                    _write(absent, source, form, workers)
    data = datasets.concatenate_datasets([_open(*file) for file in files.items()])
    channels = 3 if _colours(data, form.side).any() else 1
    return PreparedImages(data, form.side, np.arange(len(data)), channels)


def _files(source: EncodedImages, form: Form, folder: Path) -> dict[Path, range]:
    """The files that the source becomes, and their rows."""
    files = {}
    for start in range(0, len(source), SHARD):
        rows = range(start, min(start + SHARD, len(source)))
        made_from = "\n".join([str(form), *map(source.key, rows)])
        digest = hashlib.sha256(made_from.encode()).hexdigest()
        files[folder / f"{start // SHARD:05d}-{digest[:20]}.arrow"] = rows
    return files


class _Passing(str):
    """Why a file could not be read now; it may well be read the next time, so that this is never written down."""


class _Squares(Dataset):
    """The prepared images, for a loader's worker processes: squares, or why there is none."""

    def __init__(self, source: EncodedImages, form: Form) -> None:
        self.source, self.form = source, form

    def __getitem__(self, row: int) -> Square | str:
        try:
            encoded = self.source.read(row)
            return "is missing" if encoded is None else make_square(encoded, self.form)
        except OSError as error:
            return _Passing(error)
        except Unreadable as problem:
            return str(problem)


def _end_with_parent(worker: int) -> None:
    """End this worker when its parent is killed; left to itself it waits for ever for someone to read its batches."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write(files: dict[Path, range], source: EncodedImages, form: Form, workers: int) -> None:
    """Write the files one after the other, from batches that the workers decode in order."""
    batches = [rows[start : start + _BATCH] for rows in files.values() for start in range(0, len(rows), _BATCH)]
    squares = _Squares(source, form)
    loading = {"num_workers": workers, "collate_fn": list, "worker_init_fn": _end_with_parent}
    decoded = iter(DataLoader(squares, batch_sampler=batches, **loading))
    count = sum(map(len, files.values()))
    print(f"Preparing {count:,} images of {form.side} x {form.side} in {next(iter(files)).parent}", file=sys.stderr)
    with tqdm(total=count, unit=" images", disable=None) as bar:
        for path, rows in files.items():
            with _whole_file(path) as file, pa.ipc.new_stream(file, FEATURES.arrow_schema) as stream:
                for _ in range(0, len(rows), _BATCH):
                    rows_of_batch = [_as_row(square) for square in next(decoded)]
                    stream.write_batch(pa.RecordBatch.from_pylist(rows_of_batch, schema=FEATURES.arrow_schema))
                    bar.update(len(rows_of_batch))


def _as_row(square: Square | str) -> dict[str, Any]:
    if isinstance(square, _Passing):
        raise InputError(f"an image can't be read now ({square}): mend that and give the same command again")
    if isinstance(square, str):
        return {"problem": square}
    return square._asdict() | {"header": json.dumps(square.header)}


def _open(path: Path, rows: range) -> datasets.Dataset:
    try:
        data = datasets.Dataset.from_file(str(path))
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{path} is damaged ({error}): delete it and give the same command again") from error
    if len(data) != len(rows):
        raise InputError(f"{path} holds {len(data)} of {len(rows)} images: delete it and give the same command again")
    return data


@contextmanager
def _lock_of(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if is_main_process():
            print(f"Waiting for another process that prepares images in {folder}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _whole_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file that appears under its name when it is whole, or not at all."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            yield file
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"prepared images can't be written to {folder} ({error}): make room or choose another --prepared-dir, and "
            "give the same command again, which goes on where it stopped"
        ) from error
