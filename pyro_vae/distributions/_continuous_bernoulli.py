r"""Functions of the continuous Bernoulli distribution, proportional to :math:`e^{l x}` on [0, 1].

They use the logit l alone and are exact for logits of any size. Probabilities would be rounded to
zero or one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae._utils.numerics import split_at

# Sizes of the logit below which series are used. Their truncation errors are below 1e-13.
_NEAR_ZERO, _FAR_OF_VARIANCE = 0.1, 0.5
# Of the powers of the squared logit: (2 n - 1) B_2n / (2 n)!, with the Bernoulli numbers B.
_OF_VARIANCE = (
    1 / 12, -1 / 240, 1 / 6048, -1 / 172800, 1 / 5322240, -691 / 118879488000, 1 / 5748019200
)  # fmt: skip


def log_mass(logits: Tensor) -> Tensor:
    r"""Return :math:`\log\int_0^1 e^{l x} dx = \log((e^l - 1) / l)`."""
    size = logits.abs()
    square = size.clamp(max=1.0).square()
    near = 0.5 * logits + square * (1 / 24 - square * (1 / 2880 - square / 181440))
    _, safe, is_near = split_at(_NEAR_ZERO, size)
    far = logits.clamp(min=0.0) + torch.log(-torch.expm1(-safe) / safe)
    return torch.where(is_near, near, far)


def mean(logits: Tensor) -> Tensor:
    r"""Return the mean, :math:`1 / (1 - e^{-l}) - 1 / l`."""
    size = logits.abs()
    square = size.clamp(max=1.0).square()
    near = 0.5 + logits * (1 / 12 - square * (1 / 720 - square / 30240))
    _, safe, is_near = split_at(_NEAR_ZERO, size)
    below = 1 / safe - 1 / torch.expm1(safe)  # the mean at the logit -size
    return torch.where(is_near, near, torch.where(logits < 0, below, 1 - below))


def variance(logits: Tensor) -> Tensor:
    r"""Return the variance, :math:`1 / l^2 - e^{-l} / (1 - e^{-l})^2`."""
    size = logits.abs()
    square = size.clamp(max=1.0).square()
    near = torch.zeros_like(square)
    for coefficient in reversed(_OF_VARIANCE):
        near = coefficient + square * near
    _, safe, is_near = split_at(_FAR_OF_VARIANCE, size)
    far = safe.pow(-2) - torch.exp(-safe) / torch.expm1(-safe).square()
    return torch.where(is_near, near, far)
