"""What the recipe for one's own images reports beyond the trial's own figures."""

from ..data.images import ImageData
from ..options import Options
from ..runs.finished import FinishedRun
from ..runs.sections import Section
from .subgroups import subgroup_section


def own_sections(run: FinishedRun, options: Options, data: ImageData) -> list[Section]:
    """How the images were understood, and the subgroups where they are known."""
    description = run.description
    left_out = description["left_out"]
    sentences = list(description["notices"])
    sentences += [f"{len(left_out):,} images could not be used"] if left_out else []
    images = Section("The images", "\n\n".join(f"{sentence}." for sentence in sentences))
    return [images, *([subgroup_section(run, data)] if data.test.subgroups else [])]
