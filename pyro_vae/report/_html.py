"""Render a comparison as a self-contained HTML page, which loads no other files."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass

import jinja2
import matplotlib as mpl
from matplotlib.figure import Figure

from pyro_vae import plots
from pyro_vae._utils.numbers_text import with_error
from pyro_vae._utils.versions import versions
from pyro_vae.plots._mosaic import image_rows
from pyro_vae.report._comparison import Comparison
from pyro_vae.report._diagnosis import Diagnosis, entry_text

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
)


@dataclass(frozen=True)
class _Table:
    """A table of the page.

    Args:
        title: its heading.
        headings: the headings of all columns, first that of the names.
        rows: the cells of each row, first its name.
    """

    title: str
    headings: list[str]
    rows: list[list[str]]


def render(
    comparison: Comparison,
    diagnosis: Diagnosis | None,
    facts: Mapping[str, str],
    baseline: str | None,
) -> str:
    """Return the HTML of the page; see :meth:`Comparison.to_html`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pyro_vae.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    evidence = comparison.entries[0].runs[0].evidence
    figures = [("Paired differences of log p(x)", plots.differences(comparison))]
    if any(run.surgery is not None for entry in comparison.entries for run in entry.runs):
        figures.append(("Terms of the ELBO", plots.surgery(comparison)))
    if any(run.fit is not None for entry in comparison.entries for run in entry.runs):
        figures.append(("Learning curves", plots.learning_curves(comparison)))
    return environment.get_template("report.html.jinja").render(
        comparison=comparison,
        evidence=evidence,
        estimator=ESTIMATORS[evidence.method],
        facts=_facts(comparison, facts),
        diagnosis=diagnosis,
        ledger=None if diagnosis is None else _ledger(diagnosis, baseline),
        baseline=baseline,
        changes=None if baseline is None else _changes(comparison, baseline),
        advice=[]
        if diagnosis is None or baseline is None
        else comparison.advice(diagnosis, baseline),
        tables=[
            _Table(title, ["method", *(heading for heading, _, _ in columns)], rows)
            for title, columns, rows in (
                (title, columns, _rows(comparison, columns))
                for title, columns in (
                    ("Held-out data", HELD_OUT),
                    (f"ELBO surgery of {comparison.num_train:,} data points", SURGERY),
                    ("Fits", FITS),
                )
            )
        ],
        figures=[(title, _embed(figure, "svg+xml")) for title, figure in figures],
        pictures=_pictures(comparison),
        log_n=math.log(comparison.num_train),
    )


def _facts(comparison: Comparison, facts: Mapping[str, str]) -> dict[str, str]:
    """Return the given facts, and those that the comparison has."""
    found = {str(name): str(value) for name, value in facts.items()}
    now = versions()
    found.setdefault(
        "sizes",
        f"{comparison.num_data:,} held-out data points, {comparison.num_train:,} for the surgery",
    )
    found.setdefault("seeds", _seeds(comparison))
    fits = [run.fit for entry in comparison.entries for run in entry.runs if run.fit is not None]
    if fits:
        seconds = sum(fit.history["seconds"].sum() for fit in fits)
        found.setdefault("time of the fits", f"{seconds:.0f} s, in sum")
    found.setdefault(
        "versions",
        f"pyro_vae {now['pyro_vae']}, torch {now['torch']}, pyro {now['pyro-ppl']}, "
        f"Python {now['python']}",
    )
    found.setdefault("date", now["date"])
    return found


def _seeds(comparison: Comparison) -> str:
    seeds = [
        None if run.fit is None else run.fit.seed
        for entry in comparison.entries
        for run in entry.runs
    ]
    known = sorted({seed for seed in seeds if seed is not None})
    text = ", ".join(map(str, known)) or "not known"
    return f"{text}; some are not known" if known and None in seeds else text


def _ledger(diagnosis: Diagnosis, baseline: str | None) -> _Table:
    rows = [[e.name, entry_text(e, " ± "), e.note] for e in diagnosis.entries]
    title = "Diagnosis" if baseline is None else f"Diagnosis of {baseline}"
    return _Table(title, ["quantity", "value", "meaning"], rows)


def _changes(comparison: Comparison, baseline: str) -> _Table:
    return _Table(
        f"Differences from {baseline}",
        ["method", "log p(x)", "95% interval", "told apart", "ELBO"],
        [
            [
                str(row.Index),
                with_error(row.difference, row.standard_error, "+", " ± "),
                "-" if math.isnan(row.low) else f"{row.low:+.2f} to {row.high:+.2f}",
                "yes" if row.is_told_apart else "no",
                "-"
                if math.isnan(row.elbo_difference)
                else with_error(row.elbo_difference, row.elbo_error, "+", " ± "),
            ]
            for row in comparison.differences_from(baseline).itertuples()
        ],
    )


def _rows(comparison: Comparison, columns: tuple) -> list[list[str]]:
    frame = comparison.to_dataframe()
    return [
        [name, *(_cell(row, column, error) for _, column, error in columns)]
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
        (title, _embed(image_rows(rows, comparison.image_shape), "png"))
        for title, rows in (
            ("Reconstructions: E[x|z] for z from the guide", reconstructions),
            ("Samples: E[x|z] for z from the prior", samples),
        )
    ]


def _embed(figure: Figure, kind: str) -> str:
    """Return a figure as a data URI. Equal figures have equal URIs."""
    file = io.BytesIO()
    if kind == "png":
        figure.savefig(file, format="png", dpi=200)
    else:
        with mpl.rc_context({"svg.hashsalt": "pyro_vae"}):
            figure.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()
