"""The templates of pages and model cards."""

from pathlib import Path

import jinja2

from .style import plain_text

_TEMPLATES = Path(__file__).with_name("templates")


def template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=name.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["plain"] = plain_text
    return environment.get_template(name)
