"""Sphinx: the pages of this folder, and the reference from the docstrings."""

import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "pyro_vae"
author = "The pyro_vae maintainers"
project_copyright = author
extensions = [
    "mathml",
    "myst_nb",  # the Markdown of myst-parser, and notebooks that are run
    "reference",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxext.opengraph",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
# Notebooks are Markdown in the format of jupytext. A build runs those whose text has changed since
# the last one, and fails where a cell fails. Delete the cache after a change of the library.
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parent / "_build" / "notebooks")
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove-warn"  # a page shows no warning of a cell: the build reports it
os.environ.setdefault("OMP_NUM_THREADS", "1")  # beside other work, two threads are far slower
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's, of kernels without widgets
ogp_social_cards = {"enable": False}
autodoc_inherit_docstrings = False  # torch's and Pyro's are in their own references
autodoc_preserve_defaults = True  # a class as written, such as Planar
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 50  # a phone's width, about
toc_object_entries_show_parents = "hide"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Shape", "notes_style"), ("Sites", "notes_style")]
intersphinx_mapping = {
    "python": ("https://docs.python.org/3/", None),
    "torch": ("https://docs.pytorch.org/docs/stable/", None),
    "pyro": ("https://docs.pyro.ai/en/stable/", None),
    "numpy": ("https://numpy.org/doc/stable/", None),
    "pandas": ("https://pandas.pydata.org/docs/", None),
    "arviz": ("https://python.arviz.org/en/stable/", None),
}
intersphinx_timeout = 10
html_math_renderer = "mathml"
html_theme = "furo"
html_title = "pyro_vae"
html_static_path = ["_static"]
html_css_files = ["reference.css", "side-by-side.css"]
html_extra_path = ["pages"]


def _without_internet(record):
    """Turn the warning that an inventory cannot be fetched into a message: a build needs none."""
    if "failed to reach any of the inventories" in record.getMessage():
        record.levelno, record.levelname = logging.INFO, "INFO"
    return True


logging.getLogger("sphinx.sphinx.ext.intersphinx").addFilter(_without_internet)
