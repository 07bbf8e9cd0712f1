"""Files of weights with code in them, as an attacker would write them: what runs it leaves a canary."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch


class WritesAFile:
    """Leaves a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.command = f"touch {canary}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def raw_pickle(content: object) -> bytes:
    return pickle.dumps(content)


def zip_of_torch(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def legacy_file_of_torch(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def plain_zip(content: object) -> bytes:
    """Pickled by hand into a zip, of which torch.load's own reader takes some."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights/data.pkl", pickle.dumps(content))
        archive.writestr("weights/version", "3")
    return file.getvalue()


FORMATS = [raw_pickle, zip_of_torch, legacy_file_of_torch, plain_zip]
