"""ChestX-ray14 as a parquet data set, on the Hugging Face hub or in a folder."""

import datasets
import numpy as np

from ..data.catalogue import Catalogue
from ..errors import InputError
from .hub import HubImages, cases_of, load_hub
from .nih_labels import NAME, TASK, label_row

_COLUMNS = ["image", "patient_id", "labels"]


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
    data = datasets.concatenate_datasets([splits[part].select_columns(_COLUMNS) for part in parts])
    data = data.cast_column("image", datasets.Image(decode=False))
    return Catalogue(
        name=NAME,
        task=TASK,
        cases=cases_of(data, "image"),
        patients=[str(patient) for patient in data["patient_id"]],
        labels=_labels(data, name),
        split=np.repeat(["train"] * (len(parts) - 1) + ["test"], [len(splits[part]) for part in parts]),
        images=HubImages(data, "image", f"{name} {version}"),
        files={name: version},
        description={"hub": name, "revision": version},
    )


def _labels(data: datasets.Dataset, name: str) -> np.ndarray:
    feature = data.features["labels"].feature
    as_text = feature.int2str if isinstance(feature, datasets.ClassLabel) else str
    rows = [
        label_row((as_text(label) for label in labels or ()), f"--hub {name}, row {row}")
        for row, labels in enumerate(data["labels"])
    ]
    return np.array(rows, dtype=np.int64)
