r"""Points of a rate-distortion curve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class RateDistortion:
    """Points of a rate-distortion curve; :func:`pyro_vae.plots.rate_distortion` draws them.

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
