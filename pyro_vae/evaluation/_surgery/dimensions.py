r"""The KL from each dimension of the aggregated posterior to that of the prior.

.. math::
    \mathrm{KL}(q_{agg}(z) \| p(z)) = \underbrace{\mathrm{KL}\Big(q_{agg}(z) \Big\| \prod_j
    q_{agg}(z_j)\Big)}_{\text{total correlation}}
    + \underbrace{\sum_j \mathrm{KL}(q_{agg}(z_j) \| p(z_j))}_{\text{dimension-wise KL}}

(Chen et al. 2018, eq. 2) for a prior with independent dimensions. A dimension of q_agg is a
mixture of N Gaussians on the line. Its KL is a one-dimensional integral, computed by quadrature
without sampling error. The trapezoid rule with a step h integrates a Gaussian of standard
deviation s with a relative error of 2 exp(-2 pi^2 s^2 / h^2).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.runs import as_guide, replay, trace_of
from pyro_vae._programs.sites import (
    Site,
    base_distribution,
    data_frame,
    mask_of,
    own_scale,
    random_sites,
)
from pyro_vae.datasets._minibatches import Batch
from pyro_vae.evaluation._group import Group
from pyro_vae.evaluation._surgery.gaussians import DiagonalGaussians
from pyro_vae.evaluation._surgery.pairwise import (
    WIDEST,
    log_density_weights,
    quadratic,
    row_sums,
)

LogPrior = Callable[[Tensor], Tensor]

_REACH = 9.0  # standard deviations; a Gaussian has a mass of 1e-18 outside
_STEPS = 2.0  # per smallest standard deviation, for a relative error of 1e-34
_MOST_DENSITIES = 20_000_000_000  # they take under a minute
# Per dimension. With more, matrix products lose digits and a grid fills the memory.
_MOST_INTERVALS = 2 * WIDEST * _STEPS


def independent_prior(model: Program, guide: Program, batch: Batch) -> LogPrior | None:
    """Return the log-density of each dimension of the prior; None if they are not independent.

    Args:
        model: program of p(x, z), with the same prior for all data points.
        guide: program of q(z|x).
        batch: a minibatch.

    Returns:
        A function of values (G, d). None if the model has several latents, or if its prior has
        dependent dimensions, a mask or a scale.
    """
    if _only_latent(model, guide, batch) is None:
        return None
    site = _only_latent(model, guide, tuple(column[:1] for column in batch))
    each, dtype = base_distribution(site["fn"]), site["value"].dtype

    def log_prior(values: Tensor) -> Tensor:
        rows = values.to(dtype).reshape(len(values), 1, *site["fn"].event_shape)
        return each.log_prob(rows).double().reshape(len(values), -1)

    return log_prior


@torch.no_grad()
def dimension_wise_kl(
    q: DiagonalGaussians,
    log_prior: LogPrior,
    group: Group,
    advance: Callable[[int], None] = lambda count: None,
) -> Tensor | None:
    r"""Return each data point's contribution to :math:`\mathrm{KL}(q_{agg}(z_j) \| p(z_j))`.

    It is :math:`\int q(z_j|x_n) \log (q_{agg}(z_j) / p(z_j)) \, dz_j`. Its average over the data
    is the KL. Its spread yields the sampling error of the KL, because to first order a data point
    changes the KL through this integral alone.

    In a group, each process integrates for its own data points. The densities on the grid are
    summed over the processes.

    Args:
        q: the posteriors of this process's data points.
        log_prior: log-density of each dimension, a function of values (G, d).
        group: the processes.
        advance: called with the number of dimensions that are done.

    Returns:
        Shape (n, d), in nats, float64. None if posteriors are too narrow for a grid.
    """
    count, low, high, narrowest = _extent(q, group)
    intervals = _STEPS * (high - low) / narrowest
    if not (intervals.sum() * count < _MOST_DENSITIES and intervals.max() < _MOST_INTERVALS):
        return None
    parts = []
    for number, steps in enumerate(intervals.tolist()):
        loc, scale = q.loc[:, number : number + 1], q.scale[:, number : number + 1]
        size = math.ceil(steps) + 1
        ends = (low[number].item(), high[number].item())
        grid = torch.linspace(*ends, size, dtype=loc.dtype, device=loc.device)
        log_p = log_prior(grid.unsqueeze(1).expand(-1, len(intervals)))[:, number]
        center = (low[number] + high[number]) / 2
        left, right = (
            quadratic(grid.unsqueeze(1) - center),
            log_density_weights(loc - center, scale),
        )
        density = group.sum(row_sums(left, right, check=group.check)) / count
        step = (ends[1] - ends[0]) / (size - 1)
        log_ratio = (density.log() - log_p) * step
        parts.append(row_sums(right.T, left.T, log_ratio, group.check))
        advance(1)
    return torch.stack(parts, dim=1)


def _extent(q: DiagonalGaussians, group: Group) -> tuple[int, Tensor, Tensor, Tensor]:
    """Return N, the ends of the grids and the smallest standard deviations, over all processes."""
    count, device = len(q.loc), q.loc.device
    ends = [q.loc - _REACH * q.scale, -q.loc - _REACH * q.scale, q.scale]
    found = group.gather((count, *(each.amin(0) for each in ends)) if count else None)
    counts, *least = zip(*(each for each in found if each is not None), strict=True)
    low, minus_high, narrowest = (torch.stack(each).amin(0).to(device) for each in least)
    return sum(counts), low, -minus_high, narrowest


def _only_latent(model: Program, guide: Program, batch: Batch) -> Site | None:
    """Return the model's latent site; None if its dimensions cannot be integrated one by one.

    It must be the only latent, have independent dimensions, and be inside the plate "data" alone,
    without a mask or a scale.
    """
    guide_trace = trace_of(as_guide(guide), *batch)
    trace = trace_of(replay(model, guide_trace), *batch)
    latents = [site for site in random_sites(trace) if not site["is_observed"]]
    if len(latents) != 1:
        return None
    (site,) = latents
    plates = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    scale = own_scale(site)
    unscaled = mask_of(site) is None and not isinstance(scale, Tensor) and scale == 1
    if len(plates) != 1 or data_frame(site) is None or plates[0].dim != -1 or not unscaled:
        return None
    return None if base_distribution(site["fn"]).event_shape else site
