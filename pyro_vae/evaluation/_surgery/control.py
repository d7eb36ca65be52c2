"""A control variate for the mutual information: the rate in closed form minus the sampled rate."""

from __future__ import annotations

import torch
from torch import Tensor

_FEWEST_TO_REGRESS = 30


def moments(values: Tensor, noise: Tensor) -> Tensor:
    """Return the averages over codes, and their covariances with the average of a noise.

    Args:
        values: of K codes for each of n data points, (K, n).
        noise: of the same codes, (K, n).

    Returns:
        Shape (n, 2). The covariance is estimated from the spread of the codes of the data point. It
        is zero for K = 1.
    """
    count = len(values)
    products = (values * (noise - noise.mean(0))).sum(0)
    return torch.stack([values.mean(0), products / max(1, count * (count - 1))], dim=1)


def controlled(values: Tensor, noise: Tensor, variance: Tensor, num_particles: int) -> Tensor:
    """Subtract from the values their regression on a noise with expectation zero.

    The noise is the rate in closed form minus the sampled rate. The regression interpolates between
    two estimates of the marginal KL. The first is the rate minus the sampled mutual information,
    which is exact if the information is saturated at log N. The second is the sampled
    log q_agg - log p, which is exact if the aggregated posterior is the prior.

    The coefficient is that of codes of the same data point. With many particles, the values of
    different data points differ far more than the averages of the noise, and would hide it. A
    single particle leaves no other choice.

    The values are returned unchanged in three cases. With few codes, the coefficient overfits the
    noise, and the standard errors are too small. With an infinite rate, it is undefined. A mean of
    more than four standard errors shows that the noise has rare large values which these codes do
    not have, as for a discrete latent with one likely value. The regression would then move the
    values by a multiple of that mean.

    Args:
        values: the :func:`moments` of the values, (n, 2).
        noise: averages of the noise over codes, (n,).
        variance: their variances, from the spread of the codes of each data point, (n,).
        num_particles: K.

    Returns:
        Shape (n,).
    """
    values, covariance = values.unbind(1)
    if num_particles == 1:
        centered = noise - noise.mean()
        covariance, variance = values * centered, centered.square()
    total = variance.sum()
    is_centered = noise.mean().abs() <= 4 * total.sqrt() / len(noise)  # false for NaN
    num_codes = len(values) * max(1, num_particles - 1)
    if num_codes < _FEWEST_TO_REGRESS or total == 0 or not is_centered:
        return values
    return values - covariance.sum() / total * noise
