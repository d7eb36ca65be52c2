"""What a guide asks of an encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def features_of(encoder: Callable[..., Tensor], x: Tensor, *covariates: Any) -> Tensor:
    """Encode a minibatch: features of shape (B, F).

    Raises:
        ValueError: there is not one row of features for each datum.
    """
    features = encoder(x, *covariates)
    if features.dim() < 2 or features.shape[0] != x.shape[0]:
        raise ValueError(
            f"the encoder must map x of shape {tuple(x.shape)} to features of shape "
            f"({x.shape[0]}, F), one row for each datum; got {tuple(features.shape)}"
        )
    return features.flatten(1)
