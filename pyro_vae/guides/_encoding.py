"""What a guide asks of an encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyro_vae._utils.checks import require_batch


def features_of(encoder: Callable[..., Tensor], x: Tensor, *covariates: Any) -> Tensor:
    """Encode a minibatch: features of shape (B, F).

    Raises:
        TypeError: x is no dense tensor of real numbers.
        ValueError: x is empty; there is not one row of features for each datum.
    """
    require_batch("x", x)
    features = encoder(x, *covariates)
    if features.dim() < 2 or features.shape[0] != x.shape[0]:
        raise ValueError(
            f"the encoder must map x of shape {tuple(x.shape)} to features of shape "
            f"({x.shape[0]}, F), one row for each datum; got {tuple(features.shape)}"
        )
    return features.flatten(1)
