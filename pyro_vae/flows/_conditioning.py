"""Autoregressive and coupling transforms built from functions of one number."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_vae.flows._base import FlowTransform
from pyro_vae.flows._elementwise import Elementwise


class Autoregressive(FlowTransform):
    """Maps each dimension by a function of it and the earlier ones, then reverses the order.

    So the next layer starts with the last dimension of this one. The map takes one pass of the
    network, the inverse takes D passes.

    Args:
        functions: the functions of one number.
        network: from x ``(..., D)`` to parameters ``(..., D, n)``; the parameters of a dimension
            depend only on the earlier dimensions.
    """

    def __init__(self, functions: Elementwise, network: Callable[[Tensor], Tensor]):
        super().__init__()
        self._functions, self._network = functions, network

    def map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(x) and log|det df/dx|."""
        parameters = self._network(x)
        y, log_slopes = self._functions.map(x.expand(parameters.shape[:-1]), parameters)
        return y.flip(-1), log_slopes.sum(-1)

    def unmap(self, y: Tensor) -> Tensor:
        """Return x such that f(x) = y."""
        y = y.flip(-1)
        x = torch.zeros_like(y)
        for _ in range(y.shape[-1]):  # each pass computes one more dimension correctly
            parameters = self._network(x)
            x = self._functions.unmap(y.expand(parameters.shape[:-1]), parameters)
        return x


class Coupling(FlowTransform):
    """Maps the second half of the dimensions by functions of the first, then reverses the order.

    Args:
        functions: the functions of one number.
        network: from the first half ``(..., D // 2)`` to parameters ``(..., D - D // 2, n)``.
    """

    def __init__(self, functions: Elementwise, network: Callable[[Tensor], Tensor]):
        super().__init__()
        self._functions, self._network = functions, network

    def map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(x) and log|det df/dx|."""
        first, second = self._halves(x)
        parameters = self._network(first)
        shape = parameters.shape[:-1]
        second, log_slopes = self._functions.map(second.expand(shape), parameters)
        return self._whole(first, second).flip(-1), log_slopes.sum(-1)

    def unmap(self, y: Tensor) -> Tensor:
        """Return x such that f(x) = y."""
        first, second = self._halves(y.flip(-1))
        parameters = self._network(first)
        second = self._functions.unmap(second.expand(parameters.shape[:-1]), parameters)
        return self._whole(first, second)

    @staticmethod
    def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
        half = x.shape[-1] // 2
        return x[..., :half], x[..., half:]

    @staticmethod
    def _whole(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first.expand(*second.shape[:-1], -1), second], -1)
