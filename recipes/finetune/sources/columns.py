"""What the columns of a table of images say: labels, patients, splits and subgroups."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import InputError, near_names
from .ages import age_band
from .listing import part_of, says_nothing

# How columns are called, without spaces, underscores and case, in the order in which they are looked for.
_IMAGE_NAMES = ("image", "imagepath", "path", "filepath", "filename", "file", "imageindex", "imageid", "imagename")
_LABEL_NAMES = (
    "label",
    "labels",
    "class",
    "target",
    "diagnosis",
    "findinglabels",
    "finding",
    "findings",
    "category",
    "dx",
)
_PATIENT_NAMES = ("patient", "patientid", "subject", "subjectid", "participant", "participantid")
_SPLIT_NAMES = ("split", "set", "subset", "partition")
_SUBGROUP_NAMES = {
    "view": ("view", "viewposition"),
    "sex": ("sex", "gender", "patientsex", "patientgender"),
    "age": ("age", "patientage"),
}
_SEPARATORS = re.compile("[|;]")
_NUMBERS = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}

Cell = str | tuple[str, ...]


@dataclass(frozen=True)
class Columns:
    """Which columns say what, as the user names them; None or empty: those of a usual name, where there are."""

    image: str | None = None
    labels: tuple[str, ...] = ()
    patient: str | None = None
    split: str | None = None
    subgroups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Columns of text, one cell per image.

    Attributes:
        name: what the user knows it by, for messages.
        columns: cells as text; of labels also tuples of text.
        first_row: the number of the first row.
    """

    name: str
    columns: Mapping[str, Sequence[Cell]]
    first_row: int = 0

    def place(self, row: int) -> str:
        return f"{self.name}, row {row + self.first_row}"


@dataclass(frozen=True)
class Understood:
    """What a table says of its images, as a Listing has it, and in which columns it names and labels them."""

    image: str
    label_columns: list[str]
    labels: list[tuple[str, ...]]
    multi_label: bool
    classes: tuple[str, ...] | None
    parts: list[str] | None
    patients: list[str] | None
    subgroups: dict[str, list[str | None]]
    notices: list[str] = field(default_factory=list)


def understand(table: Table, columns: Columns) -> Understood:
    """Find the columns by the names that the user gives, or else by usual ones, and read them."""
    guessed: list[str] = []

    def choose(option: str, given: str | None, usual: Sequence[str]) -> str | None:
        if given is not None:
            return _given(table, option, given)
        found = _usual(table, usual)
        if found is not None:
            guessed.append(f"{found} ({option})")
        return found

    image = choose("--image-column", columns.image, _IMAGE_NAMES)
    if image is None:
        raise InputError(
            f"{table.name} has the columns {', '.join(table.columns)}: name that of paths by --image-column"
        )
    patient = choose("--patient-column", columns.patient, _PATIENT_NAMES)
    split = choose("--split-column", columns.split, _SPLIT_NAMES)
    subgroups = {name: _given(table, "--subgroup-columns", name) for name in columns.subgroups}
    if not subgroups:
        usual = {name: choose("--subgroup-columns", None, names) for name, names in _SUBGROUP_NAMES.items()}
        subgroups = {name: column for name, column in usual.items() if column is not None}
    labels = [_given(table, "--label-columns", name) for name in columns.labels]
    if not labels:
        named = choose("--label-columns", None, _LABEL_NAMES)
        labels = [named] if named else _columns_of_0_and_1(table, {image, patient, split, *subgroups.values()})
        guessed += [] if named else [f"{', '.join(labels)} (--label-columns)"]
    found, multi_label, classes, notices = _labels(table, labels)
    if guessed:
        notices.insert(0, f"Columns taken by their names: {', '.join(guessed)}")
    return Understood(
        image=image,
        label_columns=labels,
        labels=found,
        multi_label=multi_label,
        classes=classes,
        parts=None if split is None else _parts(table, split),
        patients=None if patient is None else filled_cells(table, patient),
        subgroups={
            name: [_subgroup(name, cell) for cell in _texts(table, column)] for name, column in subgroups.items()
        },
        notices=notices,
    )


def filled_cells(table: Table, column: str) -> list[str]:
    """The cells of a column none of which may be empty."""
    cells = _texts(table, column)
    for row, cell in enumerate(cells):
        if not cell:
            raise InputError(f"{table.place(row)}: the column {column} is empty, expected it to be filled in every row")
    return cells


def _texts(table: Table, column: str) -> list[str]:
    """The cells of a column that is none of labels."""
    cells: list[str] = []
    for row, cell in enumerate(table.columns[column]):
        if not isinstance(cell, str):
            raise InputError(
                f"{table.place(row)}: the column {column} has a list, expected one text: name another column"
            )
        cells.append(cell)
    return cells


def _given(table: Table, option: str, name: str) -> str:
    if name not in table.columns:
        hint = near_names(name, table.columns) or f": it has {', '.join(table.columns)}"
        raise InputError(f"{option} {name} is no column of {table.name}{hint}")
    return name


def _usual(table: Table, names: Sequence[str]) -> str | None:
    folded = {re.sub(r"[\s_-]", "", column).casefold(): column for column in table.columns}
    return next((folded[name] for name in names if name in folded), None)


def _columns_of_0_and_1(table: Table, others: set[str | None]) -> list[str]:
    found = [
        name
        for name, cells in table.columns.items()
        if name not in others and all(isinstance(cell, str) and cell.casefold() in _NUMBERS for cell in cells)
    ]
    if not found:
        raise InputError(
            f"{table.name} has the columns {', '.join(table.columns)}, none of them called label or all of 0 and 1: "
            "name those of labels by --label-columns"
        )
    return found


Labels = tuple[list[tuple[str, ...]], bool, tuple[str, ...] | None, list[str]]


def _labels(table: Table, columns: list[str]) -> Labels:
    """The labels of each image, whether they are several, their order where the columns give it, and notices."""
    if len(columns) > 1:
        return _labels_of_columns(table, columns)
    cells = table.columns[columns[0]]
    if not any(isinstance(cell, tuple) or _SEPARATORS.search(cell) for cell in cells):
        return [(cell,) for cell in filled_cells(table, columns[0])], False, None, []
    for row, cell in enumerate(cells):
        if isinstance(cell, tuple) and "" in cell:
            raise InputError(
                f"{table.place(row)}: the column {columns[0]} has a null or an empty name among its labels: expected "
                "an empty list where nothing was found"
            )
    labels = [cell if isinstance(cell, tuple) else tuple(map(str.strip, _SEPARATORS.split(cell))) for cell in cells]
    alone = {names[0] for names in labels if len(names) == 1} - {
        name for names in labels if len(names) > 1 for name in names
    }
    nothing = {name for name in alone if says_nothing(name)}
    notices = [f"{', '.join(map(repr, sorted(nothing)))} is taken for no label"] if nothing else []
    if "" in cells:
        notices.append(f"{cells.count(''):,} rows whose {columns[0]} is empty are taken for images without any label")
    return [tuple(name for name in names if name and name not in nothing) for names in labels], True, None, notices


def _labels_of_columns(table: Table, columns: list[str]) -> Labels:
    rows = []
    for row, cells in enumerate(zip(*(table.columns[name] for name in columns), strict=True)):
        for name, cell in zip(columns, cells, strict=True):
            if not isinstance(cell, str) or cell.casefold() not in _NUMBERS:
                raise InputError(f"{table.place(row)}: the column {name} has {cell!r}, expected 0 or 1")
        rows.append(tuple(name for name, cell in zip(columns, cells, strict=True) if _NUMBERS[cell.casefold()]))
    if all(len(names) == 1 for names in rows):
        return rows, False, tuple(columns), ["Each image has one of the labels, which are taken for classes"]
    return rows, True, tuple(columns), []


def _parts(table: Table, column: str) -> list[str]:
    parts: list[str] = []
    for row, cell in enumerate(_texts(table, column)):
        part = part_of(cell)
        if part is None:
            raise InputError(f"{table.place(row)}: the column {column} has {cell!r}, expected train, val or test")
        parts.append(part)
    return parts


def _subgroup(name: str, cell: str) -> str | None:
    return age_band(cell) if name == "age" else cell or None
