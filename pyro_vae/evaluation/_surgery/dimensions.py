r"""The mutual information of each dimension of a latent and the data.

.. math::
    \mathrm{KL}(q_{agg}(z) \| p(z)) = \underbrace{\sum_j I_q[x, z_j] - I_q[x, z]}_{\text{total
    correlation}} + \underbrace{\mathrm{rate} - \sum_j I_q[x, z_j]}_{\sum_j
    \mathrm{KL}(q_{agg}(z_j) \| p(z_j))}

This is eq. 2 of Chen et al. (2018) for posteriors and a prior with independent dimensions, because
the rate of a dimension is the sum of its mutual information and its marginal KL. So no integral
contains the density of the prior, which may have kinks, jumps and heavy tails.

A dimension of q_agg is a mixture of N Gaussians on the line. The information is an integral over
it, computed by quadrature without sampling error. The trapezoid rule with a step h integrates a
Gaussian of standard deviation s with a relative error of 2 exp(-2 pi^2 s^2 / h^2). The logarithm of
q_agg varies faster between two Gaussians that are far apart, where q_agg is small. The error of the
information of a data point is then up to about 2e-5 nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.runs import as_guide, replay, trace_of
from pyro_vae._programs.sites import (
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

_REACH = 9.0  # standard deviations; a Gaussian has a mass of 1e-18 outside
_STEPS = 2.0  # per smallest standard deviation, for a relative error of 1e-34
_MOST_DENSITIES = 20_000_000_000  # they take under a minute
# Per dimension. With more, matrix products lose digits and a grid fills the memory.
_MOST_INTERVALS = 2 * WIDEST * _STEPS


def has_independent_prior(model: Program, guide: Program, batch: Batch) -> bool:
    """Return whether the dimensions of the prior are independent, without a mask or a scale.

    Args:
        model: program of p(x, z), with the same prior for all data points.
        guide: program of q(z|x).
        batch: a minibatch.

    Returns:
        False also if the model has several latents.
    """
    guide_trace = trace_of(as_guide(guide), *batch)
    trace = trace_of(replay(model, guide_trace), *batch)
    latents = [site for site in random_sites(trace) if not site["is_observed"]]
    if len(latents) != 1:
        return False
    (site,) = latents
    plates = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    scale = own_scale(site)
    unscaled = mask_of(site) is None and not isinstance(scale, Tensor) and scale == 1
    if len(plates) != 1 or data_frame(site) is None or plates[0].dim != -1 or not unscaled:
        return False
    return not base_distribution(site["fn"]).event_shape


@torch.no_grad()
def information_of_dimensions(
    q: DiagonalGaussians, group: Group, advance: Callable[[int], None] = lambda count: None
) -> Tensor | None:
    r"""Return each data point's contribution to the mutual information of each dimension.

    It is :math:`\int q(z_j|x_n) \log (q(z_j|x_n) / q_{agg}(z_j)) \, dz_j`. Its average over the
    data is the mutual information. Its spread yields the sampling error, because to first order a
    data point changes the information through this integral alone.

    In a group, each process integrates for its own data points. The densities on the grid are
    summed over the processes.

    Args:
        q: the posteriors of this process's data points.
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
        center = (low[number] + high[number]) / 2
        left, right = (
            quadratic(grid.unsqueeze(1) - center),
            log_density_weights(loc - center, scale),
        )
        density = group.sum(row_sums(left, right, check=group.check)) / count
        step = (ends[1] - ends[0]) / (size - 1)
        parts.append(row_sums(right.T, left.T, density.log() * step, group.check))
        advance(1)
    return -0.5 * math.log(2 * math.pi * math.e) - q.scale.log() - torch.stack(parts, dim=1)


def _extent(q: DiagonalGaussians, group: Group) -> tuple[int, Tensor, Tensor, Tensor]:
    """Return N, the ends of the grids and the smallest standard deviations, over all processes."""
    count, device = len(q.loc), q.loc.device
    ends = [q.loc - _REACH * q.scale, -q.loc - _REACH * q.scale, q.scale]
    found = group.gather((count, *(each.amin(0) for each in ends)) if count else None)
    counts, *least = zip(*(each for each in found if each is not None), strict=True)
    low, minus_high, narrowest = (torch.stack(each).amin(0).to(device) for each in least)
    return sum(counts), low, -minus_high, narrowest
