"""Draw differences of methods, the terms of their ELBOs, and the losses of a diagnosis."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae.evaluation import Surgery
from pyro_vae.plots._axes import (
    BLUE,
    COLORS,
    DARK,
    GRAY,
    axes_for,
    check_axes,
    height_of_rows,
    label_rows,
)
from pyro_vae.plots._results import Comparison, Diagnosis, require_result, surgeries_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The terms of minus the ELBO and their names. A rate replaces the two before it, if one is unknown.
_TERMS = {
    "distortion": "distortion",
    "mutual_information": "mutual information",
    "marginal_kl": "marginal KL",
    "rate": "rate",
}
_LIGHT = "#cccccc"
_ERRORS = {"ecolor": DARK, "elinewidth": 1.2, "capsize": 3}


def differences(comparison: Comparison, *, ax: Axes | None = None) -> Figure:
    """Draw the log p(x) of each method minus that of the best.

    A diamond is a mean difference, with its 95% confidence interval. A dot is the difference of one
    run from the mean of the best method's runs.

    Args:
        comparison: the result of :func:`pyro_vae.compare`.
        ax: axes to draw on. By default, those of a new figure.

    Returns:
        The figure of the axes.

    Raises:
        ImportError: The extra ``report`` is not installed.
        TypeError: An argument has the wrong type.

    Example:
        >>> import torch, pyro_vae as pv
        >>> def pair(latents):
        ...     decoder = pv.nets.MLP(latents, [8], 16)
        ...     model = pv.LatentVariableModel(
        ...         pv.priors.StandardNormal(latents), pv.likelihoods.Bernoulli(decoder)
        ...     )
        ...     return model, pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
        >>> x = torch.rand(20, 16).round()
        >>> pairs = {"two latents": pair(2), "four latents": pair(4)}
        >>> comparison = pv.compare(pairs, x, num_particles=30)
        >>> figure = pv.plots.differences(comparison)
        >>> sorted(label.get_text() for label in figure.axes[0].get_yticklabels())
        ['four latents', 'two latents']
    """
    require_result("comparison", comparison, Comparison, "pv.compare")
    entries = comparison.entries
    axes = axes_for(ax, height_of_rows(len(entries)))
    found = [comparison.difference(entry.name) for entry in entries]
    best = entries[0].log_evidence.mean(0)
    axes.errorbar(
        [each.mean for each in found],
        range(len(entries)),
        xerr=[np.nan_to_num(each.interval[1] - each.mean) for each in found],
        fmt="D",
        color=BLUE,
        capsize=3,
    )
    for row, entry in enumerate(entries):
        of_runs = (entry.log_evidence - best).mean(1)
        axes.plot(of_runs, [row - 0.25] * len(of_runs), ".", color=DARK, markersize=5)
    axes.axvline(0, color=GRAY, linewidth=0.8, zorder=0)
    label_rows(axes, [entry.name for entry in entries])
    axes.set_xlabel(
        "log p(x) minus that of the best, nats per data point\n"
        "(diamond: mean and 95% interval; dots: runs)"
    )
    return axes.figure


def surgery(results: Surgery | Mapping[str, Any] | Comparison, *, ax: Axes | None = None) -> Figure:
    """Draw distortion, mutual information and marginal KL as one bar, whose sum is minus the ELBO.

    Negative terms are drawn to the left of zero. A black line marks minus the ELBO. If a marginal
    KL is unknown, the rate is drawn in place of the last two terms.

    Args:
        results: the result of :func:`pyro_vae.elbo_surgery`, a dictionary of such results or of
            lists of them (several seeds, whose mean is drawn), or a
            :class:`pyro_vae.report.Comparison`. Its methods without a surgery are left out.
        ax: axes to draw on. By default, those of a new figure.

    Returns:
        The figure of the axes.

    Raises:
        ImportError: The extra ``report`` is not installed.
        ValueError: There is no surgery.
        TypeError: An argument has the wrong type.

    Example:
        >>> import torch, pyro_vae as pv
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
        >>> terms = pv.elbo_surgery(model, guide, torch.rand(50, 16).round(), seed=0)
        >>> bars = pv.plots.surgery({"before the fit": terms}).axes[0].patches
        >>> bool(abs(sum(bar.get_width() for bar in bars) + terms.elbo) < 1e-4)
        True
    """
    check_axes(ax)
    named = surgeries_of(results)
    axes = axes_for(ax, height_of_rows(len(named)))
    values = {
        term: np.array([_mean(getattr(each, term) for each in found) for found in named.values()])
        for term in (*_TERMS, "elbo")
    }
    unknown = np.isnan(values["marginal_kl"])
    values["mutual_information"] = np.where(unknown, 0.0, values["mutual_information"])
    values["marginal_kl"] = np.where(unknown, 0.0, values["marginal_kl"])
    values["rate"] = np.where(unknown, values["rate"], 0.0)
    ends = {True: np.zeros(len(named)), False: np.zeros(len(named))}  # by the sign of a term
    drawn = []
    for (term, name), color in zip(_TERMS.items(), COLORS, strict=False):
        if not values[term].any():
            continue
        positive = values[term] >= 0
        left = np.where(positive, ends[True], ends[False])
        style = {"left": left, "color": color, "label": name}
        drawn.append(axes.barh(range(len(named)), values[term], **style))
        for sign in (True, False):
            ends[sign] += np.where(positive == sign, values[term], 0.0)
    if ends[False].any():
        axes.axvline(0, color=GRAY, linewidth=0.8)
    style = {"color": "black", "markersize": 16, "markeredgewidth": 2, "label": "-ELBO"}
    drawn += axes.plot(-values["elbo"], range(len(named)), "|", **style)
    label_rows(axes, list(named))
    axes.set_xlabel("nats per data point")
    axes.legend(
        handles=drawn,
        frameon=False,
        ncols=2,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        fontsize="small",
        handlelength=1.2,
    )
    return axes.figure


def diagnosis(result: Diagnosis, *, ax: Axes | None = None) -> Figure:
    """Draw the losses of a diagnosis as bars, with errors of two standard errors.

    A loss that the verdict lists is blue: It is above 0.05 nats and above two standard errors. All
    others are gray. An unknown loss has no bar.

    Args:
        result: the result of :func:`pyro_vae.diagnose`.
        ax: axes to draw on. By default, those of a new figure.

    Returns:
        The figure of the axes.

    Raises:
        ImportError: The extra ``report`` is not installed.
        TypeError: An argument has the wrong type.

    Example:
        >>> import pyro_vae as pv
        >>> loss = pv.report.LedgerEntry("prior gain", 3.0, 0.2, "a better prior")
        >>> figure = pv.plots.diagnosis(pv.report.Diagnosis((loss,), num_train=100, num_test=50))
        >>> float(figure.axes[0].patches[0].get_width())
        3.0
    """
    require_result("result", result, Diagnosis, "pv.diagnose")
    losses = result.possible_losses
    axes = axes_for(ax, height_of_rows(len(losses)) - 0.3)
    values = np.array([entry.value for entry in losses])
    errors = np.array([entry.standard_error for entry in losses])
    axes.barh(
        range(len(losses)),
        values,
        xerr=2 * np.nan_to_num(errors),
        color=[BLUE if entry.is_loss else _LIGHT for entry in losses],
        error_kw=_ERRORS,
    )
    for row in np.flatnonzero(np.isnan(values)):
        axes.annotate(
            "unknown", (0, row), xytext=(4, 0), textcoords="offset points", va="center", color=GRAY
        )
    axes.axvline(0, color=GRAY, linewidth=0.8)
    label_rows(axes, [entry.name for entry in losses])
    axes.set_xlabel("loss, nats per data point")
    return axes.figure


def _mean(values: Any) -> float:
    return math.fsum(found := list(values)) / len(found)
