"""Runs a guide's encoder and checks its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyro_vae._utils.checks import require_batch
from pyro_vae._utils.network_outputs import output_of

ONE_TENSOR_OF_FEATURES = (
    "Return the features alone, such as the last state of nn.LSTM or nn.GRU. The guide adds the "
    "layer from features to parameters, so no location and scale are needed"
)


def features_of(encoder: Callable[..., Tensor], x: Tensor, *covariates: Any) -> Tensor:
    """Return the encoder's features of a minibatch, (B, F).

    Raises:
        TypeError: x is not a dense tensor of real numbers. Or the encoder does not return a tensor,
            or does not take the covariates.
        ValueError: x is empty, or the features do not have one row for each data point.
    """
    require_batch("x", x)
    features = output_of("encoder", encoder, x, *covariates, use=ONE_TENSOR_OF_FEATURES)
    if features.dim() < 2 or features.shape[0] != x.shape[0]:
        raise ValueError(
            f"the encoder must map x of shape {tuple(x.shape)} to features of shape "
            f"({x.shape[0]}, F), one row for each data point; got {tuple(features.shape)}"
        )
    return features.flatten(1)
