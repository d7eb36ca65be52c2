r"""Points of a rate-distortion curve: what each nat of code buys."""

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
        table: a row for each ``beta``, ascending: ``rate`` and ``distortion`` in nats per datum,
            ``elbo`` (minus their sum), and of each its standard error for the population of the
            data, ``..._error``.
        entropy: H, what rate and distortion add up to at least: minus the average log p(x) that
            was given; or else the least sum on the curve, which is no less.
        refit: what was fitted for each beta.
    """

    table: pd.DataFrame
    entropy: float
    refit: str

    def __str__(self) -> str:
        rows = self.table.to_string(float_format="{:.3f}".format)
        return f"{rows}\nrate + distortion >= {self.entropy:.3f} nats"

    def plot(self) -> Figure:
        """Draw the curve, the line R + D = H, and its corners where H is positive.

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
        corners = [((0.0, h), "R = 0, D = H: no code", "#ee6677")]
        if h > 0:
            corners.append(((h, 0.0), "D = 0, R = H: all in the code", "#228833"))
        for (rate, distortion), name, colour in corners:
            axes.plot([rate], [distortion], "s", color=colour, label=name, clip_on=False, zorder=3)
        axes.legend(frameon=False)
        axes.set(xlabel="rate R, nats per datum", ylabel="distortion D, nats per datum")
        return figure
