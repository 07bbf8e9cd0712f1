"""ChestX-ray14 as a source: its options, their check, and loading."""

from dataclasses import replace

from ..data.images import ImageData
from ..data.prepared import prepared_data
from ..data.splits import check_patients, hold_out
from ..data.squares import Form
from ..errors import InputError
from .nih_hub import read_nih_hub
from .nih_tree import read_nih_tree
from .options import ChestXrayOptions
from .preparing import check_preparing


def check_chestxray14(options: ChestXrayOptions) -> None:
    """Refuse options that contradict each other or are out of range."""
    if (options.data_dir is None) == (options.hub is None):
        raise InputError(
            "give either --data-dir, the folder of NIH's files, or --hub, a parquet data set such as "
            "timm/nih-chest-xray-14"
        )
    check_preparing(options)
    if not 0 < options.val_fraction < 1:
        raise InputError(f"--val-fraction must be between 0 and 1, not {options.val_fraction}")


def load_chestxray14(options: ChestXrayOptions) -> ImageData:
    """The official test list, and the other one split by patient, with the images prepared."""
    if options.hub is None:
        catalogue = read_nih_tree(options.data_dir, options.allow_missing)
    else:
        catalogue = read_nih_hub(options.hub, options.hub_revision)
    check_patients(catalogue)
    data = prepared_data(
        hold_out(catalogue, "val", options.val_fraction, options.split_seed),
        Form(options.side, grey=True),
        prepared_dir=options.prepared_in,
        image_size=options.image_size,
        workers=options.processes,
        allow_missing=options.allow_missing,
    )
    return replace(data, suite="chestmnist")  # the same radiographs
