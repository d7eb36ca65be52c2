"""Render a comparison as a self-contained HTML page, which loads no other files."""

from __future__ import annotations

import base64
import io
import math
import platform

import jinja2
import pyro
import torch
from matplotlib.figure import Figure

from pyro_vae.report import _plots as plots
from pyro_vae.report._compare import Comparison

# Heading, column of Comparison.to_dataframe, column of its standard error.
COLUMNS = (
    ("log p(x)", "log_evidence", "standard_error"),
    ("difference", "difference", "difference_error"),
    ("k̂ > 0.7", "unreliable_share", None),
    ("ELBO", "elbo", None),
    ("distortion", "distortion", None),
    ("rate", "rate", None),
    ("mutual information", "mutual_information", None),
    ("marginal KL", "marginal_kl", None),
    ("parameters", "num_parameters", None),
    ("epochs", "epochs", None),
    ("seconds", "seconds", None),
)


def render(comparison: Comparison) -> str:
    """Return the HTML of the page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pyro_vae.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = [
        ("Paired differences of log p(x)", plots.differences(comparison)),
        ("Terms of the ELBO", plots.surgery_terms(comparison)),
        ("Learning curves", plots.learning_curves(comparison)),
    ]
    return environment.get_template("report.html.jinja").render(
        comparison=comparison,
        num_data=len(comparison.entries[0].evidence.values),
        headings=[heading for heading, _, _ in COLUMNS],
        rows=_rows(comparison),
        notes=[(entry.name, entry.note) for entry in comparison.entries if entry.note],
        figures=[(title, _embed(figure)) for title, figure in figures if figure is not None],
        pictures=_pictures(comparison),
        log_n=math.log(comparison.num_train),
        versions=f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"pyro {pyro.__version__}",
    )


def _rows(comparison: Comparison) -> list[tuple[str, list[str]]]:
    frame = comparison.to_dataframe()
    return [
        (name, [_cell(row, column, error) for _, column, error in COLUMNS])
        for name, row in frame.iterrows()
    ]


def _cell(row, column: str, error: str | None) -> str:
    value = row[column]
    if math.isnan(value):
        return "-"
    if column == "unreliable_share":
        return f"{value:.1%}"
    if column in ("num_parameters", "epochs"):
        return f"{int(value):,}"
    if error is None or math.isnan(row[error]):
        return f"{value:.2f}"
    if column == "difference" and value == 0 and row[error] == 0:
        return "best"
    return f"{value:.2f} ± {row[error]:.2f}"


def _pictures(comparison: Comparison) -> list[tuple[str, str]]:
    shown = [(e.name, e.pictures) for e in comparison.entries if e.pictures is not None]
    if comparison.image_shape is None or not shown:
        return []
    _, (originals, _, _) = shown[0]
    reconstructions = [("data", originals)]
    reconstructions += [(name, pictures[1]) for name, pictures in shown]
    samples = [(name, pictures[2]) for name, pictures in shown]
    return [
        (title, _embed(plots.image_rows(rows, comparison.image_shape), dpi=110))
        for title, rows in (
            ("Reconstructions: E[x|z] for z from the guide", reconstructions),
            ("Samples: E[x|z] for z from the prior", samples),
        )
    ]


def _embed(figure: Figure, dpi: int = 110) -> str:
    """Return a figure as a data URI."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
