"""Figures of a comparison, drawn with matplotlib but without its global state."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae.report._compare import Comparison

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")


def learning_curves(comparison: Comparison) -> Figure | None:
    """Plot the validation or training loss of each epoch; None if no pair has a fit."""
    fits = [(entry.name, entry.fit) for entry in comparison.entries if entry.fit is not None]
    if not fits:
        return None
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    floor = np.inf
    for i, (name, fit) in enumerate(fits):
        held_out = fit.history["validation_loss"].notna().any()
        losses = fit.history["validation_loss" if held_out else "loss"]
        axes.plot(
            losses.index,
            losses,
            color=COLOURS[i % len(COLOURS)],
            linestyle=("-", "--", ":")[i // len(COLOURS) % 3],
            label=name if held_out else f"{name} (training)",
        )
        floor = min(floor, losses.min())
    # The first epochs would dominate the axis. Show only the later part of the descent.
    late = [fit.history["loss"].iloc[len(fit.history) // 10] for _, fit in fits]
    if max(late) > floor:
        axes.set_ylim(floor - 0.05 * (max(late) - floor), max(late))
    axes.set(xlabel="epoch", ylabel="loss of each objective, nats per data point")
    axes.legend(frameon=False)
    return figure


def differences(comparison: Comparison) -> Figure:
    """Plot each pair's log p(x) minus that of the best, with bars of two standard errors."""
    entries = comparison.entries[::-1]
    paired = [comparison.difference(entry.name) for entry in entries]
    figure = Figure(figsize=(8, 1 + 0.35 * len(entries)), layout="constrained")
    axes = figure.add_subplot()
    axes.errorbar(
        [difference for difference, _ in paired],
        range(len(entries)),
        xerr=[2 * np.nan_to_num(error) for _, error in paired],
        fmt="o",
        color=COLOURS[0],
        capsize=3,
    )
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.set_yticks(range(len(entries)), [entry.name for entry in entries])
    axes.set_xlabel("log p(x) minus that of the best, nats per data point, ± 2 standard errors")
    return figure


def surgery_terms(comparison: Comparison) -> Figure | None:
    """Plot distortion, mutual information and marginal KL as one bar, minus the ELBO in all."""
    entries = [entry for entry in comparison.entries[::-1] if entry.surgery is not None]
    if not entries:
        return None
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(entries)), layout="constrained")
    axes = figure.add_subplot()
    left = np.zeros(len(entries))
    terms = ("distortion", "mutual_information", "marginal_kl")
    for term, colour in zip(terms, COLOURS, strict=False):
        values = np.array([max(0.0, getattr(entry.surgery, term)) for entry in entries])
        axes.barh(
            range(len(entries)), values, left=left, color=colour, label=term.replace("_", " ")
        )
        left += values
    axes.set_yticks(range(len(entries)), [entry.name for entry in entries])
    axes.set_xlabel("nats per data point; the whole bar is minus the ELBO")
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def image_rows(rows: list[tuple[str, Tensor]], image_shape: tuple[int, int]) -> Figure:
    """Draw rows of images, each row with its label.

    Args:
        rows: label and images (B, D), usually in [0, 1]. Each row has its own gray scale.
        image_shape: (height, width), whose product is D.
    """
    count = max(len(images) for _, images in rows)
    height, width = image_shape
    figure = Figure(figsize=(8, 8 * len(rows) * height / (width * count) + 0.1))
    grid = figure.subplots(
        len(rows), count, squeeze=False, gridspec_kw={"wspace": 0.05, "hspace": 0.05}
    )
    figure.subplots_adjust(left=0.16, right=1, bottom=0, top=1)
    for axes_row, (label, images) in zip(grid, rows, strict=True):
        low, high = min(0.0, images.min().item()), max(1.0, images.max().item())
        for axes in axes_row:
            axes.set_axis_off()
        for axes, image in zip(axes_row, images, strict=False):
            axes.imshow(image.reshape(image_shape).numpy(), cmap="gray_r", vmin=low, vmax=high)
        axes_row[0].text(
            -0.1, 0.5, label, transform=axes_row[0].transAxes, ha="right", va="center", fontsize=8
        )
    return figure
