"""Runs a guide's encoder and checks its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyro_vae._utils.checks import require_batch


def features_of(encoder: Callable[..., Tensor], x: Tensor, *covariates: Any) -> Tensor:
    """Return the encoder's features of a minibatch, (B, F).

    Raises:
        TypeError: x is not a dense tensor of real numbers.
        ValueError: x is empty, or the features do not have one row for each data point.
    """
    require_batch("x", x)
    features = encoder(x, *covariates)
    if features.dim() < 2 or features.shape[0] != x.shape[0]:
        raise ValueError(
            f"the encoder must map x of shape {tuple(x.shape)} to features of shape "
            f"({x.shape[0]}, F), one row for each data point; got {tuple(features.shape)}"
        )
    return features.flatten(1)
