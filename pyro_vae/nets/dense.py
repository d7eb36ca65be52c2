"""Networks of dense layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import nn


class MLP(nn.Sequential):
    r"""A multilayer perceptron over the last dimension.

    Args:
        in_features: size of the last dimension of the input.
        hidden: sizes of the hidden layers, each followed by the activation.
        out_features: size of a last linear layer; without it the output is the last hidden layer,
            activation included, as an amortized guide's encoder wants it.
        activation: makes the nonlinearity between layers.

    Shape:
        (..., in_features) to (..., out_features or hidden[-1]), for any leading dimensions.

    Raises:
        ValueError: neither hidden layers nor ``out_features``; a size that is not positive.
        TypeError: ``hidden`` is a number.

    Example:
        >>> import torch, pyro_vae as pv
        >>> decoder = pv.nets.MLP(50, [200, 200], 784)
        >>> decoder(torch.zeros(5, 100, 50)).shape  # 5 particles, 100 data points
        torch.Size([5, 100, 784])
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int | None = None,
        activation: Callable[[], nn.Module] = nn.Tanh,
    ):
        if isinstance(hidden, int):
            raise TypeError(f"hidden must be a sequence of sizes, such as [{hidden}], got {hidden}")
        sizes = [in_features, *hidden]
        if min(sizes) < 1 or (out_features is not None and out_features < 1):
            raise ValueError(f"layer sizes must be positive, got {sizes} and {out_features}")
        if not hidden and out_features is None:
            raise ValueError("MLP needs a hidden layer or out_features, got neither")
        layers: list[nn.Module] = []
        for size, next_size in itertools.pairwise(sizes):
            layers += [nn.Linear(size, next_size), activation()]
        if out_features is not None:
            layers.append(nn.Linear(sizes[-1], out_features))
        super().__init__(*layers)
