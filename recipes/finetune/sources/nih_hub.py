"""ChestX-ray14 as a parquet data set, on the Hugging Face hub or in a folder."""

import datasets
import numpy as np

from ..data.catalogue import Catalogue
from ..errors import InputError, first_line
from .hub import HubImages, cases_of, load_hub
from .nih_labels import NAME, NO_FINDING, TASK, label_row

_COLUMNS = ["image", "patient_id", "labels"]
_KINDS = "images, patients and lists of labels"


def read_nih_hub(name: str, revision: str) -> Catalogue:
    """Load a data set with the columns image, patient_id and labels (a list of names per image).

    Its split "test" is the official test list, and all others together are the rest.

    Args:
        name: owner/name on the hub, or a folder of parquet files.
        revision: branch, tag or commit on the hub; the commit that it stands for now is loaded and recorded.
    """
    splits, version = load_hub(name, revision)
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
        cases=cases_of(data, "image"),
        patients=_patients(data, name),
        labels=_labels(data, name),
        split=np.repeat(["train"] * (len(parts) - 1) + ["test"], [len(splits[part]) for part in parts]),
        images=HubImages(data, "image", f"{name} {version}"),
        files={name: version},
        description={"hub": name, "revision": version},
    )


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
