"""Images decoded and resized once, in Arrow files that training reads by memory map.

The prepared images lie in files of `SHARD` rows. Each is named by a hash of what it was made from, written beside its
place and renamed. So preparing goes on where it was killed, a changed source image makes one file anew, and what is
there can be trusted. Processes that prepare the same folder wait for one another by a file lock, which the system
releases when its holder dies.
"""

import hashlib
import io
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..errors import InputError, is_main_process
from ..files import PARTIAL, flush
from .catalogue import PARTS, Catalogue, EncodedImages, check_complete
from .images import ImageData, Split

SHARD = 512
FEATURES = datasets.Features({"image": datasets.Value("binary")})
_BATCH = 64
_FORM = "grey, PIL bilinear, 1"
_MODES_OF_8_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}


class PreparedImages:
    """Grey squares in a fixed order, uint8 of shape (N, 1, side, side); none is read before it is asked for."""

    def __init__(self, data: datasets.Dataset, side: int, rows: np.ndarray | None = None) -> None:
        self._data, self._side = data, side
        self._rows = np.arange(len(data)) if rows is None else rows

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self._rows), 1, self._side, self._side

    def __getitem__(self, rows: list[int]) -> np.ndarray:
        column = self._data.data.column("image")
        images = np.empty((len(rows), self._side * self._side), dtype=np.uint8)
        for image, row in zip(images, self._rows[rows].tolist(), strict=True):
            image[:] = np.frombuffer(column[row].as_buffer(), dtype=np.uint8)
        return images.reshape(-1, *self.shape[1:])

    def select(self, rows: np.ndarray) -> "PreparedImages":
        return PreparedImages(self._data, self._side, self._rows[rows])

    def absent(self) -> np.ndarray:
        """Which rows hold no image, bool (N,), because there was none or it could not be read."""
        return self._data.data.column("image").is_null().to_numpy()[self._rows]


def prepared_data(
    catalogue: Catalogue, *, prepared_dir: Path, prepare_size: int, image_size: int, workers: int, allow_missing: bool
) -> ImageData:
    """Prepare the images of a catalogue, or find them prepared.

    Args:
        prepared_dir: the folder of all prepared images.
        prepare_size: side of the prepared squares.
        image_size: side of what the model sees of them.
        workers: processes that decode; 0: this one.
        allow_missing: go on without images that are missing or can't be read.
    """
    _check_parts(catalogue.name, {part: catalogue.rows(part) for part in PARTS})
    folder = prepared_dir / f"{catalogue.name}-{prepare_size}px"
    images = prepare(catalogue.images, prepare_size, folder, workers)
    absent = images.absent()
    left_out = [catalogue.cases[row] for row in np.flatnonzero(absent)]
    check_complete(left_out, len(catalogue.cases), "can't be read as 8-bit images", allow_missing)
    rows = {part: (found := catalogue.rows(part))[~absent[found]] for part in PARTS}
    _check_parts(catalogue.name, rows)
    splits = {part: _split(catalogue, images, found) for part, found in rows.items()}
    return ImageData(
        catalogue.name,
        catalogue.task,
        **splits,
        image_size=image_size,
        files={**catalogue.files, "cases": catalogue.checksum(np.concatenate(list(rows.values())).tolist())},
        description={
            **catalogue.description,
            "prepare_size": prepare_size,
            "image_size": image_size,
            "left_out": left_out,
            "splits": {part: _counts(catalogue, split) for part, split in splits.items()},
        },
    )


def _check_parts(name: str, rows: dict[str, np.ndarray]) -> None:
    for part, found in rows.items():
        if not len(found):
            raise InputError(f"{name} has no image in its {part} split: all of {', '.join(rows)} are needed")


def _split(catalogue: Catalogue, images: PreparedImages, rows: np.ndarray) -> Split:
    return Split(
        images=images.select(rows),
        labels=catalogue.labels[rows],
        cases=[catalogue.cases[row] for row in rows],
        patients=catalogue.patients and [catalogue.patients[row] for row in rows],
        subgroups={name: [values[row] for row in rows] for name, values in catalogue.subgroups.items()},
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


def prepare(source: EncodedImages, side: int, folder: Path, workers: int) -> PreparedImages:
    """Decode and resize the images that the folder doesn't hold yet, and open them all.

    Args:
        side: of the squares, in pixels.
        workers: processes that decode; 0: this one.
    """
    files = _files(source, side, folder)
    if not all(map(Path.exists, files)):
        with _storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with _lock_of(folder):
                # Looked for again, because the one that had the lock may have written them all.
                absent = {path: rows for path, rows in files.items() if not path.exists()}
                if absent:
                    _write(absent, source, side, workers)
    return PreparedImages(datasets.concatenate_datasets([_open(*file) for file in files.items()]), side)


def grey_square(encoded: bytes, side: int) -> bytes | None:
    """The pixels of an image file as one 8-bit channel, resized by PIL; None when they can't be read as such.

    Alpha is dropped. Images of 16 bits are refused, because PIL would clip them.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.mode in _MODES_OF_8_BITS:
                return image.convert("L").resize((side, side), Image.Resampling.BILINEAR).tobytes()
    except Exception:  # whatever PIL's decoders raise on a damaged file
        pass
    return None


def _files(source: EncodedImages, side: int, folder: Path) -> dict[Path, range]:
    """The files that the source becomes, and their rows."""
    files = {}
    for start in range(0, len(source), SHARD):
        rows = range(start, min(start + SHARD, len(source)))
        made_from = "\n".join([_FORM, str(side), *map(source.key, rows)])
        digest = hashlib.sha256(made_from.encode()).hexdigest()
        files[folder / f"{start // SHARD:05d}-{digest[:20]}.arrow"] = rows
    return files


class _GreySquares(Dataset):
    """The decoded images, for a loader's worker processes."""

    def __init__(self, source: EncodedImages, side: int) -> None:
        self.source, self.side = source, side

    def __getitem__(self, row: int) -> bytes | None:
        encoded = self.source.read(row)
        return None if encoded is None else grey_square(encoded, self.side)


def _end_with_parent(worker: int) -> None:
    """End this worker when its parent is killed; left to itself it waits for ever for someone to read its batches."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write(files: dict[Path, range], source: EncodedImages, side: int, workers: int) -> None:
    """Write the files one after the other, from batches that the workers decode in order."""
    batches = [rows[start : start + _BATCH] for rows in files.values() for start in range(0, len(rows), _BATCH)]
    squares = _GreySquares(source, side)
    loading = {"num_workers": workers, "collate_fn": list, "worker_init_fn": _end_with_parent}
    decoded = iter(DataLoader(squares, batch_sampler=batches, **loading))
    count = sum(map(len, files.values()))
    print(f"Preparing {count:,} images of {side} x {side} in {next(iter(files)).parent}", file=sys.stderr)
    with tqdm(total=count, unit=" images", disable=None) as bar:
        for path, rows in files.items():
            with _whole_file(path) as file, pa.ipc.new_stream(file, FEATURES.arrow_schema) as stream:
                for _ in range(0, len(rows), _BATCH):
                    images = pa.array(next(decoded), pa.binary())
                    stream.write_batch(pa.record_batch([images], schema=FEATURES.arrow_schema))
                    bar.update(len(images))


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
