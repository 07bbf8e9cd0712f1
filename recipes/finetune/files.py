"""Files that are whole or absent: each is written beside its place, flushed to the disk and renamed."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save

from .errors import InputError

PARTIAL = ".partial"


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the libraries raise on a full or unwritable disk into one sentence."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path} can't be written ({reason}): make room or mend the access, then go on with --resume from the last "
            "checkpoint, which is intact"
        ) from error


def write_bytes(path: Path, content: bytes) -> None:
    with storage_errors(path):
        partial = path.with_name(path.name + PARTIAL)
        partial.write_bytes(content)
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)


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
