"""Figures and axes of matplotlib without its global state, and the style of all plots.

Figures are narrow, so that their text can be read on a phone.
"""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING, Any

from pyro_vae._utils.checks import shown
from pyro_vae._utils.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Tol (2021), bright scheme: people with any kind of color vision can tell them apart.
BLUE, RED, GREEN, YELLOW, CYAN, PURPLE = COLORS = (
    *("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377"),
)
GRAY, DARK = "#999999", "#444444"
WIDTH = 5.2  # inches


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """Return a figure that belongs to no window, of a size in inches.

    Raises:
        ImportError: The extra ``report`` is not installed.
    """
    figure = require("matplotlib.figure", "report", "A plot").Figure
    _display_in_notebooks(figure)
    return figure(figsize=(width, height), layout="constrained")


def _display_in_notebooks(figure: type[Figure]) -> None:
    """Let a running Jupyter kernel display figures as pictures, as ``%matplotlib inline`` does."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is None:
        return
    try:
        shell.display_formatter.formatters["image/png"].lookup_by_type(figure)
    except KeyError:
        from IPython.core.pylabtools import select_figure_formats

        select_figure_formats(shell, {"png"})


def axes_for(ax: Any, height: float, width: float = WIDTH) -> Axes:
    """Return the axes of the caller, or the only axes of a new figure.

    Raises:
        ImportError: The extra ``report`` is not installed.
        TypeError: ``ax`` is neither axes nor None.
    """
    check_axes(ax)
    if ax is not None:
        return ax
    axes = new_figure(height, width).add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def check_axes(ax: Any) -> None:
    """Raise an error if nothing can be drawn, before anything is computed.

    Raises:
        ImportError: The extra ``report`` is not installed.
        TypeError: ``ax`` is neither axes nor None.
    """
    axes = require("matplotlib.axes", "report", "A plot").Axes
    if ax is not None and not isinstance(ax, axes):
        raise TypeError(f"ax must be axes of matplotlib, or None for a new figure, got {shown(ax)}")


def literal(text: str) -> str:
    """Return a text that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")


def in_legend(name: str) -> str:
    """Return a name that a legend shows. Matplotlib leaves out those that start with "_"."""
    zero_width_space = "\u200b"
    return zero_width_space * name.startswith("_") + literal(name)


def broken(name: str, longest: int = 24) -> str:
    """Return a name in at most two lines that fit beside an axis."""
    return literal("\n".join(textwrap.wrap(name, longest)[:2]) or name)


def label_rows(ax: Axes, names: list[str]) -> None:
    """Name the rows of horizontal bars, the first at the top."""
    ax.set_yticks(range(len(names)), [broken(name) for name in names])
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)


def height_of_rows(count: int) -> float:
    """Return the height of a figure with that many rows, in inches."""
    return 1.4 + 0.4 * count
