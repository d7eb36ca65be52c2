"""Draw the ELBO of the validation data after each epoch of fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae.plots._axes import COLORS, axes_for, check_axes, in_legend
from pyro_vae.plots._results import fits_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRAINING = "objective on training data"
_LINES = ("-", "--", ":")


def learning_curves(fits: Any, *, ax: Axes | None = None) -> Figure:
    """Draw the ELBO of the validation data after each epoch, with one color for each method.

    A fit without validation data shows minus its training loss, the bound of its own objective. The
    legend then says so. The axis shows the values after the first tenth of the epochs, because the
    first values would dominate it.

    Args:
        fits: a :class:`pyro_vae.training.Fit`, a list of fits with several seeds, a dictionary of
            these by name, or a :class:`pyro_vae.report.Comparison`. Each fit has a line.
        ax: axes to draw on. By default, those of a new figure.

    Returns:
        The figure of the axes.

    Raises:
        ImportError: The extra ``report`` is not installed.
        ValueError: There is no fit, a list is empty, or a fit has no epoch.
        TypeError: An argument has the wrong type.

    Example:
        >>> import pyro_vae as pv
        >>> data = pv.datasets.load("digits")
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 64)),
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(64, [8]))
        >>> fit = pv.fit(
        ...     model, guide, data.train, validation=data.validation, epochs=3, progress=False
        ... )
        >>> figure = pv.plots.learning_curves({"ELBO": fit})
        >>> len(figure.axes[0].lines[0].get_xdata())
        3
    """
    check_axes(ax)
    named = fits_of(fits)
    axes = axes_for(ax, 3.6)
    lowest, highest, have_elbo = np.inf, -np.inf, False
    for number, (name, runs) in enumerate(named.items()):
        for run, fit in enumerate(runs):
            curve, is_elbo = _curve(fit.history)
            have_elbo |= is_elbo
            label = f"{name} ({_TRAINING})".strip() if not is_elbo else name
            axes.plot(
                curve.index,
                curve,
                color=COLORS[number % len(COLORS)],
                linestyle=_LINES[number // len(COLORS) % len(_LINES)],
                linewidth=1.2,
                marker="o" if len(curve) == 1 else None,
                label=None if run or not label else in_legend(label),
            )
            late = curve[len(curve) // 10 :]
            late = late[np.isfinite(late)]
            lowest = min(lowest, late.min() if len(late) else np.inf)
            highest = max(highest, late.max() if len(late) else -np.inf)
    if lowest < highest:
        margin = 0.05 * (highest - lowest)
        axes.set_ylim(lowest - margin, highest + margin)
    quantity = "ELBO of the validation data" if have_elbo else f"bound ({_TRAINING})"
    axes.set(xlabel="epoch", ylabel=f"{quantity},\nnats per data point")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="small")
    return axes.figure


def _curve(history: pd.DataFrame) -> tuple[pd.Series, bool]:
    """Return a curve that rises, and whether it is the ELBO of the validation data."""
    if "validation_elbo" in history and np.isfinite(history["validation_elbo"]).any():
        return history["validation_elbo"], True
    return -history["loss"], False
