"""Data sets of the datasets library: on the Hugging Face hub, or a folder of parquet files."""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError

from ..data.opening import Unreadable, read_file
from ..errors import InputError, first_line
from ..files import regular_file
from .columns import Cell, Columns, Table, Understood, understand
from .listing import Listing, part_of


@dataclass(frozen=True)
class HubImages:
    """The images of a data set, encoded as they are in its files, or in those of a cache that it names."""

    data: datasets.Dataset
    column: str
    version: str

    def __len__(self) -> int:
        return len(self.data)

    def key(self, row: int) -> str:
        return f"{self.version} {row}"

    def read(self, row: int) -> bytes | None:
        image = self.data[row][self.column]
        if image is None or image["bytes"] is not None or image["path"] is None:
            return None if image is None else image["bytes"]
        if not _is_in_cache(image["path"]):  # whatever else it names, on this machine, is none of the data set's
            raise Unreadable("is a path in its parquet file, not an image: write the image itself into the file")
        return read_file(image["path"])


def _is_in_cache(path: str) -> bool:
    """Whether a file lies where the hub's client keeps what it has loaded."""
    config = datasets.config
    caches = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
    return any(os.path.realpath(path).startswith(os.path.join(os.path.realpath(cache), "")) for cache in caches)


def load_hub(name: str, revision: str) -> tuple[datasets.DatasetDict, str]:
    """The splits of a data set, and its commit, or of a folder what changes with its files.

    Args:
        name: owner/name on the hub, or a folder of parquet files.
        revision: branch, tag or commit on the hub; the commit that it stands for now is loaded.
    """
    local = Path(name).is_dir()
    try:
        version = _version_of_folder(Path(name)) if local else _commit(name, revision)
        return datasets.load_dataset(name, revision=None if local else version), version
    except InputError:
        raise
    except Exception as error:  # whatever the hub's client, the network or a reader of files raise
        raise InputError(
            f"--hub {name} can't be loaded ({first_line(error)}): give owner/name of a data set on the hub, with "
            "--hub-revision its commit where the hub can't be asked, or a folder of parquet files"
        ) from error


def read_hub(name: str, revision: str, columns: Columns) -> Listing:
    """Read a data set with a column of images and one or several of labels."""
    splits, version = load_hub(name, revision)
    if len(splits) == 1 and not Path(name).is_dir():
        splits = _split_by_folders(name, version) or splits
    parts = {split: part for split in splits if (part := part_of(split)) is not None}
    if len(splits) > 1 and len(parts) < len(splits):
        raise InputError(f"--hub {name} has the splits {', '.join(splits)}: expected train, validation and test")
    data = datasets.concatenate_datasets(list(splits.values()))
    pictures = [column for column, feature in data.features.items() if isinstance(feature, datasets.Image)]
    image: Any = columns.image or (pictures[0] if len(pictures) == 1 else None)
    if image not in pictures:
        raise InputError(
            f"--hub {name} has the columns {', '.join(data.column_names)}, of which {', '.join(pictures) or 'none'} "
            "hold images: name one of images by --image-column"
        )
    data = data.cast_column(image, datasets.Image(decode=False))
    texts = {column: _cells(data, column, f"--hub {name}") for column in data.column_names if column not in pictures}
    table = Table(f"--hub {name}", {image: [], **{column: cells for column, cells in texts.items() if cells}})
    understood = understand(table, Columns(image, columns.labels, columns.patient, columns.split, columns.subgroups))
    given = [parts[split] for split, rows in splits.items() for _ in range(len(rows))] if len(splits) > 1 else None
    return Listing(
        cases=cases_of(data, image),
        images=HubImages(data.select_columns([image]), image, f"{name} {version}"),
        labels=understood.labels,
        multi_label=understood.multi_label,
        classes=_classes(data, understood),
        parts=understood.parts or given,
        patients=understood.patients,
        subgroups=understood.subgroups,
        files={name: version},
        description={"hub": name, "revision": version},
        notices=understood.notices,
    )


def cases_of(data: datasets.Dataset, column: str) -> list[str]:
    """The images' file names where they have unique ones, and else their rows."""
    paths = pc.struct_field(data.data.column(column), "path").to_pylist()
    cases = [Path(path or "").name for path in paths]
    return cases if all(cases) and len(set(cases)) == len(cases) else [str(row) for row in range(len(data))]


def _commit(name: str, revision: str) -> str:
    """The commit that a revision stands for; a commit is not looked up, so that a cached one loads without network."""
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    return HfApi().dataset_info(name, revision=revision).sha  # type: ignore[return-value]


def _version_of_folder(folder: Path) -> str:
    """What changes with a folder's files, in place of a commit."""
    lines: list[str] = []
    for path in sorted(folder.rglob("*.parquet")):
        status = regular_file(path)
        if status is None:
            raise InputError(f"{path} is no file that can be read: take it away")
        lines.append(f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}")
    if not lines:
        raise InputError(f"--hub {folder} holds no parquet file: give a folder of images by --data-dir")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _split_by_folders(name: str, version: str) -> datasets.DatasetDict | None:
    try:
        files = files_by_part(HfApi().list_repo_files(name, repo_type="dataset", revision=version))
    except (OSError, HfHubHTTPError):  # without network, as a cached data set is loaded
        return None
    return None if files is None else datasets.load_dataset(name, revision=version, data_files=files)


def files_by_part(files: Iterable[str]) -> dict[str, list[str]] | None:
    """What to load as which split, of files whose folders are called so in another case; None where none are.

    The library knows train/ and test/, and puts Training/ and Testing/ into one split without a word.
    """
    tops = {path.partition("/")[0] for path in files if "/" in path}
    parts = {top: part for top in tops if (part := part_of(top))}
    if all(top == top.lower() for top in parts) or len(set(parts.values())) < 2:
        return None
    return {part: [f"{top}/**" for top in sorted(tops) if parts.get(top) == part] for part in set(parts.values())}


def _cells(data: datasets.Dataset, column: str, name: str) -> list[Cell]:
    """A column as text, or of lists as tuples of text; nothing for columns of another kind.

    A null is an empty text, and in place of a list a tuple of it, which an empty list isn't.
    """
    feature = data.features[column]
    inner = feature.feature if isinstance(feature, datasets.List) else feature
    if not isinstance(inner, datasets.ClassLabel | datasets.Value):
        return []

    def as_text(value: Any) -> str:
        return "" if value is None else inner.int2str(value) if isinstance(inner, datasets.ClassLabel) else str(value)

    try:
        if inner is feature:
            return [as_text(value) for value in data[column]]
        return [("",) if values is None else tuple(map(as_text, values)) for values in data[column]]
    except ValueError as error:  # a number beyond the names, as -1 for what nobody has labelled
        raise InputError(
            f"{name}: the column {column} has values without a name ({first_line(error)}): leave out those rows"
        ) from error


def _classes(data: datasets.Dataset, understood: Understood) -> tuple[str, ...] | None:
    """The classes in the order of the label column's feature, without those that no image has."""
    if understood.classes is not None:
        return understood.classes
    feature = data.features[understood.label_columns[0]]
    inner = feature.feature if isinstance(feature, datasets.List) else feature
    if not isinstance(inner, datasets.ClassLabel):
        return None
    found = {name for names in understood.labels for name in names}
    return tuple(name for name in inner.names if name in found)
