"""Runs each line of the table in docs/common-tasks.md, in order, after the setup of the page."""

import re
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch

import pyro_vae as pv

PAGE = (Path(__file__).parent.parent / "docs" / "common-tasks.md").read_text()
SETUP = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
TASKS = re.findall(r"^\| ([^|]+?) \| .* \| `([^`]+)` \|$", PAGE.replace(r"\|", "¦"), re.MULTILINE)

# What a line gives, by the first words of its task: a condition on the variables of the page.
EXPECTED = {
    "Train on data with": "len(fit.history) == 2",
    "Stop early": "fit.best_epoch <= len(fit.history) <= 20",
    "Log each epoch": "len(fit.history) == 2",
    "Resume": "len(fit.history) == 2",
    "Plot": "len(figure.axes) == 1",
    "Latent representation": "codes.shape == (len(data.test), 5)",
    "Samples of": "draws.shape == (10, len(data.test), 5)",
    "Scatter": "len(figure.axes[0].get_legend().texts) >= 10",
    "Reconstruct": "means.shape == (8, 64)",
    "Decode": "means.shape == (8, 64)",
    "Generate": "new.shape == (16, 64)",
    "Fit a mixture": "pv.generate(better, 16).shape == (16, 64)",
    "Interpolate": "path.shape == (6, 4, 64)",
    "ELBO and": "-40 < log_evidence.mean < -15 and log_evidence.elbo < log_evidence.mean",
    "Fill in": "filled.isfinite().all()",
    "Read a table": "x.shape == (6, 4)",
    "Compare": "{entry.name for entry in table.entries} == {'N(0, I)', 'mixture'}",
    "Save and load": "pv.decode(saved.model, codes[:8]).equal(pv.decode(model, codes[:8]))",
    "Export": "program.module()(codes[:8])",
}


def test_lines_run_in_order():
    counts = torch.poisson(torch.full((6, 4), 2.0)).numpy()
    anndata = pytest.importorskip("anndata", reason="needs the extra anndata")
    names = {"adata": anndata.AnnData(counts, obs=pd.DataFrame(index=list("abcdef")))}
    names["adata"].layers["counts"] = counts
    assert len(TASKS) == len(EXPECTED) >= 15
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pv.datasets.UnusedColumnsWarning)
        exec(SETUP, names)  # noqa: S102 - code of our own page
        for task, line in TASKS:
            exec(line, names)  # noqa: S102
            (condition,) = [c for start, c in EXPECTED.items() if task.startswith(start)]
            assert eval(condition, names), (task, line)  # noqa: S307
