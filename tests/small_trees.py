"""Small trees in the form in which NIH distributes ChestX-ray14, with its quirks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

# With the commas within the brackets, and one at the end, as in NIH's first label file.
HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)
FINDINGS = ("No Finding", "Mass", "Hernia|Pleural_Thickening", "Atelectasis|Effusion|Mass", "Infiltration")


def case_names(patients: int, per_patient: int = 2) -> list[str]:
    return [f"{patient:08d}_{k:03d}.png" for patient in range(1, patients + 1) for k in range(per_patient)]


def write_labels(folder: Path, cases: Sequence[str], name: str = "Data_Entry_2017.csv") -> None:
    rows = [
        f"{case},{FINDINGS[k % len(FINDINGS)]},{case[9:12]},{int(case[:8])},058,M,PA,2682,2749,0.143,0.143,"
        for k, case in enumerate(cases)
    ]
    (folder / name).write_text("\n".join([HEADER, *rows, ""]))


def write_boxes(folder: Path, rows: Sequence[str]) -> None:
    """Rows of image, disease, x, y, width and height under NIH's header, which splits and ends in commas."""
    (folder / "BBox_List_2017.csv").write_text("\n".join(["Image Index,Finding Label,Bbox [x,y,w,h],,,", *rows, ""]))


def write_lists(folder: Path, train_val: Sequence[str], test: Sequence[str]) -> None:
    (folder / "train_val_list.txt").write_text("\n".join(train_val))
    (folder / "test_list.txt").write_bytes("\r\n".join(test).encode())


def make_tree(folder: Path, patients: int = 30, side: int = 24) -> Path:
    """Two random images per patient, the last third of the patients in the test list."""
    cases = case_names(patients)
    rng = np.random.default_rng(0)
    for k, case in enumerate(cases):
        place = folder / f"images_{1 + 2 * k // len(cases):03d}" / "images"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8)).save(place / case)
    write_labels(folder, cases)
    first_test = patients // 3 * 2 * 2
    write_lists(folder, cases[:first_test], cases[first_test:])
    return folder


def image_path(tree: Path, case: str) -> Path:
    return next(tree.glob(f"images*/images/{case}"), tree / "images" / case)
