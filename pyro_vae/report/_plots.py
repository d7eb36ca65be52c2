"""Figures of a comparison, drawn with matplotlib but without its global state.

The figures are narrow, so that their text can be read on a phone.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae.report._comparison import Comparison

if TYPE_CHECKING:
    import pandas as pd

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")
WIDTH = 5.2  # inches
_TRAINING = "objective on training data"


def learning_curves(comparison: Comparison) -> Figure | None:
    """Plot the ELBO of the validation data after each epoch; None if no pair has a fit.

    A fit without it shows minus its training loss, the bound of its own objective.
    """
    fits = []
    for number, entry in enumerate(comparison.entries):
        found = [run.fit for run in entry.runs if run.fit is not None and len(run.fit.history)]
        names = [entry.name] + [None] * len(found)  # one entry of the legend for each method
        fits += [(number, name, fit) for name, fit in zip(names, found, strict=False)]
    if not fits:
        return None
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.add_subplot()
    lowest, highest, have_elbo = np.inf, -np.inf, False
    for i, name, fit in fits:
        curve, is_elbo = _learning_curve(fit.history)
        have_elbo |= is_elbo
        label = name if is_elbo or name is None else f"{name} ({_TRAINING})"
        axes.plot(
            curve.index,
            curve,
            color=COLOURS[i % len(COLOURS)],
            linestyle=("-", "--", ":")[i // len(COLOURS) % 3],
            linewidth=1.2,
            label=None if label is None else _literal(label),
        )
        # The first epochs would dominate the axis. Show only the later part of the ascent.
        late = curve[len(curve) // 10 :]
        late = late[np.isfinite(late)]
        lowest, highest = min(lowest, late.min()), max(highest, late.max())
    if lowest < highest < np.inf:
        margin = 0.05 * (highest - lowest)
        axes.set_ylim(lowest - margin, highest + margin)
    what = "ELBO of the validation data" if have_elbo else f"bound ({_TRAINING})"
    axes.set(xlabel="epoch", ylabel=f"{what},\nnats per data point")
    axes.legend(frameon=False, fontsize="small")
    return figure


def _learning_curve(history: pd.DataFrame) -> tuple[pd.Series, bool]:
    """Return a curve that rises, and whether it is the ELBO of the validation data."""
    if "validation_elbo" in history and np.isfinite(history["validation_elbo"]).any():
        return history["validation_elbo"], True
    return -history["loss"], False


def differences(comparison: Comparison) -> Figure:
    """Plot log p(x) of each method minus that of the best: its 95% interval, a dot per run."""
    entries = comparison.entries[::-1]
    found = [comparison.difference(entry.name) for entry in entries]
    best = comparison.entries[0].log_evidence.mean(0)
    figure = Figure(figsize=(WIDTH, 1.3 + 0.4 * len(entries)), layout="constrained")
    axes = figure.add_subplot()
    axes.errorbar(
        [each.mean for each in found],
        range(len(entries)),
        xerr=[np.nan_to_num(each.interval[1] - each.mean) for each in found],
        fmt="D",
        color=COLOURS[0],
        capsize=3,
    )
    for height, entry in enumerate(entries):
        of_runs = (entry.log_evidence - best).mean(1)
        axes.plot(of_runs, [height + 0.25] * len(of_runs), ".", color="#555555", markersize=5)
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.set_yticks(range(len(entries)), [_broken(entry.name) for entry in entries])
    axes.set_ylim(-0.6, len(entries) - 0.2)
    figure.supxlabel(
        "log p(x) minus that of the best, nats per data point\n"
        "(diamond: mean and 95% interval; dots: runs)",
        fontsize="medium",
    )
    return figure


def surgery_terms(comparison: Comparison) -> Figure | None:
    """Plot distortion, mutual information and marginal KL as one bar, minus the ELBO in all."""
    entries = [e for e in comparison.entries[::-1] if not np.isnan(e.term("distortion"))]
    if not entries:
        return None
    figure = Figure(figsize=(WIDTH, 1.4 + 0.4 * len(entries)), layout="constrained")
    axes = figure.add_subplot()
    left = np.zeros(len(entries))
    terms = ("distortion", "mutual_information", "marginal_kl")
    for term, colour in zip(terms, COLOURS, strict=False):
        values = np.array([max(0.0, entry.term(term)) for entry in entries])
        axes.barh(
            range(len(entries)), values, left=left, color=colour, label=term.replace("_", " ")
        )
        left += values
    axes.set_yticks(range(len(entries)), [_broken(entry.name) for entry in entries])
    figure.supxlabel("nats per data point; the whole bar is minus the ELBO", fontsize="medium")
    figure.legend(frameon=False, ncols=3, loc="outside upper center", fontsize="small")
    return figure


def _broken(name: str, longest: int = 24) -> str:
    """Return a name in at most two lines that fit beside an axis."""
    return _literal("\n".join(textwrap.wrap(name, longest)[:2]) or name)


def _literal(text: str) -> str:
    """Return a text that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")


def image_rows(rows: list[tuple[str, Tensor]], image_shape: tuple[int, int]) -> Figure:
    """Draw rows of images, each below its label.

    Args:
        rows: label and images (B, D), usually in [0, 1]. Each row has its own gray scale.
        image_shape: (height, width), whose product is D.
    """
    count = max(len(images) for _, images in rows)
    height, width = image_shape
    of_label, of_row = 0.22, WIDTH * height / (width * count)  # inches
    total = len(rows) * (of_label + of_row)
    figure = Figure(figsize=(WIDTH, total))
    for number, (label, images) in enumerate(rows):
        top = total - number * (of_label + of_row)
        figure.text(0, (top - of_label / 2) / total, _literal(label), va="center")
        low, high = min(0.0, images.min().item()), max(1.0, images.max().item())
        for column, image in enumerate(images):
            place = column / count, (top - of_label - of_row) / total
            axes = figure.add_axes((*place, 0.97 / count, of_row / total))
            axes.set_axis_off()
            axes.imshow(image.reshape(image_shape).numpy(), cmap="gray_r", vmin=low, vmax=high)
    return figure
