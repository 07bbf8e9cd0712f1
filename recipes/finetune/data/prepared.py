"""Images decoded and fitted into squares once, in Arrow files that training reads by memory map.

The prepared images lie in files of `SHARD` rows. Each is named by a hash of what it was made from, written beside its
place and renamed. So preparing goes on where it was killed, and a changed source image makes one file anew, for which
the images that are still the same are copied. Processes that prepare the same folder wait for one another by a file
lock, which the system releases when its holder dies.

A row has the image, or the decoder's reason for which there is none, with a checksum of it that is compared whenever
the row is read: pixels that a disk has spoiled would be trained on without a word.
"""

import copy
import hashlib
import json
import multiprocessing
import os
import sys
import threading
import zlib
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
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

from ..errors import InputError, first_line, is_main_process
from ..files import PARTIAL, flush
from .catalogue import LEFT_OUT, PARTS, Catalogue, EncodedImages, check_complete
from .images import ImageData, Split
from .opening import Unreadable
from .squares import Form, make_square

SHARD = 512
FEATURES = datasets.Features(
    {
        "image": datasets.Value("binary"),  # as the next four, of a Square; null where there is none
        "width": datasets.Value("int32"),
        "height": datasets.Value("int32"),
        "pixel_hash": datasets.Value("binary"),
        "header": datasets.Value("string"),  # as JSON
        "reason": datasets.Value("string"),  # why there is none
        "checksum": datasets.Value("uint32"),  # CRC-32 of the image or the reason
        "source": datasets.Value("binary"),  # SHA-256 of the image file, null where there was none
    }
)
_BATCH = 64


class PreparedImages:
    """Squares in a fixed order, uint8 of shape (N, 1 or 3, side, side); none is read before it is asked for.

    They have three channels if any of them does; grey ones are expanded when they are read.
    """

    def __init__(self, files: dict[Path, datasets.Dataset], side: int) -> None:
        self._paths, self._side = list(files), side
        self._data = datasets.concatenate_datasets(list(files.values())).data
        self._rows = np.arange(len(self._data))
        self._channels = 3 if self.colours().any() else 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self._rows), self._channels, self._side, self._side

    def __getitem__(self, rows: list[int]) -> np.ndarray:
        """Read these images.

        Raises:
            InputError: one of them is not as it was written.
        """
        images = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)
        for image, row in zip(images, self._rows[rows].tolist(), strict=True):
            content = self._content("image", row)
            image[:] = np.frombuffer(content, dtype=np.uint8).reshape(-1, self._side, self._side)
        return images

    def select(self, rows: np.ndarray) -> "PreparedImages":
        part = copy.copy(self)
        part._rows = self._rows[rows]
        return part

    def absent(self) -> dict[int, str]:
        """The rows that hold no image, each with the reason."""
        missing = np.flatnonzero(self._data.column("image").is_null().to_numpy()[self._rows]).tolist()
        return {row: bytes(self._content("reason", self._rows[row])).decode() for row in missing}

    def colours(self) -> np.ndarray:
        """Which images have colours, bool (N,)."""
        lengths = pc.binary_length(self._data.column("image"))
        return pc.equal(lengths, 3 * self._side**2).fill_null(False).to_numpy()[self._rows]

    def sizes(self) -> list[tuple[int | None, int | None]]:
        """Width and height of each image before it was fitted."""
        return list(zip(self._facts("width"), self._facts("height"), strict=True))

    def pixel_hashes(self) -> list[Any]:
        """What exact twins share, see Square."""
        return self._facts("pixel_hash")

    def headers(self) -> list[dict[str, str]]:
        """What each file says of its image, see Opened."""
        return [json.loads(header or "{}") for header in self._facts("header")]

    def made_from(self, digest: bytes, row: int) -> dict[str, Any] | None:
        """The row, if its image is whole, and was made from a file with this SHA-256."""
        if self._data.column("source")[row].as_py() != digest:
            return None
        try:
            self._content("image", row)
        except InputError:
            return None
        return {name: self._data.column(name)[row].as_py() for name in FEATURES}

    def _facts(self, column: str) -> list[Any]:
        return self._data.column(column).take(pa.array(self._rows)).to_pylist()

    def _content(self, column: str, row: int) -> memoryview:
        """The bytes of one cell, as they were written."""
        cell = self._data.column(column)[row]
        content = memoryview(cell.as_buffer() if cell.is_valid else b"")
        whole = cell.is_valid and (column != "image" or len(content) in (self._side**2, 3 * self._side**2))
        if not whole or zlib.crc32(content) != self._data.column("checksum")[row].as_py():
            raise _damage(self._paths[row // SHARD], "an image has another checksum")
        return content


def _damage(path: Path, reason: object) -> InputError:
    return InputError(f"{path} is damaged ({reason}): delete it and give the same command again")


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
    absent = images.absent()
    left_out = {catalogue.cases[row]: reason for row, reason in absent.items()}
    lacking = [f"{case} {reason}" for case, reason in left_out.items()]
    check_complete(lacking, len(catalogue.cases), "can't be used", allow_missing)
    split = catalogue.split.copy()
    split[list(absent)] = LEFT_OUT
    return replace(catalogue, split=split, description={**catalogue.description, "left_out": left_out})


def as_image_data(catalogue: Catalogue, images: PreparedImages, form: Form, image_size: int) -> ImageData:
    """The parts of a catalogue with their prepared images."""
    check_parts(catalogue)
    rows = {part: catalogue.rows(part) for part in PARTS}
    splits: dict[str, Any] = {part: split_of(catalogue, images, found) for part, found in rows.items()}
    return ImageData(
        catalogue.name,
        catalogue.task,
        **splits,
        image_size=image_size,
        files={
            **catalogue.files,
            "cases": catalogue.checksum(np.concatenate(list(rows.values())).tolist()),
            "pixels": hashlib.sha256(b"".join(hash_ for x in splits.values() for hash_ in x.pixel_hashes)).hexdigest(),
        },
        description={
            **catalogue.description,
            "prepare_size": form.side,
            "image_size": image_size,
        },
        form=form,
    )


def check_parts(catalogue: Catalogue) -> None:
    """Refuse a catalogue with an empty part."""
    for part in PARTS:
        if not len(catalogue.rows(part)):
            raise InputError(f"{catalogue.name} has no image in its {part} split: all of {', '.join(PARTS)} are needed")


def split_of(catalogue: Catalogue, images: PreparedImages, rows: np.ndarray) -> Split:
    """Some images of a catalogue, int64 (n,), with all that it says of them."""
    return Split(
        images=images.select(rows),
        labels=catalogue.labels[rows],
        cases=[catalogue.cases[row] for row in rows],
        patients=catalogue.patients and [catalogue.patients[row] for row in rows],
        subgroups={name: [values[row] for row in rows] for name, values in catalogue.subgroups.items()},
        pixel_hashes=images.select(rows).pixel_hashes(),
    )


def prepare(source: EncodedImages, form: Form, folder: Path, workers: int) -> PreparedImages:
    """Decode and fit the images that the folder doesn't hold yet, and open them all.

    Args:
        workers: processes that decode; 0: this one.
    """
    files = _files(source, form, folder)
    with _storage_errors(folder):
        if not all(map(Path.exists, files)):
            folder.mkdir(parents=True, exist_ok=True)
            with _lock_of(folder):
                # Looked for again, because the one that had the lock may have written them all.
                absent = {path: rows for path, rows in files.items() if not path.exists()}
                if absent:
                    _write(absent, source, form, workers)
                    _tell_of_others(folder, files)
    return PreparedImages({path: _open(path, rows, form) for path, rows in files.items()}, form.side)


def _files(source: EncodedImages, form: Form, folder: Path) -> dict[Path, range]:
    """The files that the source becomes, and their rows."""
    files = {}
    for start in range(0, len(source), SHARD):
        rows = range(start, min(start + SHARD, len(source)))
        made_from = "\n".join([str(form), *map(source.key, rows)])
        digest = hashlib.sha256(made_from.encode()).hexdigest()
        files[folder / f"{start // SHARD:05d}-{digest[:20]}.arrow"] = rows
    return files


class _Rows(Dataset[dict[str, Any]]):
    """Rows to write, made of the encoded images, for a loader's worker processes."""

    def __init__(self, source: EncodedImages, form: Form, earlier: dict[int, PreparedImages | None]) -> None:
        self.source, self.form, self.earlier = source, form, earlier

    def __getitem__(self, row: int) -> dict[str, Any]:
        try:
            encoded = self.source.read(row)
            if encoded is None:
                raise Unreadable("is not there")
        except Unreadable as error:
            return _row_without_image(str(error), None)
        except (OSError, MemoryError, pa.ArrowException) as error:
            raise self._passing(row, error) from error
        source = hashlib.sha256(encoded).digest()
        earlier = self.earlier.get(row // SHARD)
        if earlier and (found := earlier.made_from(source, row % SHARD)):
            return found
        try:
            square = make_square(encoded, self.form)
        except Unreadable as error:
            return _row_without_image(str(error), source)
        except MemoryError as error:
            raise self._passing(row, error) from error
        header = json.dumps(square.header)
        return {**square._asdict(), "header": header, "checksum": zlib.crc32(square.image), "source": source}

    def _passing(self, row: int, error: BaseException) -> InputError:
        return InputError(
            f"image {row + 1} of {len(self.source)} can't be read now ({first_line(error)}): mend that and give the "
            "same command again, which goes on where it stopped"
        )


def _row_without_image(reason: str, source: bytes | None) -> dict[str, Any]:
    return {"reason": reason, "checksum": zlib.crc32(reason.encode()), "source": source}


def _about(path: Path, form: Form) -> dict[bytes, bytes]:
    """What a file says of itself, in its schema's metadata."""
    return {b"form": str(form).encode(), b"name": path.name.encode()}


def _end_with_parent(worker: int) -> None:
    """End this worker when its parent is killed; left to itself it waits for ever for someone to read its batches."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write(files: dict[Path, range], source: EncodedImages, form: Form, workers: int) -> None:
    """Write the files one after the other, from batches that the workers decode in order."""
    batches = [rows[start : start + _BATCH] for rows in files.values() for start in range(0, len(rows), _BATCH)]
    earlier = {rows.start // SHARD: _earlier(path, rows, form) for path, rows in files.items()}
    rows_to_write = _Rows(source, form, earlier)
    loading: dict[str, Any] = {"num_workers": workers, "collate_fn": list, "worker_init_fn": _end_with_parent}
    decoded = iter(DataLoader(rows_to_write, batch_sampler=batches, **loading))  # type: ignore[arg-type]
    count = sum(map(len, files.values()))
    print(f"Preparing {count:,} images of {form.side} x {form.side} in {next(iter(files)).parent}", file=sys.stderr)
    with tqdm(total=count, unit=" images", disable=None) as bar:
        for path, rows in files.items():
            schema = FEATURES.arrow_schema.with_metadata(FEATURES.arrow_schema.metadata | _about(path, form))
            with _whole_file(path) as file, pa.ipc.new_stream(file, schema) as stream:
                for _ in range(0, len(rows), _BATCH):
                    images = next(decoded)
                    stream.write_batch(pa.RecordBatch.from_pylist(images, schema))
                    bar.update(len(images))


def _earlier(path: Path, rows: range, form: Form) -> PreparedImages | None:
    """What was prepared in this place before some source image changed, if it can be used."""
    for earlier in path.parent.glob(f"{path.name[:6]}*.arrow"):
        with suppress(InputError):
            return PreparedImages({earlier: _open(earlier, rows, form)}, form.side)
    return None


def _tell_of_others(folder: Path, files: Container[Path]) -> None:
    """Say what earlier preparations have left; other data may use it."""
    others = [path for path in folder.glob("*.arrow") if path not in files]
    if others and is_main_process():
        size = sum(path.stat().st_size for path in others) / 1e9
        print(
            f"{len(others):,} files in {folder}, {size:.1f} GB, are of earlier preparations or of other data: delete "
            "those that nothing uses",
            file=sys.stderr,
        )


def _open(path: Path, rows: range, form: Form) -> datasets.Dataset:
    try:
        with pa.memory_map(str(path)) as file:
            schema = pa.ipc.open_stream(file).schema
        data = datasets.Dataset.from_file(str(path))
        data.data.validate(full=True)  # that no cell reaches out of the file
    except Exception as error:  # whatever Arrow and the datasets library raise on a damaged file
        raise _damage(path, first_line(error)) from error
    if not schema.equals(FEATURES.arrow_schema) or not _about(path, form).items() <= (schema.metadata or {}).items():
        raise _damage(path, "it was written under another name or in another form")
    if len(data) != len(rows):
        raise _damage(path, f"it holds {len(data)} of {len(rows)} images")
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
