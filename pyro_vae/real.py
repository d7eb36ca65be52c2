"""Distributions of real numbers that score numbers of any real type, truth values included."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

from pyro_vae.inputs import require_tensor


def value_for(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a value to be scored: what is no floating-point number in a parameter's type.

    torch takes no difference of truth values, and counts of ``uint8`` would wrap.

    Raises:
        TypeError: it is no dense tensor of real numbers.
        ValueError: it is empty.
    """
    if 0 in require_tensor("the value to be scored", value).shape:
        raise ValueError(f"the value to be scored is empty, of shape {tuple(value.shape)}")
    return value if value.is_floating_point() else value.to(parameter.dtype)


class _OfLocation:
    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(x)."""
        return super().log_prob(value_for(self.loc, value))


class Normal(_OfLocation, dist.Normal):
    """Pyro's."""


class Transformed(dist.TransformedDistribution):
    """Pyro's."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(x)."""
        return super().log_prob(value_for(self.base_dist.mean, value))


class Laplace(_OfLocation, dist.Laplace):
    """Pyro's."""


class StudentT(_OfLocation, dist.StudentT):
    """Pyro's."""
