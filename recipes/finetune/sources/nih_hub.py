"""ChestX-ray14 as a parquet data set, on the Hugging Face hub or in a folder."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
from huggingface_hub import HfApi

from ..data.catalogue import Catalogue
from ..errors import InputError, first_line
from ..files import regular_file
from .nih_labels import NAME, NO_FINDING, TASK, label_row

_COLUMNS = ["image", "patient_id", "labels"]
_KINDS = "images, patients and lists of labels"


@dataclass(frozen=True)
class HubImages:
    """The images of a data set, encoded as they are in its files."""

    data: datasets.Dataset
    version: str

    def __len__(self) -> int:
        return len(self.data)

    def key(self, row: int) -> str:
        return f"{self.version} {row}"

    def read(self, row: int) -> bytes | None:
        image = self.data[row]["image"]
        return None if image is None else image["bytes"]


def read_nih_hub(name: str, revision: str) -> Catalogue:
    """Load a data set with the columns image, patient_id and labels (a list of names per image).

    Its split "test" is the official test list, and all others together are the rest.

    Args:
        name: owner/name on the hub, or a folder of parquet files.
        revision: branch, tag or commit on the hub; the commit that it stands for now is loaded and recorded.
    """
    local = Path(name).is_dir()
    try:
        version = _version_of_folder(Path(name)) if local else _commit(name, revision)
        splits = datasets.load_dataset(name, revision=None if local else version)
    except InputError:
        raise
    except Exception as error:  # whatever the hub's client, the network or a reader of files raise
        raise InputError(
            f"--hub {name} can't be loaded ({first_line(error)}): give owner/name of a data set on the hub, with "
            "--hub-revision its commit where the hub can't be asked, or a folder of parquet files"
        ) from error
    if "test" not in splits or len(splits) < 2:
        raise InputError(f"--hub {name} has the splits {', '.join(splits)}: expected test and at least one other")
    for column in _COLUMNS:
        if any(column not in split.column_names for split in splits.values()):
            raise InputError(f"--hub {name} has no column {column!r}: expected {', '.join(_COLUMNS)}")
    parts = [*sorted(set(splits) - {"test"}), "test"]
    try:
        data = datasets.concatenate_datasets([splits[part].select_columns(_COLUMNS) for part in parts])
        data = data.cast_column("image", datasets.Image(decode=False))
    except Exception as error:  # whatever the datasets library raises on columns that don't go together
        raise InputError(f"--hub {name} has columns of other kinds than {_KINDS} ({first_line(error)})") from error
    return Catalogue(
        name=NAME,
        task=TASK,
        cases=_cases(data),
        patients=_patients(data, name),
        labels=_labels(data, name),
        split=np.repeat(["train"] * (len(parts) - 1) + ["test"], [len(splits[part]) for part in parts]),
        images=HubImages(data, f"{name} {version}"),
        files={name: version},
        description={"hub": name, "revision": version},
    )


def _commit(name: str, revision: str) -> str:
    """The commit that a revision stands for; a commit is not looked up, so that a cached one loads without network."""
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    return HfApi().dataset_info(name, revision=revision).sha


def _version_of_folder(folder: Path) -> str:
    """What changes with a folder's files, in place of a commit."""
    files = [(path, regular_file(path)) for path in sorted(folder.rglob("*.parquet"))]
    for path, status in files:
        if status is None:
            raise InputError(f"{path} is no file that can be read: take it away")
    lines = [f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}" for path, status in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _cases(data: datasets.Dataset) -> list[str]:
    """The images' file names where they have unique ones, and else their rows."""
    paths = pc.struct_field(data.data.column("image"), "path").to_pylist()
    cases = [Path(path or "").name for path in paths]
    return cases if all(cases) and len(set(cases)) == len(cases) else [str(row) for row in range(len(data))]


def _patients(data: datasets.Dataset, name: str) -> list[str]:
    patients = ["" if patient is None else str(patient) for patient in data["patient_id"]]
    if "" in patients:
        raise InputError(f"--hub {name}, row {patients.index('')} has no patient: expected one in every row")
    return patients


def _labels(data: datasets.Dataset, name: str) -> np.ndarray:
    feature = getattr(data.features["labels"], "feature", None)
    if not isinstance(feature, datasets.ClassLabel) and feature != datasets.Value("string"):
        raise InputError(f"--hub {name} has labels of the kind {data.features['labels']}: expected lists of names")
    as_text = feature.int2str if isinstance(feature, datasets.ClassLabel) else str
    rows = []
    for row, labels in enumerate(data["labels"]):
        where = f"--hub {name}, row {row}"
        if labels is None or None in labels:
            raise InputError(f"{where} has no labels: expected {NO_FINDING!r} where nothing was found")
        try:
            names = [as_text(label) for label in labels]
        except ValueError as error:  # a number beyond the names
            raise InputError(f"{where} has unknown labels ({first_line(error)})") from error
        rows.append(label_row(names, where))
    return np.array(rows, dtype=np.int64)
