"""Scales of likelihoods: fixed, learned, decoded or optimal."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae._utils.checks import positive_number
from pyro_vae._utils.init_args import records_init_args
from pyro_vae._utils.numerics import MIN_SCALE, inverse_softplus_scale, softplus_scale


class Scale(nn.Module):
    """Positive numbers that broadcast with the outputs x of a likelihood.

    Attributes:
        parts: number of decoder outputs that the scale uses for each number of x.
    """

    parts = 0

    @abstractmethod
    def forward(self, outputs: Tensor, *raw: Tensor) -> Tensor:
        """Return the scales.

        Args:
            outputs: the decoder's first output block, ``(..., *event)``.
            *raw: the decoder's blocks for the scale, ``parts`` of them, each of that shape.
        """


@records_init_args
class FixedScale(Scale):
    """One fixed number. A number passed as a scale is converted to a FixedScale.

    Args:
        value: the number.
        name: name of the argument in error messages.

    Raises:
        TypeError: The value is not a number.
        ValueError: The value is not positive and finite.
    """

    def __init__(self, value: float, name: str = "scale"):
        super().__init__()
        self.value = positive_number(name, value)

    def forward(self, outputs: Tensor, *raw: Tensor) -> Tensor:
        """Return the scale, shape ()."""
        return outputs.new_full((), self.value)


@records_init_args
class SharedScale(Scale):
    r"""One learned number for all outputs.

    .. math:: \sigma = \mathrm{softplus}(r), \quad r \text{ learned}

    Args:
        initial: the initial scale.

    Raises:
        TypeError: ``initial`` is not a number.
        ValueError: ``initial`` is infinite, or is not above 1e-6, the lower limit of all scales.
    """

    def __init__(self, initial: float = 1.0):
        super().__init__()
        self.raw = nn.Parameter(torch.tensor(_raw_of(initial)))

    def forward(self, outputs: Tensor, *raw: Tensor) -> Tensor:
        """Return the scale, shape ()."""
        return softplus_scale(self.raw)


@records_init_args
class ScalePerOutput(Scale):
    """One learned number per output, or per group of outputs.

    Args:
        *shape: the shape of x, or one that broadcasts to it. (C, 1, 1) has one scale per channel.
        initial: the initial scale.

    Raises:
        TypeError: ``initial`` is not a number.
        ValueError: ``shape`` is empty or has a size that is not positive. Or ``initial`` is
            infinite or not above 1e-6. Or, in a call, ``shape`` does not broadcast to the outputs.
    """

    def __init__(self, *shape: int, initial: float = 1.0):
        super().__init__()
        if not shape or min(shape) < 1:
            raise ValueError(
                f"shape must be the positive sizes of x for ScalePerOutput, got {shape}"
            )
        self.raw = nn.Parameter(torch.full(shape, _raw_of(initial)))

    def forward(self, outputs: Tensor, *raw: Tensor) -> Tensor:
        """Return the scales, of the shape passed to the constructor."""
        shape = self.raw.shape
        last = outputs.shape[max(outputs.dim() - len(shape), 0) :]
        if len(last) < len(shape) or any(n not in (1, m) for n, m in zip(shape, last, strict=True)):
            raise ValueError(
                f"ScalePerOutput has scales of shape {tuple(shape)}, but the decoder returns "
                f"outputs of shape {tuple(outputs.shape)}: pass the shape of x"
            )
        return softplus_scale(self.raw)


@records_init_args
class ScaleFromDecoder(Scale):
    """One scale per output and data point, from a decoder with twice as many outputs as x.

    The scale is a softplus of the second half, shifted so that zero becomes a scale of one. If the
    mean can fit the data exactly, this scale can shrink to zero, and the density has no upper bound
    (Mattei & Frellsen 2018). Then regularize the scale, or use a fixed one.
    """

    parts = 1

    def forward(self, outputs: Tensor, *raw: Tensor) -> Tensor:
        """Return the scales, of the shape of x."""
        return softplus_scale(raw[0])


@records_init_args
class OptimalScale(nn.Module):
    r"""The optimal scale for each minibatch, in closed form (Rybkin, Daniilidis & Levine 2021).

    For a Gaussian likelihood with one scale, the optimal :math:`\sigma^2` is the mean squared error

    .. math:: \sigma_*^2 = \frac1{KBD} \sum_{kbd} (x_{bd} - \mu_d(z_{kb}))^2

    over all values scored in one call. For a Laplace likelihood, the scale is the mean absolute
    error.

    In training mode, densities use :math:`\sigma_*` as a constant. The gradient of the ELBO through
    it is zero, because it maximizes the ELBO. In evaluation mode, the scale comes from a running
    average of the error, so p(x|z) is an ordinary density. Samples use this average in both modes.
    Its initial value is one.

    All values have equal weight. So this scale is not optimal for a bound that weights particles,
    such as IWAE. Do not use it if some values have little or no weight. Examples are masks, as for
    padded sequences, and enumerated latent variables, whose improbable values are scored too.

    Args:
        momentum: weight of the latest minibatch in the running average.
        least: lower limit of the scale.

    Raises:
        TypeError: An argument is not a number.
        ValueError: ``momentum`` is not in (0, 1], or ``least`` is not positive.

    Example:
        >>> import torch, pyro_vae as pv
        >>> scale = pv.likelihoods.OptimalScale()
        >>> likelihood = pv.likelihoods.Normal(pv.nets.MLP(2, [8], 5), scale=scale)
        >>> z, x = torch.randn(100, 2), torch.randn(100, 5)
        >>> log_p = likelihood(z).log_prob(x)
        >>> torch.allclose(scale.average, (x - likelihood.decoder(z)).square().mean())
        True
    """

    differs_in_evaluation = True

    def __init__(self, momentum: float = 0.1, least: float = 1e-3):
        super().__init__()
        self.momentum = positive_number("momentum", momentum)
        if momentum > 1:
            raise ValueError(f"momentum must be at most 1, got {momentum}")
        self.least = positive_number("least", least)
        self.register_buffer("average", torch.ones(()))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, deviation: Tensor) -> None:
        """Update the running average with a minibatch's mean error, a tensor of shape ()."""
        later = self.average.lerp(deviation.to(self.average.dtype), self.momentum)
        self.average.copy_(torch.where(self.num_batches == 0, deviation, later))
        self.num_batches.add_(1)


def as_scale(name: str, value: Any) -> Scale:
    """Return a scale unchanged, and a number as a FixedScale.

    Raises:
        TypeError: The value is neither a scale nor a number.
        ValueError: The number is not positive and finite.
    """
    if isinstance(value, Scale):
        return value
    if isinstance(value, nn.Module | Tensor):
        raise TypeError(
            f"{name} must be a number, SharedScale(), ScalePerOutput(*shape) or "
            f"ScaleFromDecoder(), got {value!r}"
        )
    return FixedScale(positive_number(name, value), name)


def _raw_of(value: float) -> float:
    """Return the number that ``softplus_scale`` maps to an initial scale."""
    if positive_number("initial", value) <= MIN_SCALE:
        raise ValueError(f"initial must be above {MIN_SCALE:g}, got {value}")
    return inverse_softplus_scale(value)
