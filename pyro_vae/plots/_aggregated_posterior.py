"""Draw the aggregated posterior beside the prior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import device_of
from pyro_vae._utils.checks import check_call, is_number, shown
from pyro_vae.datasets._minibatches import Data, Minibatches
from pyro_vae.evaluation import encode
from pyro_vae.evaluation._predict import as_covariates
from pyro_vae.plots._arguments import as_list
from pyro_vae.plots._axes import BLUE, DARK, RED, check_axes, new_figure
from pyro_vae.plots._codes import rows_with_codes
from pyro_vae.plots._density import gaussian_mixture, grid_around, smoothed
from pyro_vae.plots._dimensions import choose_dimensions, names_of
from pyro_vae.plots._prior import NUM_SAMPLES, PriorOfSite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHADES = ("#e3ebf3", "#c5d5e6", "#a3bdd8", "#7b9fc6")  # of BLUE, from the outer region


def aggregated_posterior(
    model: Program,
    guide: Program,
    x: Data,
    *covariates: Tensor,
    site: str | None = None,
    dimensions: Sequence[int] | None = None,
    masses: Sequence[float] = (0.5, 0.8, 0.95),
    plate: str | None = None,
    seed: int | None = 0,
) -> Figure:
    r"""Draw the aggregated posterior :math:`q_{agg}(z) = \frac1N \sum_n q(z|x_n)` and the prior.

    Two dimensions of the latent are drawn, with their marginals beside them. Each region holds a
    given share of q_agg, and each dashed line surrounds the same share of the prior. Where the
    prior has mass but q_agg does not, samples of the model may decode to bad data (holes of the
    prior, :func:`pyro_vae.prior_holes`).

    The density of q_agg is computed from the mean and the standard deviation of each posterior. It
    is exact for diagonal Gaussians. For other posteriors, the shape of a region is approximate, but
    its share is still that of samples of the guide. The density of the prior is exact if the
    numbers of the latent are independent, or if all of them are drawn. Otherwise it is estimated
    from 5000 samples, with Gaussian kernels.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        x: the data of q_agg, usually the training data, as in :func:`pyro_vae.fit`. Data points
            with masked numbers of the latent are left out.
        *covariates: further arguments of the programs, if ``x`` is a tensor or an array.
        site: name of the latent site; by default, the only latent.
        dimensions: two dimensions of the flattened latent, or one for a marginal alone. By default,
            those whose means vary the most over the data, relative to the prior.
        masses: one to four shares between 0 and 1, of the regions.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        seed: of the samples.

    Returns:
        A figure. Its first axes have the regions. A latent with one number has one axes with both
        densities.

    Raises:
        ImportError: The extra ``report`` is not installed.
        ValueError: The latent is discrete, or a dimension does not exist. A share does not lie
            between 0 and 1. The prior cannot be sampled. It also raises the errors of
            :func:`pyro_vae.encode`.
        TypeError: An argument has the wrong type.

    Example:
        >>> import torch, pyro_vae as pv
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(4),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(4, [8], 16)),
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
        >>> x = torch.rand(50, 16).round()
        >>> figure = pv.plots.aggregated_posterior(model, guide, x, dimensions=[0, 3])
        >>> figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()
        ('z[0]', 'z[3]')
    """
    check_call(aggregated_posterior, locals())
    check_axes(None)
    shares = _checked_masses(masses)
    data = (x, *as_covariates(covariates)) if covariates else x
    device, programs = device_of(model, guide), (model, guide)
    batches = Minibatches(data, 100, device=device, name="x", programs=programs)
    columns = batches.columns or batches.in_memory()
    per_row = -(-NUM_SAMPLES // len(columns[0]))
    code = encode(model, guide, columns, site=site, num_samples=per_row, plate=plate, seed=seed)
    kept = rows_with_codes(code)
    rows = kept.nonzero()[:, 0]
    prior = PriorOfSite(model, guide, columns, code.site, seed, rows)
    of_prior = prior.samples()
    chosen = _chosen(dimensions, code.mean[kept], of_prior)
    names = names_of(code.site, chosen, of_prior.shape[1])
    of_guide, loc, scale = (
        each.double().reshape(-1, of_prior.shape[1])[:, chosen]
        for each in (code.samples[:, kept], code.mean[kept], code.std[kept])
    )
    of_prior = of_prior[:, chosen]
    kept = torch.randperm(len(of_guide), generator=torch.Generator().manual_seed(0))[:100_000]
    of_guide = of_guide[kept]
    grids = [grid_around(*each) for each in zip(of_guide.T, of_prior.T, strict=True)]
    q = gaussian_mixture(loc, scale, grids)
    p = prior.density(chosen, grids) or smoothed(of_prior, grids)
    if len(chosen) == 1:
        figure = new_figure(3.2)
        axes = figure.add_subplot()
        _draw_marginal(axes, grids[0], q.marginals[0], p.marginals[0])
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(xlabel=names[0], ylabel="density", ylim=(0, None))
        axes.legend(frameon=False)
        return figure
    figure = new_figure(5.2)
    (above, corner), (axes, beside) = figure.subplots(
        2, 2, width_ratios=(4, 1), height_ratios=(1, 4), sharex="col", sharey="row"
    )
    corner.remove()
    for marginal in (above, beside):  # after the main axes
        figure.delaxes(marginal)
        figure.add_axes(marginal)
    extremes = float(q.joint.max()), float(p.joint.max())
    across, up = (grid.numpy() for grid in grids)
    axes.contourf(
        across,
        up,
        q.joint.T.numpy(),
        levels=_increasing([*q.levels(of_guide, shares), extremes[0]]),
        colors=_SHADES[-len(shares) :],
    )
    lines = axes.contour(
        across,
        up,
        p.joint.T.numpy(),
        levels=_increasing(p.levels(of_prior, shares)),
        colors=RED,
        linestyles="--",
        linewidths=1.2,
    )
    percents = [f"{share:.0%}" for share in shares]
    axes.clabel(
        lines, fmt=dict(zip(lines.levels, percents, strict=True)), fontsize="small", colors=DARK
    )
    axes.set(xlabel=names[0], ylabel=names[1])
    axes.spines[["top", "right"]].set_visible(False)
    _draw_marginal(above, grids[0], q.marginals[0], p.marginals[0])
    _draw_marginal(beside, grids[1], q.marginals[1], p.marginals[1], upright=True)
    for each in (above, beside):
        each.spines[:].set_visible(False)
        each.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
    figure.legend(
        *above.get_legend_handles_labels(), frameon=False, ncols=2, loc="outside upper center"
    )
    figure.supxlabel(
        f"regions and lines hold {_listed(percents[::-1])} of each distribution", fontsize="small"
    )
    return figure


def _checked_masses(masses: Any) -> list[float]:
    """Return shares, the largest first.

    Raises:
        TypeError: The argument is not a sequence of numbers.
        ValueError: A share does not lie between 0 and 1, or there are more than four or none.
    """
    masses = as_list("masses", masses, "(0.5, 0.95)")
    if not all(map(is_number, masses)):
        raise TypeError(f"masses must hold numbers, got {shown(masses)}")
    shares = sorted({float(mass) for mass in masses}, reverse=True)
    if not 1 <= len(shares) <= len(_SHADES) or not all(0 < share < 1 for share in shares):
        raise ValueError(
            f"masses must be one to {len(_SHADES)} different numbers between 0 and 1, got "
            f"{shown(masses)}"
        )
    return shares


def _chosen(dimensions: Any, means: Tensor, of_prior: Tensor) -> list[int]:
    """Return one or two dimensions; see :func:`aggregated_posterior`."""
    activity = means.double().reshape(len(means), -1).var(0, correction=0) / of_prior.var(0)
    one = isinstance(dimensions, Sequence) and len(dimensions) == 1
    one |= isinstance(dimensions, np.ndarray) and dimensions.shape == (1,)
    return choose_dimensions(dimensions, activity, 1 if one or len(activity) == 1 else 2)


def _increasing(levels: list[float]) -> list[float]:
    """Return levels of contours, each larger than the one before, as matplotlib needs them."""
    for i in range(1, len(levels)):
        levels[i] = max(levels[i], np.nextafter(levels[i - 1], np.inf))
    return levels


def _draw_marginal(
    axes: Axes, grid: Tensor, q: Tensor, p: Tensor, *, upright: bool = False
) -> None:
    """Draw two densities over a grid, or beside it."""
    fill, lines = (axes.fill_betweenx, (p, grid)) if upright else (axes.fill_between, (grid, p))
    fill(grid.numpy(), q.numpy(), color=BLUE, alpha=0.6, linewidth=0, label="aggregated posterior")
    axes.plot(*(line.numpy() for line in lines), "--", color=RED, linewidth=1.2, label="prior")


def _listed(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
