"""Networks of dense layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from pyro_vae._utils.checks import require_floats, require_same_type
from pyro_vae._utils.init_args import records_init_args


class _Dense(nn.Sequential):
    """Layers over the last dimension, the first of them linear."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layers for x."""
        try:
            return super().forward(x)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            name = f"the x that {type(self).__name__} is called on"
            require_floats(name, x, (self[0].in_features,))
            require_same_type(name, x, self[0].weight)
            raise


@records_init_args
class MLP(_Dense):
    r"""A multilayer perceptron over the last dimension.

    Args:
        in_features: size of the last dimension of the input.
        hidden: sizes of the hidden layers. The activation follows each.
        out_features: size of a last linear layer. Without it, the output is the last hidden layer
            after its activation, as an encoder of an amortized guide needs it.
        activation: class or function that creates the nonlinearity between layers.

    Shape:
        (..., in_features) to (..., out_features or hidden[-1]), for any leading dimensions.

    Raises:
        ValueError: There are neither hidden layers nor ``out_features``, or a size is not positive.
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
        sizes = layer_sizes(type(self).__name__, in_features, hidden, out_features)
        layers: list[nn.Module] = []
        for size, next_size in itertools.pairwise(sizes):
            layers += [nn.Linear(size, next_size), activation()]
        if out_features is not None:
            layers.append(nn.Linear(sizes[-1], out_features))
        super().__init__(*layers)


@records_init_args
class GatedMLP(_Dense):
    r"""A multilayer perceptron of gated layers (Dauphin et al. 2017; Tomczak & Welling 2018).

    .. math:: h = (A x + a) \odot \sigma(B x + b)

    There is no other nonlinearity. The initial weights are samples from
    :math:`\mathcal{N}(0, 2 / \text{fan-in})`.

    Args:
        in_features: size of the last dimension of the input.
        hidden: sizes of the gated layers.
        out_features: size of a last linear layer. Without it, the output is the last gated layer.

    Shape:
        (..., in_features) to (..., out_features or hidden[-1]), for any leading dimensions.

    Raises:
        ValueError: There are neither hidden layers nor ``out_features``, or a size is not positive.
        TypeError: ``hidden`` is a number.

    Example:
        >>> import torch, pyro_vae as pv
        >>> encoder = pv.nets.GatedMLP(784, [300, 300])
        >>> encoder(torch.zeros(100, 784)).shape
        torch.Size([100, 300])
    """

    def __init__(self, in_features: int, hidden: Sequence[int], out_features: int | None = None):
        sizes = layer_sizes(type(self).__name__, in_features, hidden, out_features)
        layers: list[nn.Module] = []
        for size, next_size in itertools.pairwise(sizes):
            layers += [nn.Linear(size, 2 * next_size), nn.GLU(-1)]
        if out_features is not None:
            layers.append(nn.Linear(sizes[-1], out_features))
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features))
        super().__init__(*layers)


def layer_sizes(
    name: str, in_features: int, hidden: Sequence[int], out_features: int | None
) -> list[int]:
    """Return the sizes of the input and of the hidden layers.

    Raises:
        ValueError: There are neither hidden layers nor ``out_features``, or a size is not positive.
        TypeError: ``hidden`` is a number.
    """
    if isinstance(hidden, int):
        raise TypeError(f"hidden must be a sequence of sizes, such as [{hidden}], got {hidden}")
    sizes = [in_features, *hidden]
    if min(sizes) < 1 or (out_features is not None and out_features < 1):
        raise ValueError(
            f"layer sizes (in_features, hidden, out_features) must be positive, got {sizes} and "
            f"{out_features}"
        )
    if not hidden and out_features is None:
        raise ValueError(f"{name} needs a hidden layer or out_features, got neither")
    return sizes
