"""Sphinx: the pages of this folder, and the reference from the docstrings."""

project = "pyro_vae"
author = "The pyro_vae maintainers"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Shape", "notes_style"), ("Sites", "notes_style")]
html_theme = "furo"
html_title = "pyro_vae"
html_extra_path = ["pages"]
