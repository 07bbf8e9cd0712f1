"""config.yaml: what a run was begun with, below a line with the checksum of the rest.

A file that a disk has cut can still be YAML, of fewer options.
"""

import hashlib
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError
from ..files import LARGEST_YAML, read_yaml, write_new
from ..options import Options, as_plain
from .layout import CONFIG

_SEAL = b"# The settings of a run. The sha256 of the lines below is "


def write_config(run: Path, options: Options) -> None:
    """Write it once: by it this run, and no other, has the folder."""
    text = yaml.safe_dump(as_plain(options), sort_keys=False).encode()
    content = _SEAL + hashlib.sha256(text).hexdigest().encode() + b"\n" + text
    if len(content) > LARGEST_YAML:  # or the run could never be read
        raise InputError(f"the options take {len(content):,} bytes, more than {LARGEST_YAML:,}: give fewer or shorter")
    write_new(run / CONFIG, content)


def read_config(run: Path) -> dict[str, Any]:
    """The options as YAML knows them; an InputError where they are not as they were written.

    Those of inmerge_optim 0.1 have no checksum.
    """
    path = run / CONFIG
    settings = read_yaml(path)
    first, _, rest = path.read_bytes().partition(b"\n")
    sealed = first.startswith(_SEAL)
    if not settings or (sealed and first.removeprefix(_SEAL) != hashlib.sha256(rest).hexdigest().encode()):
        raise InputError(f"{path} is not as it was written (it was cut or edited): put it back")
    return settings
