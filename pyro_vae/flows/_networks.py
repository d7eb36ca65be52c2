"""The networks inside flows, with a context as a second input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Tensor, nn

from pyro_vae._utils.checks import require_same_type
from pyro_vae.nets import MLP


class AutoregressiveNetwork(nn.Module):
    """Maps x ``(..., D)`` to parameters ``(..., D, n)``; each depends on earlier dimensions only.

    This is MADE (Germain et al. 2015) with a context that all dimensions depend on.

    Args:
        dim: D, at least two.
        context: size of the context.
        hidden: widths of the hidden layers, each at least D.
        num_parameters: n, the number of parameters per dimension.
    """

    def __init__(self, dim: int, context: int, hidden: Sequence[int], num_parameters: int):
        super().__init__()
        _check(context, hidden, minimum=dim)
        self.network = ConditionalAutoRegressiveNN(
            dim, context, list(hidden), [num_parameters], torch.arange(dim), nonlinearity=nn.Tanh()
        )
        _shrink(self.network.layers[-1])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Return the parameters."""
        require_same_type("x", x, self.network.layers[0].weight)
        return self.network(*_broadcast(x, context)).mT


class CouplingNetwork(nn.Module):
    """Maps x ``(..., d)`` and a context to parameters ``(..., D, n)``.

    Args:
        inputs: d, the number of input dimensions.
        outputs: D, the number of output dimensions.
        context: size of the context.
        hidden: widths of the hidden layers.
        num_parameters: n, the number of parameters per output dimension.
    """

    def __init__(
        self, inputs: int, outputs: int, context: int, hidden: Sequence[int], num_parameters: int
    ):
        super().__init__()
        _check(context, hidden, minimum=1)
        self._shape = (outputs, num_parameters)
        self.network = MLP(inputs + context, hidden, outputs * num_parameters)
        first, *_, last = (m for m in self.network.modules() if isinstance(m, nn.Linear))
        # The context is near zero at first. Scale the layer as if x were its only input.
        with torch.no_grad():
            first.weight[:, :inputs] *= ((inputs + context) / inputs) ** 0.5
            first.bias *= ((inputs + context) / inputs) ** 0.5
        _shrink(last)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Return the parameters."""
        require_same_type("x", x, self.network[0].weight)
        return self.network(torch.cat(_broadcast(x, context), -1)).unflatten(-1, self._shape)


def _check(context: int, hidden: Sequence[int], minimum: int) -> None:
    if context < 0:
        raise ValueError(f"context must not be negative, got {context}")
    if not hidden or min(hidden) < minimum:
        raise ValueError(f"hidden must hold widths of at least {minimum}, got {list(hidden)}")


def _broadcast(x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    batch = torch.broadcast_shapes(x.shape[:-1], context.shape[:-1])
    return x.expand(*batch, -1), context.expand(*batch, -1)


def _shrink(layer: nn.Linear) -> None:
    """Make the layer's outputs small, so that the flow starts near the identity."""
    with torch.no_grad():
        layer.weight.mul_(0.1)
        layer.bias.zero_()
