"""Real data: Gaussian, Laplace and Student's t likelihoods."""

from __future__ import annotations

from abc import abstractmethod

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution, TorchDistributionMixin
from torch import Tensor, nn

from pyro_vae._utils.checks import positive_number
from pyro_vae._utils.init_args import records_init_args
from pyro_vae.distributions import _casting as casting
from pyro_vae.likelihoods._base import Likelihood
from pyro_vae.likelihoods._scales import OptimalScale, Scale, SharedScale, as_scale


class LocationScale(Likelihood):
    """A likelihood with a scale, and a location from the decoder.

    Args:
        decoder: network from z, and any covariates, to the locations of x.
        scale: a positive number, or a learned :class:`SharedScale`, :class:`ScalePerOutput` or
            :class:`ScaleFromDecoder`.
        event_dim: number of rightmost dimensions of x that form one data point.

    Raises:
        ValueError: ``event_dim`` is less than one, or the scale is not positive and finite.
        TypeError: The scale is neither a number nor one of these scales.
    """

    def __init__(self, decoder: nn.Module, scale: float | Scale = 1.0, event_dim: int = 1):
        super().__init__(decoder, event_dim)
        self.scale = as_scale("scale", scale)

    def forward(self, *inputs: Tensor) -> TorchDistributionMixin:
        """Return p(x|z), of batch shape (...), for z of shape ``(..., *latent event)``."""
        loc, *raw = self.outputs(1 + self.scale.parts, *inputs)
        return self.distribution(loc, self.scale(loc, *raw))

    @abstractmethod
    def distribution(self, loc: Tensor, scale: Tensor) -> TorchDistributionMixin:
        """Return the distribution with these parameters, with its event dimensions declared."""


class _WithOptimalScale(LocationScale):
    """A likelihood whose optimal scale is a function of the mean deviation from the location."""

    def __init__(
        self, decoder: nn.Module, scale: float | Scale | OptimalScale = 1.0, event_dim: int = 1
    ):
        optimal = isinstance(scale, OptimalScale)
        super().__init__(decoder, 1.0 if optimal else scale, event_dim)
        if optimal:
            self.scale = scale

    def forward(self, *inputs: Tensor) -> TorchDistributionMixin:
        """Return p(x|z), of batch shape (...), for z of shape ``(..., *latent event)``."""
        if not isinstance(self.scale, OptimalScale):
            return super().forward(*inputs)
        (loc,) = self.outputs(1, *inputs)
        return _AtOptimalScale(self, loc) if self.training else self.at_average(loc)

    def at_average(self, loc: Tensor) -> TorchDistributionMixin:
        """Return the distribution with the scale at the running average."""
        return self.distribution(loc, self._scale_of(self.scale.average))

    def at_best(self, loc: Tensor, value: Tensor) -> TorchDistributionMixin:
        """Return the distribution with the optimal scale for a value; update the average."""
        deviation = self.deviations(value - loc).detach().mean()
        self.scale.update(deviation)
        return self.distribution(loc, self._scale_of(deviation))

    def _scale_of(self, deviation: Tensor) -> Tensor:
        return self.scale_of(deviation).clamp(min=self.scale.least)

    @staticmethod
    @abstractmethod
    def deviations(residuals: Tensor) -> Tensor:
        """Return the deviations, whose mean determines the scale."""

    @staticmethod
    @abstractmethod
    def scale_of(deviation: Tensor) -> Tensor:
        """Return the optimal scale for a mean deviation."""


@records_init_args
class Normal(_WithOptimalScale):
    r""":math:`p(x|z) = \prod_d \mathcal{N}(x_d; f_d(z), \sigma_d^2)` for real x.

    Args:
        decoder: network from z, and any covariates, to the means f of x. With
            :class:`ScaleFromDecoder`, the unconstrained scales follow as a second block.
        scale: :math:`\sigma`, a positive number, a :class:`SharedScale`, :class:`ScalePerOutput`,
            :class:`ScaleFromDecoder` or :class:`OptimalScale`.
        event_dim: number of rightmost dimensions of x that form one data point.

    Raises:
        ValueError: ``event_dim`` is less than one, or the scale is not positive and finite.
        TypeError: The scale is neither a number nor one of these scales.

    Example:
        >>> import torch, pyro_vae as pv
        >>> scale = pv.likelihoods.SharedScale(initial=0.5)
        >>> likelihood = pv.likelihoods.Normal(pv.nets.MLP(2, [8], 5), scale=scale)
        >>> likelihood(torch.zeros(100, 2)).stddev[0, 0].item()
        0.5...
    """

    def distribution(self, loc: Tensor, scale: Tensor) -> TorchDistributionMixin:
        """Return independent Gaussians."""
        return casting.Normal(loc, scale).to_event(self.event_dim)

    @staticmethod
    def deviations(residuals: Tensor) -> Tensor:
        """Return the squared errors."""
        return residuals.square()

    @staticmethod
    def scale_of(deviation: Tensor) -> Tensor:
        """Return the square root of the mean squared error."""
        return deviation.sqrt()


@records_init_args
class Laplace(_WithOptimalScale):
    r""":math:`p(x|z) = \prod_d \frac1{2 b_d} e^{-|x_d - f_d(z)| / b_d}` for real x.

    Args:
        decoder: network from z, and any covariates, to the locations f of x. With
            :class:`ScaleFromDecoder`, the unconstrained scales follow as a second block.
        scale: b, a positive number, a :class:`SharedScale`, :class:`ScalePerOutput`,
            :class:`ScaleFromDecoder` or :class:`OptimalScale`.
        event_dim: number of rightmost dimensions of x that form one data point.

    Raises:
        ValueError: ``event_dim`` is less than one, or the scale is not positive and finite.
        TypeError: The scale is neither a number nor one of these scales.
    """

    def distribution(self, loc: Tensor, scale: Tensor) -> TorchDistributionMixin:
        """Return independent Laplace distributions."""
        return casting.Laplace(loc, scale).to_event(self.event_dim)

    @staticmethod
    def deviations(residuals: Tensor) -> Tensor:
        """Return the absolute errors."""
        return residuals.abs()

    @staticmethod
    def scale_of(deviation: Tensor) -> Tensor:
        """Return the mean absolute error."""
        return deviation


@records_init_args
class StudentT(LocationScale):
    r""":math:`p(x|z) = \prod_d t_\nu(x_d; f_d(z), \sigma_d)` for real x (Takahashi et al. 2018).

    Args:
        decoder: network from z, and any covariates, to the locations f of x. With
            :class:`ScaleFromDecoder`, the unconstrained scales follow as a second block.
        df: the degrees of freedom :math:`\nu`, a positive number. With None, one number is learned,
            initially five. It stays above one, so that the mean exists.
        scale: :math:`\sigma`, a positive number, a :class:`SharedScale`, :class:`ScalePerOutput`
            or :class:`ScaleFromDecoder`.
        event_dim: number of rightmost dimensions of x that form one data point.

    Raises:
        ValueError: ``event_dim`` is less than one, or ``df`` or the scale is not positive and
            finite.
        TypeError: The scale is neither a number nor one of these scales, or ``df`` is not a number.

    Example:
        >>> import torch, pyro_vae as pv
        >>> likelihood = pv.likelihoods.StudentT(pv.nets.MLP(2, [8], 5), df=None)
        >>> likelihood(torch.zeros(100, 2)).base_dist.df[0, 0].item()
        5.0...
    """

    def __init__(
        self,
        decoder: nn.Module,
        df: float | None = None,
        scale: float | Scale = 1.0,
        event_dim: int = 1,
    ):
        super().__init__(decoder, scale, event_dim)
        self._df = None if df is None else positive_number("df", df)
        self.df_above_one = SharedScale(initial=4.0) if df is None else None

    def distribution(self, loc: Tensor, scale: Tensor) -> TorchDistributionMixin:
        """Return independent t distributions."""
        df = loc.new_full((), self._df) if self._df is not None else 1 + self.df_above_one(loc)
        return casting.StudentT(df, loc, scale).to_event(self.event_dim)


class _AtOptimalScale(TorchDistribution):
    """A likelihood in training, whose scale is computed from the value that it scores.

    It has no closed-form KL divergence, because that would need a fixed scale.
    """

    arg_constraints = {"loc": constraints.real}  # noqa: RUF012 - as torch declares them
    has_rsample = True

    def __init__(
        self, likelihood: _WithOptimalScale, loc: Tensor, validate_args: bool | None = None
    ):
        self.likelihood, self.loc = likelihood, loc
        at = loc.dim() - likelihood.event_dim
        super().__init__(loc.shape[:at], loc.shape[at:], validate_args=validate_args)

    @constraints.dependent_property
    def support(self):
        """The support: real events."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape, _instance=None) -> _AtOptimalScale:
        """Return the distribution with a larger batch shape."""
        loc = self.loc.expand(torch.Size(batch_shape) + self.event_shape)
        return _AtOptimalScale(self.likelihood, loc, validate_args=self._validate_args)

    @property
    def mean(self) -> Tensor:
        """The mean, ``(*batch, *event)``."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """The variance at the running average, ``(*batch, *event)``."""
        return self.likelihood.at_average(self.loc).variance

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(x|z) at the optimal scale."""
        value = casting.value_for(self.loc, value)
        if self._validate_args:
            self._validate_sample(value)
        return self.likelihood.at_best(self.loc, value).log_prob(value)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        """Sample at the running average."""
        return self.likelihood.at_average(self.loc).rsample(sample_shape)
