"""Draw a rate-distortion curve."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyro_vae.plots._axes import BLUE, GRAY, GREEN, RED, axes_for
from pyro_vae.plots._results import RateDistortion, require_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def rate_distortion(curve: RateDistortion, *, ax: Axes | None = None) -> Figure:
    """Draw a rate-distortion curve, the line R + D = H, and the ends of this line.

    Error bars are two standard errors. No pair lies below the line (Alemi et al. 2018). The end
    D = 0 needs a positive H.

    Args:
        curve: the result of :func:`pyro_vae.rate_distortion`.
        ax: axes to draw on. By default, those of a new figure.

    Returns:
        The figure of the axes.

    Raises:
        ImportError: The extra ``report`` is not installed.
        TypeError: An argument has the wrong type.

    Example:
        >>> import pandas as pd, pyro_vae as pv
        >>> numbers = {"rate": [5.0, 2.0], "distortion": [15.0, 20.0]}
        >>> errors = {"rate_error": [0.1, 0.1], "distortion_error": [0.2, 0.2]}
        >>> table = pd.DataFrame(numbers | errors, pd.Index([0.5, 2.0], name="beta"))
        >>> curve = pv.report.RateDistortion(table, entropy=18.0, refit="guide")
        >>> figure = pv.plots.rate_distortion(curve)
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['β = 0.5', 'β = 2']
    """
    require_result("curve", curve, RateDistortion, "pv.rate_distortion")
    axes = axes_for(ax, 4.4)
    table = curve.table
    axes.errorbar(
        table["rate"],
        table["distortion"],
        xerr=2 * table["rate_error"].fillna(0),
        yerr=2 * table["distortion_error"].fillna(0),
        marker="o",
        color=BLUE,
        capsize=2,
    )
    for beta, row in table.iterrows():
        axes.annotate(
            f"β = {beta:g}",
            (row["rate"], row["distortion"]),
            xytext=(5, 5),
            textcoords="offset points",
        )
    h = curve.entropy
    ends = [0.0, max(h, table["rate"].max())]
    line = {"color": GRAY, "linestyle": "--", "zorder": 0}
    axes.plot(ends, [h - end for end in ends], label="R + D = H", **line)
    corners = [((0.0, h), "R = 0, D = H: auto-decoding limit", RED)]
    if h > 0:
        corners.append(((h, 0.0), "D = 0, R = H: auto-encoding limit", GREEN))
    for (rate, distortion), name, color in corners:
        axes.plot([rate], [distortion], "s", color=color, label=name, clip_on=False, zorder=3)
    axes.legend(frameon=False)
    axes.set(xlabel="rate R, nats per data point", ylabel="distortion D, nats per data point")
    return axes.figure
