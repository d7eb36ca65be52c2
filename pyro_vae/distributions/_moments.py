"""Means and standard deviations of distributions, in closed form or from samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import TransformedDistribution
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    IndependentTransform,
    Transform,
)

from pyro_vae._utils.numerics import split_at
from pyro_vae.distributions._circular import WrappedNormal, wrapped
from pyro_vae.distributions._supports import is_angle

GAUSSIANS = (dist.Normal, dist.MultivariateNormal, dist.LowRankMultivariateNormal)
_CONCENTRATED = 1000.0  # from here on, the series below has a relative error of less than 1e-12


def closed_form_moments(fn: Any) -> tuple[Tensor, Tensor] | None:
    """Return the mean and the standard deviation of a distribution, or None without closed form.

    A moment that does not exist, such as the mean of a Cauchy distribution, is NaN or infinite.
    Angles have a mean direction and a circular standard deviation (Mardia & Jupp 2000, section
    3.4.2).

    Args:
        fn: the distribution; not a Categorical, whose mean has no meaning, see :func:`one_hot`.

    Returns:
        Two tensors of shape ``(*batch, *event)``.
    """
    if is_angle(fn):
        return _angular_moments(fn)
    base = _base(fn)
    if isinstance(base, TransformedDistribution):
        inner = base.base_dist
        # The image of angles is numbers, and their linear moments are not those of the angles.
        before = None if is_angle(inner) else closed_form_moments(inner)
        if before is not None:
            gaussian = isinstance(_base(inner), GAUSSIANS)
            pushed = pushed_moments(
                before[0], before[1].square(), *base.transforms, gaussian=gaussian
            )
            if pushed is not None:
                return pushed[0], pushed[1].sqrt()
    mean = closed_form_mean(fn)
    try:
        return None if mean is None else (mean, fn.variance.sqrt())
    except NotImplementedError:
        return None


def closed_form_mean(fn: Any) -> Tensor | None:
    """Return the mean of a distribution, or None if it is unknown; NaN if it does not exist.

    Angles have a mean direction in [-pi, pi]. The shape is ``(*batch, *event)``.
    """
    base = _base(fn)
    if is_angle(fn):
        if isinstance(base, dist.SineBivariateVonMises):
            return wrapped(base.mean)  # the density is symmetric about it
        moments = _angular_moments(fn)
        return None if moments is None else moments[0]
    while isinstance(base, torch.distributions.MixtureSameFamily):
        base = _base(base.component_distribution)
    if isinstance(base, dist.ProjectedNormal):
        return None  # in Pyro, its mean attribute is a direction
    try:
        return fn.mean
    except NotImplementedError:
        return None


def pushed_moments(
    mean: Tensor, variance: Tensor, *transforms: Transform, gaussian: bool
) -> tuple[Tensor, Tensor] | None:
    """Return the mean and the variance of each number after some transforms, or None if unknown.

    They are known after affine maps of any distribution, and after one elementwise exponential of a
    Gaussian.

    Args:
        mean: means before the transforms.
        variance: variances before the transforms.
        *transforms: the transforms, in their order.
        gaussian: whether the numbers are Gaussian before the transforms.
    """
    for transform in _parts(transforms):
        if isinstance(transform, AffineTransform):
            mean = transform.loc + transform.scale * mean
            variance = torch.as_tensor(transform.scale).square() * variance
        elif isinstance(transform, ExpTransform) and gaussian:
            log_normal = dist.LogNormal(mean, variance.sqrt())
            mean, variance, gaussian = log_normal.mean, log_normal.variance, False
        else:
            return None
    return mean, variance


def _angular_moments(fn: Any) -> tuple[Tensor, Tensor] | None:
    """Return mean direction and circular standard deviation of angles, or None if unknown."""
    base = _base(fn)
    if isinstance(base, WrappedNormal):
        return wrapped(base.loc), base.scale
    if isinstance(base, torch.distributions.VonMises):
        variance = _von_mises_variance(base.concentration.double())
        return wrapped(base.loc), circular_std(variance).to(base.loc.dtype)
    if not isinstance(base, torch.distributions.MixtureSameFamily):
        return None
    component = base.component_distribution
    moments = _angular_moments(component)
    if moments is None:
        return None
    loc, std = (each.double() for each in moments)
    event_dim = len(component.event_shape)
    weights = base.mixture_distribution.probs.double()
    weights = weights.reshape(*weights.shape, *(1,) * event_dim)
    axis = -1 - event_dim
    of_component = -torch.expm1(-0.5 * std.square())
    pulls = weights * (1 - of_component)
    mean = torch.atan2((pulls * loc.sin()).sum(axis), (pulls * loc.cos()).sum(axis))
    away = 2 * (0.5 * (loc - mean.unsqueeze(axis))).sin().square()  # 1 - cos, without cancellation
    variance = (weights * (of_component + (1 - of_component) * away)).sum(axis)
    dtype = moments[0].dtype
    return mean.to(dtype), circular_std(variance).to(dtype)


def circular_std(variance: Tensor) -> Tensor:
    r"""Return :math:`\sqrt{-2 \log(1 - V)}` for the circular variance V of angles."""
    return (-2 * torch.log1p(-variance.clamp(0, 1))).sqrt()


def _von_mises_variance(concentration: Tensor) -> Tensor:
    r"""Return the circular variance, :math:`1 - I_1(\kappa) / I_0(\kappa)`, in float64.

    For a large concentration, use its expansion (Mardia & Jupp 2000, appendix 1), because the
    difference cancels.
    """
    small, large, is_small = split_at(_CONCENTRATED, concentration)
    bessel = 1 - torch.special.i1e(small) / torch.special.i0e(small)
    inverse = 1 / large
    series = inverse * (1 / 2 + inverse * (1 / 8 + inverse * (1 / 8 + inverse * 25 / 128)))
    return torch.where(is_small, bessel, series)


def one_hot(fn: Any) -> Any:
    """Return a Categorical as distribution of one-hot vectors; any other distribution unchanged."""
    base = _base(fn)
    if not isinstance(base, dist.Categorical | torch.distributions.Categorical):
        return fn
    return dist.OneHotCategorical(logits=base.logits).to_event(len(fn.event_shape))


class SampledMoments:
    """Averages samples; returns their mean, standard deviation and the error of the mean.

    Args:
        fn: the distribution of the samples. It shows whether they are angles, or levels of a
            Categorical, which are averaged as one-hot vectors.
    """

    def __init__(self, fn: Any):
        self._levels = _levels(fn)
        self._angles = is_angle(fn)
        self._count = 0
        self._center = torch.zeros(())  # near the mean, so that squares do not cancel
        self._sums: list[Tensor] = []

    def add(self, samples: Tensor) -> None:
        """Add samples ``(K, *shape)``."""
        if self._levels:
            samples = torch.nn.functional.one_hot(samples.long(), self._levels)
        z = samples.double()
        if not self._count:
            self._center = (
                torch.atan2(z.sin().sum(0), z.cos().sum(0)) if self._angles else z.mean(0)
            ).nan_to_num(0.0, 0.0, 0.0)
        z = z - self._center
        features = _circular_features(z) if self._angles else [z, z.square()]
        sums = [feature.sum(0) for feature in features]
        self._count += len(z)
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return the mean, the standard deviation and the standard error of the mean, float64.

        For angles, they are the mean direction, the circular standard deviation, and the circular
        standard error :math:`\sqrt{(1 - \rho_2) / (2 M R^2)}` (Fisher 1993, section 4.4.4).
        """
        averages = [each / self._count for each in self._sums]
        if not self._angles:
            mean, square = averages
            unbiased = self._count / max(1, self._count - 1)
            std = ((square - mean.square()).clamp(min=0) * unbiased).sqrt()
            return self._center + mean, std, std / math.sqrt(self._count)
        sin, away, half_of_double, square = averages
        mean, length = torch.atan2(sin, 1 - away), torch.hypot(sin, 1 - away)
        std = (-torch.log1p(-(2 * away - away.square() - sin.square()).clamp(0, 1))).sqrt()
        # The average of the squared sines of all angles, each less the mean direction.
        spread = mean.sin().square() + square * (2 * mean).cos() - half_of_double * (2 * mean).sin()
        error = (spread.clamp(min=0) / self._count).sqrt() / length
        return wrapped(self._center + mean), std, error


def _circular_features(angle: Tensor) -> list[Tensor]:
    r"""Return :math:`\sin a`, :math:`1 - \cos a`, :math:`\sin(2 a) / 2` and :math:`\sin^2 a`."""
    sin = angle.sin()
    return [sin, 2 * (angle / 2).sin().square(), sin * angle.cos(), sin.square()]


def _levels(fn: Any) -> int:
    """Return the number of levels of a Categorical, or zero for any other distribution."""
    base = _base(fn)
    is_categorical = isinstance(base, dist.Categorical | torch.distributions.Categorical)
    return base.logits.shape[-1] if is_categorical else 0


def _base(fn: Any) -> Any:
    """Return the distribution inside masks and ``Independent`` wrappers."""
    while isinstance(fn, torch.distributions.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def _parts(transforms: Iterable[Transform]) -> Iterator[Transform]:
    """Yield the parts of transforms, without ``Independent`` wrappers."""
    for transform in transforms:
        if isinstance(transform, ComposeTransform):
            yield from _parts(transform.parts)
        elif isinstance(transform, IndependentTransform):
            yield from _parts([transform.base_transform])
        else:
            yield transform
