"""The labels of ChestX-ray14."""

from collections.abc import Iterable

from ..data.tasks import Task
from ..errors import InputError

NAME = "chestxray14"
# In the order of the paper's table, spelt as in NIH's label file.
LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
NO_FINDING = "No Finding"
TASK = Task("multi-label", LABELS)
_SPELLINGS = {"Pleural Thickening": "Pleural_Thickening", "Infiltrate": "Infiltration"}


def label_row(names: Iterable[str], where: str) -> list[int]:
    """0 and 1 per label of LABELS, for the names that an image has; "No Finding" is none of them."""
    found = {_SPELLINGS.get(name, name) for name in names} - {NO_FINDING}
    unknown = found.difference(LABELS)
    if unknown:
        raise InputError(
            f"{where} has the label {sorted(unknown)[0]!r}: expected {NO_FINDING!r} or any of {', '.join(LABELS)}"
        )
    return [int(label in found) for label in LABELS]
