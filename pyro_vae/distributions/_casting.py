"""Distributions of real numbers that score values of any real dtype, including Booleans."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae._utils.checks import require_tensor
from pyro_vae._utils.numerics import split_at


def value_for(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a value to be scored, cast to a parameter's dtype unless it is floating-point.

    torch cannot subtract Booleans, and ``uint8`` counts would wrap around.

    Raises:
        TypeError: The value is not a dense tensor of real numbers.
        ValueError: The value is empty.
    """
    if 0 in require_tensor("the value to be scored", value).shape:
        raise ValueError(f"the value to be scored is empty, of shape {tuple(value.shape)}")
    return value if value.is_floating_point() else value.to(parameter.dtype)


class _OfLocation:
    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(x)."""
        return super().log_prob(value_for(self.loc, value))


class Normal(_OfLocation, dist.Normal):
    """Pyro's Normal for values of any real dtype."""


class Transformed(dist.TransformedDistribution):
    """Pyro's TransformedDistribution for values of any real dtype."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(x)."""
        return super().log_prob(value_for(self.base_dist.mean, value))


class Laplace(_OfLocation, dist.Laplace):
    """Pyro's Laplace for values of any real dtype."""


_LEAST_FOR_SERIES = 50.0


class StudentT(dist.StudentT):
    """Pyro's StudentT, without the cancellation of large terms at many degrees of freedom."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(x)."""
        value = value_for(self.loc, value)
        if self._validate_args:
            self._validate_sample(value)
        half = self.df / 2
        standard = (value - self.loc) / self.scale
        log_kernel = -(half + 0.5) * torch.log1p(standard.square() / self.df)
        return (
            log_kernel + _log_half_step(half) - 0.5 * (math.pi * self.df).log() - self.scale.log()
        )


def _log_half_step(x: Tensor) -> Tensor:
    r"""Return :math:`\log\Gamma(x + 1/2) - \log\Gamma(x)`.

    For large x, use the series of the Gamma functions. The first omitted term is below
    :math:`1 / (400 x^7)`.
    """
    small, large, is_small = split_at(_LEAST_FOR_SERIES, x)
    by_series = 0.5 * large.log() - 1 / (8 * large) + 1 / (192 * large**3) - 1 / (640 * large**5)
    by_gammas = torch.lgamma(small + 0.5) - torch.lgamma(small)
    return torch.where(is_small, by_gammas, by_series)
