"""Files of settings and results, read with care and written so that they are whole or absent.

Each is written beside its place, flushed to the disk and renamed. What is read may come from anyone.
"""

import csv
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError

from .errors import InputError, first_line

if TYPE_CHECKING:
    import torch

PARTIAL = ".partial"
GENERATOR = "inmerge_optim"  # what reports and pictures say that they were made by
LARGEST_YAML = 64 * 1024  # bytes, which take the parser half a second
_LARGEST_JSON = 256 * 1024**2
_FORMULAS = ("=", "+", "-", "@", "\t", "\r")
_DEEPEST_YAML = 8


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the libraries raise on a full or unwritable disk into one sentence."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(
            f"{path} can't be written ({reason}): make room or mend the access, then go on with --resume from the last "
            "checkpoint, which is intact"
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


class _Settings(yaml.SafeLoader):
    """Refuses an option that stands there twice, of which yaml takes the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} stands there twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of settings; an InputError where it is none.

    Neither aliases nor deep nesting are of use in settings, and either can make a small file a large task.
    """
    try:
        text = _text_of(path, LARGEST_YAML)
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > _DEEPEST_YAML:
                line = event.start_mark.line + 1  # type: ignore[union-attr]
                raise ValueError(f"line {line} has an alias, or nests too deep")
        content = yaml.load(text, _Settings)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} can't be read as YAML ({first_line(error)}), as a file of settings should") from error
    if content is not None and not isinstance(content, dict):
        raise InputError(f"{path} must hold `option: value` lines, not a {type(content).__name__}")
    return content or {}


def read_json(path: Path, kind: type = dict) -> Any:
    """Read a JSON file that holds an object, or another kind; an InputError where it does not."""
    try:
        content = json.loads(_text_of(path, _LARGEST_JSON))
        if not isinstance(content, kind):
            raise ValueError(f"it holds a {type(content).__name__}, not a {kind.__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} can't be read as JSON ({first_line(error)})") from error
    return content


def _text_of(path: Path, largest: int) -> str:
    status = regular_file(path)
    if status is None:
        raise ValueError("it is no file, or not there")
    if status.st_size > largest:
        raise ValueError(f"it has {status.st_size:,} bytes, more than {largest:,}")
    return path.read_text(encoding="utf-8")


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content with a checksum of all the rest, so that an edit or a spoiled disk can be told."""
    return {**content, "checksum": _checksum(content)}


def is_whole(content: dict[str, Any]) -> bool:
    """Whether sealed content is as it was written; what was never sealed is taken as it is."""
    rest = dict(content)
    return rest.pop("checksum", None) in (None, _checksum(rest))


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_links(folder: Path) -> None:
    """Refuse a folder that holds links out of it, or what is neither file nor folder: it may come from anyone."""
    root = folder.resolve()
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *files)):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
                raise InputError(f"{path} is a link out of {folder}: put there what it leads to")
            if not path.is_dir() and not regular_file(path):
                raise InputError(f"{path} is neither a file nor a folder: take it away")


def check_written_here(path: Path, mark: bytes = GENERATOR.encode()) -> None:
    """Refuse to write over a file that does not begin as this project writes it."""
    if not path.exists() and not path.is_symlink():
        return
    begin = b""
    if regular_file(path):
        with path.open("rb") as file:
            begin = file.read(1000)
    if mark not in begin:
        raise InputError(f"{path} is there, and not by {GENERATOR}: move it away, or choose another --output")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, in a folder that is made if need be."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """JSON without NaN, which other readers refuse; floats read back exactly."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Rows of a table; None becomes an empty field and floats their shortest text that reads back exactly.

    A text that a spreadsheet would run as a formula gets a quote before it.
    """
    lines: list[str] = []
    writer = csv.writer(SimpleNamespace(write=lines.append), lineterminator="\r\n")  # of which it quotes both in names
    for row in (header, *rows):
        writer.writerow([no_formula(cell) if isinstance(cell, str) else cell for cell in row])
    write_text(path, "".join(f"{line.removesuffix(writer.dialect.lineterminator)}\n" for line in lines))


def no_formula(text: str) -> str:
    """A text as a CSV has it, which a spreadsheet takes for nothing else."""
    return f"'{text}" if text.startswith(_FORMULAS) else text


def write_weights(path: Path, weights: "dict[str, torch.Tensor]") -> None:
    """A safetensors file without metadata, which timm loads."""
    from safetensors.torch import save  # and torch, which the command lines don't wait for

    write_bytes(path, save({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}))


def sha256_of(path: Path) -> str:
    """Of a file's content; an OSError where there is none."""
    if not regular_file(path):
        raise FileNotFoundError(f"{path.name} is no file, or not there")
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
