r"""Angles: their support, a bijection from the real numbers, and a wrapped Gaussian.

An angle and the same angle plus :math:`2\pi` are one value. A density of angles has no finite
integral over the whole real line, so values here lie in :math:`[-\pi, \pi]`.
"""

from __future__ import annotations

import math

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import IndependentTransform, Transform
from torch.distributions.utils import broadcast_all
from torch.nn import functional as F

from pyro_vae._utils.numerics import split_at
from pyro_vae._utils.transform_config import register
from pyro_vae.distributions._casting import value_for

_TURN = 2 * math.pi
# Below this scale, log_prob sums over windings. From this scale on, it uses a Fourier series. The
# relative truncation error of both is below 1e-15.
_SWITCH, _WINDINGS, _WAVES = 1.8, 2, 4


class _Circle(constraints.interval):
    """The support of angles, in radians."""

    def __init__(self):
        super().__init__(-math.pi, math.pi)


circle = _Circle()


@register
class CircleTransform(Transform):
    r"""Map the real numbers onto the angles, :math:`y = \pi \tanh(x / 2)`.

    The circle is cut at :math:`\pm\pi`. Densities of transformed values are zero there.
    """

    domain = constraints.real
    codomain = circle
    bijective = True
    sign = +1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CircleTransform)

    def _call(self, x: Tensor) -> Tensor:
        return math.pi * _inside(torch.tanh(x / 2))

    def _inverse(self, y: Tensor) -> Tensor:
        return 2 * torch.atanh(_inside(y / math.pi))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the logarithm of the derivative dy/dx."""
        return math.log(_TURN) - F.softplus(x, threshold=40.0) - F.softplus(-x, threshold=40.0)


@biject_to.register(_Circle)
def _onto_circle(constraint: _Circle) -> CircleTransform:
    return CircleTransform()


def _inside(share: Tensor) -> Tensor:
    least = torch.finfo(share.dtype).eps
    return share.clamp(least - 1, 1 - least)


def maps_onto_angles(bijection: Transform) -> bool:
    """Return True if a bijection is an elementwise map from the reals onto angles."""
    while isinstance(bijection, IndependentTransform):
        bijection = bijection.base_transform
    return isinstance(bijection, CircleTransform)


class WrappedNormal(TorchDistribution):
    r"""A Gaussian wrapped around the circle (Mardia & Jupp 2000, section 3.5.7).

    .. math::
        q(\theta) = \sum_{k \in \mathbb{Z}} \mathcal{N}(\theta + 2 \pi k; \mu, \sigma^2)
            = \frac{1}{2 \pi} \Bigl(1 + 2 \sum_{n \ge 1} e^{-n^2 \sigma^2 / 2}
              \cos n (\theta - \mu)\Bigr)

    Below a scale of 1.8 the first sum is computed, and from there on the second. Both have a fixed
    number of terms. Samples are reparameterized. Their gradient is correct for expectations of
    functions that are continuous on the circle, such as functions of sine and cosine.

    Args:
        loc: :math:`\mu`, in radians.
        scale: :math:`\sigma`, in radians.

    Shape:
        the batch shape is the broadcast shape of loc and scale. Events are scalars in
        :math:`[-\pi, \pi]`.

    Raises:
        ValueError: With validation on, a scale is not positive.

    Example:
        >>> import torch
        >>> from pyro_vae.distributions._circular import WrappedNormal
        >>> q = WrappedNormal(torch.tensor(3.0), torch.tensor(0.5))
        >>> turned = 2 * torch.pi - 3.1  # as far from 3 as -3.1, on the other side
        >>> mirrored = torch.tensor(6.0 - turned)
        >>> torch.allclose(q.log_prob(torch.tensor(-3.1)), q.log_prob(mirrored), atol=1e-4)
        True
    """

    arg_constraints = {  # noqa: RUF012 - as torch declares them
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    support = circle
    has_rsample = True

    def __init__(
        self, loc: Tensor | float, scale: Tensor | float, validate_args: bool | None = None
    ):
        self.loc, self.scale = broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None) -> WrappedNormal:
        """Return the distribution with a larger batch shape."""
        new = self._get_checked_instance(WrappedNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        super(WrappedNormal, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of angles."""
        value = value_for(self.loc, value)
        if self._validate_args:
            self._validate_sample(value)
        offset = wrapped(value - self.loc)
        near, far, is_near = split_at(_SWITCH, self.scale)
        numbers = torch.arange(-_WINDINGS, _WINDINGS + 1, dtype=near.dtype, device=near.device)
        turns = (offset.unsqueeze(-1) + _TURN * numbers) / near.unsqueeze(-1)
        windings = (-0.5 * turns.square()).logsumexp(-1) - near.log() - 0.5 * math.log(_TURN)
        numbers = torch.arange(1, _WAVES + 1, dtype=far.dtype, device=far.device)
        damping = torch.exp(-0.5 * (numbers * far.unsqueeze(-1)).square())
        waves = (damping * torch.cos(numbers * offset.unsqueeze(-1))).sum(-1)
        fourier = torch.log1p(2 * waves) - math.log(_TURN)
        return torch.where(is_near, windings, fourier)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        """Sample angles in [-pi, pi]."""
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return wrapped(self.loc + self.scale * noise)


def wrapped(angle: Tensor) -> Tensor:
    """Return the equal angles in [-pi, pi], with a gradient of one."""
    return torch.remainder(angle + math.pi, _TURN) - math.pi
