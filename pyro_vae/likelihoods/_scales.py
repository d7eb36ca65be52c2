"""Scales of likelihoods: fixed, learned, given by the decoder, or the best one."""

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
        parts: how many numbers of the decoder it takes for each number of x.
    """

    parts = 0

    @abstractmethod
    def forward(self, outputs: Tensor, *raw: Tensor) -> Tensor:
        """Return the scales.

        Args:
            outputs: what the decoder gives first, ``(..., *event)``.
            *raw: what it gives for the scale, of that shape: ``parts`` of them.
        """


@records_init_args
class FixedScale(Scale):
    """One number, not learned; a number given as a scale becomes this.

    Args:
        value: the number.
        name: what messages call it.

    Raises:
        TypeError: it is no number.
        ValueError: it is not positive, or infinite.
    """

    def __init__(self, value: float, name: str = "scale"):
        super().__init__()
        self.value = positive_number(name, value)

    def forward(self, outputs: Tensor, *raw: Tensor) -> Tensor:
        """Return the scale, shape ()."""
        return outputs.new_full((), self.value)

    def extra_repr(self) -> str:
        """Show the number."""
        return f"{self.value:g}"


@records_init_args
class SharedScale(Scale):
    r"""One learned number for all outputs.

    .. math:: \sigma = \mathrm{softplus}(r), \quad r \text{ learned}

    Args:
        initial: where it begins.

    Raises:
        TypeError: ``initial`` is no number.
        ValueError: ``initial`` is not above 1e-6, below which no scale falls, or infinite.
    """

    def __init__(self, initial: float = 1.0):
        super().__init__()
        self.raw = nn.Parameter(torch.tensor(_raw_of(initial)))

    def forward(self, outputs: Tensor, *raw: Tensor) -> Tensor:
        """Return the scale, shape ()."""
        return softplus_scale(self.raw)


@records_init_args
class ScalePerOutput(Scale):
    """A learned number for each output, or for each of several groups of them.

    Args:
        *shape: that of x, or one that broadcasts to it: (C, 1, 1) has a scale for each channel.
        initial: where they begin.

    Raises:
        TypeError: ``initial`` is no number.
        ValueError: there is no size, or one is not positive; ``initial`` is not above 1e-6, or
            infinite; when called, the outputs are of another shape.
    """

    def __init__(self, *shape: int, initial: float = 1.0):
        super().__init__()
        if not shape or min(shape) < 1:
            raise ValueError(
                f"ScalePerOutput needs the sizes of x as its shape, all positive, got {shape}"
            )
        self.raw = nn.Parameter(torch.full(shape, _raw_of(initial)))

    def forward(self, outputs: Tensor, *raw: Tensor) -> Tensor:
        """Return the scales, of the shape given."""
        shape = self.raw.shape
        last = outputs.shape[max(outputs.dim() - len(shape), 0) :]
        if len(last) < len(shape) or any(n not in (1, m) for n, m in zip(shape, last, strict=True)):
            raise ValueError(
                f"ScalePerOutput has scales of shape {tuple(shape)}, but the decoder gives outputs "
                f"of shape {tuple(outputs.shape)}: pass the shape of x"
            )
        return softplus_scale(self.raw)


@records_init_args
class ScaleFromDecoder(Scale):
    """A number for each output and datum: the decoder gives twice as many numbers as x has.

    The second half passes a softplus, moved so that zero becomes a scale of one. Where the mean can
    come as near to the data as it likes, such a scale can fall, and the density rise, without end
    (Mattei & Frellsen 2018): see that it has a reason to stay, or fix it.
    """

    parts = 1

    def forward(self, outputs: Tensor, *raw: Tensor) -> Tensor:
        """Return the scales, of the shape of x."""
        return softplus_scale(raw[0])


@records_init_args
class OptimalScale(nn.Module):
    r"""The best scale for each minibatch, in closed form (Rybkin, Daniilidis & Levine 2021).

    For a Gaussian likelihood with one scale, the best :math:`\sigma^2` is the mean squared error,

    .. math:: \sigma_*^2 = \frac1{KBD} \sum_{kbd} (x_{bd} - \mu_d(z_{kb}))^2

    over all values that are scored at once. In training a density is taken with that, as a
    constant: the gradient of the ELBO through :math:`\sigma_*` is zero, since it is a maximum. A
    running average is kept, and is the scale in evaluation mode, where p(x|z) is so a density like
    any other; samples are drawn with it too. Before any training it is one. For a Laplace
    likelihood, the scale is the mean absolute error.

    Every value counts alike. So it is not the best scale of a bound that weighs particles, such as
    IWAE; and not to be used where some of the values hardly count or do not: with enumerated
    latents, whose improbable values are scored too, or with masks, under padded sequences say.

    Args:
        momentum: weight of the latest minibatch in the running average.
        least: the scale does not fall below it.

    Raises:
        TypeError: an argument is no number.
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
        """Take a minibatch's mean squared or absolute error, shape (), into the average."""
        later = self.average.lerp(deviation.to(self.average.dtype), self.momentum)
        self.average.copy_(torch.where(self.num_batches == 0, deviation, later))
        self.num_batches.add_(1)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"momentum={self.momentum:g}, minimum={self.least:g}"


def as_scale(name: str, value: Any) -> Scale:
    """Return a scale as it is, and a number as a fixed one.

    Raises:
        TypeError: it is neither.
        ValueError: the number is not positive, or infinite.
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
