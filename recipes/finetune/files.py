"""Files that are whole or absent: each is written beside its place, flushed to the disk and renamed."""

import csv
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save

from .errors import InputError, first_line

PARTIAL = ".partial"


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the libraries raise on a full or unwritable disk into one sentence."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(
            f"{path} can't be written ({first_line(error)}): make room or mend the access, then go on with --resume "
            "from the last checkpoint, which is intact"
        ) from error


def regular_file(path: Path) -> os.stat_result | None:
    """The status of a file that can be read to its end, be it through a link; None for anything else, and for nothing.

    To open a pipe would wait for its other end, and a device may have no end.
    """
    try:
        status = path.stat()
    except (OSError, ValueError):  # nothing there, a link to nothing or to itself, or no name that a file can have
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def write_bytes(path: Path, content: bytes) -> None:
    with storage_errors(path):
        partial = _write_partial(path, content)
        os.replace(partial, path)
        flush(path.parent)


def write_new(path: Path, content: bytes) -> None:
    """Write a file that nobody has written yet; an InputError where it is there, be it since a moment ago."""
    with storage_errors(path):
        partial = _write_partial(path, content)
        try:
            os.link(partial, path)
        except FileExistsError:
            raise InputError(f"{path} was written by another launch meanwhile: choose another folder") from None
        except OSError:  # a file system without hard links
            path.touch(exist_ok=False)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        flush(path.parent)


def _write_partial(path: Path, content: bytes) -> Path:
    """Write the content beside the file's place, through no link that lies there, and flush it."""
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:
        file.write(content)
    flush(partial)
    return partial


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """JSON without NaN, which other readers refuse; floats read back exactly."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Rows of a table; None becomes an empty field and floats their shortest text that reads back exactly."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """A safetensors file without metadata, which timm loads."""
    write_bytes(path, save({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}))


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
