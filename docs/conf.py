"""How Sphinx builds the site from these pages: ``make docs``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # option_pages
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from option_pages import write_option_pages

from inmerge_optim import __version__

project = "inmerge_optim"
author = copyright = "The inmerge_optim developers"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"inmerge_optim {version}"
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
nitpicky = False  # torch's own types are not documented here

write_option_pages(Path(__file__).parent / "reference" / "options.md")
