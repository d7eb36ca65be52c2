"""Likelihoods of data with missing numbers: independent numbers, without those that are NaN."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, biject_to
from torch.distributions.utils import _sum_rightmost

from pyro_vae._utils.checks import positive_integer
from pyro_vae.distributions._supports import support_of


class NanMasked(dist.Independent):
    r"""A distribution of independent numbers that leaves out missing numbers of a value.

    .. math:: \log p(x_{obs}) = \sum_{d \,:\, x_d \text{ is finite}} \log p_d(x_d)

    Numbers that are NaN or infinite are missing. They add zero to the log-density and to every
    gradient, so this is the density of the observed numbers (Nazabal et al. 2020). Inference from
    it is valid if the numbers are missing at random (Rubin 1976). Samples, mean and variance are
    those of all numbers. Integers and Booleans cannot be missing.

    The result is a ``dist.Independent``, as ``dist.Normal(...).to_event(n)`` is. Pyro's
    ``NanMaskedMultivariateNormal`` does the same for a Gaussian with a full covariance.

    Args:
        distribution: a distribution of single numbers, such as a ``Normal``, or an ``Independent``
            of one.
        event_dims: number of rightmost batch dimensions that become event dimensions, as in
            ``to_event``.
        validate_args: whether to check arguments.

    Shape:
        The shapes of ``distribution.to_event(event_dims)``.

    Raises:
        TypeError: ``distribution`` is not a distribution.
        ValueError: The numbers of an event are not independent. Or there are fewer than
            ``event_dims`` batch dimensions.

    Example:
        >>> import torch, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> p = pv.distributions.NanMasked(dist.Normal(torch.zeros(3), 1.0).to_event(1))
        >>> observed = p.log_prob(torch.tensor([0.5, torch.nan, -1.0]))
        >>> torch.equal(observed, dist.Normal(0.0, 1.0).log_prob(torch.tensor([0.5, -1.0])).sum())
        True
    """

    def __init__(
        self,
        distribution: Distribution,
        event_dims: int = 0,
        validate_args: bool | None = None,
    ):
        event_dims = positive_integer("event_dims", event_dims, minimum=0)
        if not isinstance(distribution, Distribution):
            raise TypeError(
                "distribution must be a Pyro distribution of single numbers, got "
                f"{type(distribution).__name__}"
            )
        while isinstance(distribution, Independent):
            event_dims += distribution.reinterpreted_batch_ndims
            distribution = distribution.base_dist
        if distribution.event_shape:
            raise ValueError(_refusal(distribution))
        if event_dims > len(shape := distribution.batch_shape):
            raise ValueError(
                "event_dims must leave an event of at most as many dimensions as the distribution "
                f"has, {len(shape)} (batch shape {tuple(shape)}), got {event_dims} in all"
            )
        super().__init__(distribution, event_dims, validate_args=validate_args)

    def expand(
        self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: None = None
    ) -> NanMasked:
        """Return the distribution with a larger batch shape."""
        shape = torch.Size(batch_shape) + self.event_shape
        count = self.reinterpreted_batch_ndims
        return NanMasked(self.base_dist.expand(shape), count, self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p of the numbers of a value that are finite, of the batch shape."""
        if not value.is_floating_point():
            return super().log_prob(value)
        observed = value.isfinite()
        # A mask alone is not enough: the gradient of a NaN times zero is NaN.
        value = torch.where(observed, value, _point_of(self.base_dist, value))
        log_prob = self.base_dist.log_prob(value)
        log_prob = torch.where(observed, log_prob, torch.zeros_like(log_prob))
        return _sum_rightmost(log_prob, self.reinterpreted_batch_ndims)


def mask_missing(distribution: Distribution) -> Distribution:
    """Return a distribution as :class:`NanMasked`, inside of any masks and expansions.

    Raises:
        ValueError: The numbers of an event are not independent.
    """
    if isinstance(distribution, NanMasked):
        return distribution
    if distribution.event_shape and isinstance(distribution, dist.MaskedDistribution):
        return dist.MaskedDistribution(mask_missing(distribution.base_dist), distribution._mask)
    if distribution.event_shape and isinstance(distribution, ExpandedDistribution):
        return mask_missing(distribution.base_dist).expand(distribution.batch_shape)
    return NanMasked(distribution)


def _point_of(distribution: Distribution, like: Tensor) -> Tensor:
    """Return a number inside the support of a distribution, as a tensor like another one.

    A continuous support may include bounds at which the density is zero or infinite. So the value
    is inside of them.
    """
    if not distribution.support.is_discrete:
        return biject_to(support_of(distribution))(like.new_zeros(()))
    lower = getattr(distribution.support, "lower_bound", 0)
    return lower.to(like) if isinstance(lower, Tensor) else like.new_full((), lower)


def _refusal(distribution: Distribution) -> str:
    name = type(distribution).__name__
    remedy = (
        "Use Pyro's NanMaskedMultivariateNormal"
        if isinstance(distribution, MultivariateNormal)
        else "Use a distribution of single numbers with .to_event(n), such as a Normal"
    )
    return (
        f"missing numbers can be left out of a distribution of independent numbers only, got a "
        f"{name} of event shape {tuple(distribution.event_shape)}. {remedy}"
    )
