r"""Points of a rate-distortion curve, and their plot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyro_vae._utils.extras import require

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RateDistortion:
    """Points of a rate-distortion curve.

    Args:
        table: one row per ``beta``, ascending, in nats per data point. The columns are ``rate``,
            ``distortion``, ``elbo`` (minus their sum), and ``..._error``, the standard error of
            each for the population of the data.
        entropy: H, a lower bound of rate plus distortion. It is minus the average log p(x) of the
            evidence that was passed. Without evidence, it is the smallest sum on the curve, which
            is at least as large.
        refit: ``"guide"`` or ``"both"``, as fitted for each beta.
    """

    table: pd.DataFrame
    entropy: float
    refit: str

    def __repr__(self) -> str:
        rows = self.table.to_string(float_format="{:.3f}".format)
        return f"{rows}\nrate + distortion >= {self.entropy:.3f}, in nats per data point"

    def plot(self) -> Figure:
        """Plot the curve, the line R + D = H, and its ends. The end D = 0 needs a positive H.

        Raises:
            ImportError: The extra ``report`` is not installed.
        """
        figure = require("matplotlib.figure", "report", "A plot").Figure(
            figsize=(6, 5), layout="constrained"
        )
        axes = figure.add_subplot()
        axes.errorbar(
            self.table["rate"],
            self.table["distortion"],
            xerr=2 * self.table["rate_error"].fillna(0),
            yerr=2 * self.table["distortion_error"].fillna(0),
            marker="o",
            color="#4477aa",
            capsize=2,
        )
        for beta, row in self.table.iterrows():
            axes.annotate(
                f"β = {beta:g}",
                (row["rate"], row["distortion"]),
                xytext=(5, 5),
                textcoords="offset points",
            )
        h = self.entropy
        ends = [0.0, max(h, self.table["rate"].max())]
        line = {"color": "#999999", "linestyle": "--", "zorder": 0}
        axes.plot(ends, [h - end for end in ends], label="R + D = H", **line)
        corners = [((0.0, h), "R = 0, D = H: auto-decoding limit", "#ee6677")]
        if h > 0:
            corners.append(((h, 0.0), "D = 0, R = H: auto-encoding limit", "#228833"))
        for (rate, distortion), name, colour in corners:
            axes.plot([rate], [distortion], "s", color=colour, label=name, clip_on=False, zorder=3)
        axes.legend(frameon=False)
        axes.set(xlabel="rate R, nats per data point", ylabel="distortion D, nats per data point")
        return figure
