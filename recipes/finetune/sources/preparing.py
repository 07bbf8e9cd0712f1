"""What sources have in common whose images are files, prepared once."""

from ..errors import InputError
from .options import PreparedOptions


def check_preparing(options: PreparedOptions) -> None:
    """Refuse options that contradict each other or are out of range."""
    if options.hub_revision != "main" and options.hub is None:
        raise InputError("--hub-revision has no effect without --hub: leave it out")
    if options.prepare_size is not None and options.prepare_size < options.image_size:
        raise InputError(
            f"--prepare-size {options.prepare_size} is less than --image-size {options.image_size}: choose a larger one"
        )
    if options.prepare_workers is not None and options.prepare_workers < 0:
        raise InputError(f"--prepare-workers must be at least 0, not {options.prepare_workers}")
