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
from pyro_vae.report._comparison import Comparison

# Heading, column of Comparison.to_dataframe, column of its standard error.
HELD_OUT = (
    ("runs", "runs", None),
    ("log p(x)", "log_evidence", "standard_error"),
    ("difference", "difference", "difference_error"),
    ("best", "is_best", None),
    ("ELBO", "test_elbo", None),
    ("gap", "gap", None),
    ("k̂ > 0.7", "unreliable_share", None),
)
SURGERY = (
    ("ELBO", "elbo", None),
    ("distortion", "distortion", None),
    ("rate", "rate", None),
    ("mutual information", "mutual_information", None),
    ("marginal KL", "marginal_kl", None),
    ("active units", "active_units", None),
)
ESTIMATORS = {
    "importance": "importance sampling from the guide",
    "naive": "samples from the prior",
    "ais": "annealed importance sampling",
}
FITS = (
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
    evidence = comparison.entries[0].runs[0].evidence
    figures = [
        ("Paired differences of log p(x)", plots.differences(comparison)),
        ("Terms of the ELBO", plots.surgery_terms(comparison)),
        ("Learning curves", plots.learning_curves(comparison)),
    ]
    return environment.get_template("report.html.jinja").render(
        comparison=comparison,
        evidence=evidence,
        estimator=ESTIMATORS[evidence.method],
        tables=[
            (title, [heading for heading, _, _ in columns], _rows(comparison, columns))
            for title, columns in (
                ("Held-out data", HELD_OUT),
                (f"ELBO surgery of {comparison.num_train:,} data points", SURGERY),
                ("Fits", FITS),
            )
        ],
        figures=[(title, _embed(figure)) for title, figure in figures if figure is not None],
        pictures=_pictures(comparison),
        log_n=math.log(comparison.num_train),
        versions=f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"pyro {pyro.__version__}",
    )


def _rows(comparison: Comparison, columns: tuple) -> list[tuple[str, list[str]]]:
    frame = comparison.to_dataframe()
    return [
        (name, [_cell(row, column, error) for _, column, error in columns])
        for name, row in frame.iterrows()
    ]


def _cell(row, column: str, error: str | None) -> str:
    value = row[column]
    if math.isnan(value):
        return "-"
    if column == "unreliable_share":
        return f"{value:.1%}"
    if column == "is_best":
        return "yes" if value else "no"
    if column in ("num_parameters", "epochs", "runs", "active_units") and value % 1 == 0:
        return f"{int(value):,}"
    if error is None or math.isnan(row[error]):
        return f"{value:.2f}"
    if column == "difference" and value == 0 and row[error] == 0:
        return ""
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
