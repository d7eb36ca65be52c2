"""Scatter the codes of data by label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae._utils.checks import check_call
from pyro_vae.datasets._columns import as_tensor
from pyro_vae.evaluation import Encoding
from pyro_vae.plots._axes import BLUE, GRAY, axes_for, check_axes, in_legend
from pyro_vae.plots._dimensions import choose_dimensions, names_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Tol (2021), muted scheme, and black: ten colors for the classes of a data set.
_OF_LEVELS = (
    *("#332288", "#88ccee", "#44aa99", "#117733", "#999933"),
    *("#ddcc77", "#cc6677", "#882255", "#aa4499", "#222222"),
)
_MARKERS = ("o", "^")  # of the first ten levels, and the others
_MOST_LEVELS = len(_OF_LEVELS) * len(_MARKERS)


def codes(
    encoding: Encoding | Tensor,
    labels: Sequence[Any] | Tensor | None = None,
    *,
    dimensions: Sequence[int] | None = None,
    ax: Axes | None = None,
) -> Figure:
    r"""Scatter codes in two dimensions, with one color for each label.

    A code with more than two numbers is projected on the first two principal components of all
    codes. The axes then show the share of the variance that each component explains. Each component
    has its largest weight positive. Distances between far points can be misleading if these shares
    are small.

    Labels of at most twenty different integers, strings or Booleans have a legend. Other numbers
    have a color bar.

    Args:
        encoding: the result of :func:`pyro_vae.encode`, whose means are drawn, or codes
            ``(N, *event)``. Data points with masked numbers are left out.
        labels: one label for each data point.
        dimensions: two dimensions to draw instead of principal components, as positions in the
            flattened code.
        ax: axes to draw on. By default, those of a new figure.

    Returns:
        The figure of the axes.

    Raises:
        ImportError: The extra ``report`` is not installed.
        ValueError: A code has one number, or is NaN or infinite. ``labels`` does not have one label
            for each code, or more than twenty different strings. A dimension does not exist.
        TypeError: An argument has the wrong type.

    Example:
        >>> import torch, pyro_vae as pv
        >>> z = torch.randn(100, 5) * torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0])
        >>> figure = pv.plots.codes(z, labels=["odd", "even"] * 50)
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['even', 'odd']
    """
    check_call(codes, locals())
    check_axes(ax)
    if isinstance(encoding, Encoding):
        name, kept, given = encoding.site, rows_with_codes(encoding), encoding.mean
    else:
        name, given = "z", as_tensor(encoding, "encoding")
        kept = torch.ones(len(given), dtype=torch.bool)
    z = as_tensor(given.cpu()[kept], "encoding").double()
    z = z.reshape(len(z), -1)
    points, names = _in_two_dimensions(z, name, dimensions)
    values = None if labels is None else _checked_labels(labels, kept.numpy())
    axes = axes_for(ax, 4.2)
    # The order of the rows would hide the first labels below the last.
    order = np.random.default_rng(0).permutation(len(z))
    size = float(np.clip(16_000 / len(z), 4, 25))
    style = {"s": size, "linewidths": 0, "alpha": 0.8, "rasterized": len(z) > 1000}
    if values is None:
        axes.scatter(*points[order].T, color=BLUE, **style)
    elif isinstance(values, list):
        _draw_levels(axes, points, order, values, style)
    else:
        drawn = axes.scatter(*points[order].T, c=values[order], plotnonfinite=True, **style)
        drawn.cmap = drawn.cmap.with_extremes(bad=GRAY)
        axes.figure.colorbar(drawn, ax=axes, label="label")
    axes.set(xlabel=names[0], ylabel=names[1])
    axes.set_aspect("equal", adjustable="datalim")
    return axes.figure


def _in_two_dimensions(z: Tensor, name: str, dimensions: Any) -> tuple[np.ndarray, list[str]]:
    """Return points ``(N, 2)`` and the names of both axes."""
    size = z.shape[1]
    if size < 2:
        raise ValueError(
            "encoding must have at least two numbers for each data point, got shape "
            f"{tuple(z.shape)}. pv.plots.aggregated_posterior draws a latent with one number"
        )
    if dimensions is not None or size == 2:
        chosen = choose_dimensions(dimensions, z.var(0, correction=0), 2)
        return z[:, chosen].numpy(), names_of(name, chosen, size)
    centered = z - z.mean(0)
    variances, vectors = torch.linalg.eigh(centered.T @ centered / len(z))
    vectors = vectors[:, [-1, -2]]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    shares = variances[[-1, -2]] / variances.sum().clamp(min=torch.finfo(z.dtype).tiny)
    names = [
        f"principal component {number} ({share:.0%} of the variance)"
        for number, share in enumerate(shares.tolist(), start=1)
    ]
    return (centered @ vectors).numpy(), names


def rows_with_codes(encoding: Encoding) -> Tensor:
    """Return whether each data point has a code without masked numbers, shape (N,).

    Raises:
        ValueError: No data point has one.
    """
    kept = ~encoding.masked.reshape(len(encoding), -1).any(1)
    if not kept.any():
        raise ValueError(
            f"latent site {encoding.site!r} is masked for all data points, so there are no codes. "
            "Encode another site, or data points whose latent is not masked"
        )
    return kept


def _checked_labels(labels: Any, kept: np.ndarray) -> np.ndarray | list[str]:
    """Return labels as texts of a legend, or as numbers of a color bar.

    Args:
        labels: one label for each data point.
        kept: whether each data point is drawn.

    Raises:
        ValueError: There is not one label for each code, or there are too many different strings.
    """
    values = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    if values.shape != kept.shape:
        raise ValueError(
            f"labels must have one label for each of {len(kept)} codes, got shape {values.shape}"
        )
    values = values[kept]
    if values.dtype.kind == "f":
        return values.astype(float)
    if values.dtype.kind not in "biuU":
        values = np.array([str(value) for value in values])
    different = len(set(values.tolist()))
    if different <= _MOST_LEVELS:
        return values.tolist()
    if values.dtype.kind in "iu":
        return values.astype(float)
    raise ValueError(
        f"labels must have at most {_MOST_LEVELS} different values, or be numbers, got {different}"
    )


def _draw_levels(
    axes: Axes, points: np.ndarray, order: np.ndarray, values: list[Any], style: dict[str, Any]
) -> None:
    levels = sorted(set(values))
    numbers = np.array([levels.index(value) for value in values])
    many = len(_OF_LEVELS)
    for kind, marker in enumerate(_MARKERS):
        rows = order[numbers[order] // many == kind]
        if len(rows):
            colors = [_OF_LEVELS[number % many] for number in numbers[rows]]
            axes.scatter(*points[rows].T, c=colors, marker=marker, **style)
    for number, level in enumerate(levels):  # of the legend alone
        axes.scatter(
            [],
            [],
            color=_OF_LEVELS[number % many],
            marker=_MARKERS[number // many],
            label=in_legend(str(level)),
        )
    axes.legend(
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        ncols=-(-len(levels) // many),
        columnspacing=0.5,
        handletextpad=0.2,
        borderpad=0,
    )
