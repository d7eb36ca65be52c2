"""Runs the Python code of README.md and docs/; seeds every test and docstring example."""

import os

import pyro
import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

from pyro_vae._capture import captured

# Tests use small tensors, and several processes may run them: one thread each, and one for each
# program that a test starts.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# On a busy machine, short runs take longer, and ``capture="auto"`` would compile them. That takes
# seconds and saves none.
captured.SECONDS_THAT_REPAY_COMPILING = float("inf")

collect_ignore = ["docs/conf.py", "docs/_extensions"]  # of Sphinx, which may not be installed

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/coming-from/*.md"],
    fixtures=["_fresh"],
).pytest()


@pytest.fixture(autouse=True)
def _fresh():
    """Start from the same seed, with an empty global parameter store and checks of values on.

    ``torch.compile`` switches the checks of distributions off for the whole process.
    """
    pyro.clear_param_store()
    pyro.enable_validation(True)
    torch.default_generator.manual_seed(20261122)  # torch.manual_seed takes a millisecond
