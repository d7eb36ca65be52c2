"""The guide of a model made of layers: the same layers in the inference direction."""

from __future__ import annotations

from typing import Any

import pyro
from pyro.nn import PyroModule
from torch import Tensor

from pyro_vae._programs.runs import plate_of_guide
from pyro_vae._programs.sites import DATA_PLATE
from pyro_vae._utils.init_args import records_init_args
from pyro_vae.surjections._dequantization import UniformDequantization
from pyro_vae.surjections._surjection import check_batch


@records_init_args
class FlowGuide(PyroModule):
    r"""Guide of a :class:`FlowModel`: infer layer by layer, from the data upwards.

    .. math:: q(h|x) = \prod_{l=1}^L q(h_l|h_{l-1}), \qquad h_0 = x

    The guide shares the model's layers and has no parameters of its own. To copy the pair, copy
    both at once: ``copy.deepcopy((model, guide))``.

    Args:
        model: the :class:`pyro_vae.surjections.FlowModel`.

    Shape:
        x is ``(B, *event)``.

    Raises:
        TypeError: The model has no layers.
        ValueError: In a call, the shapes of x or of two layers do not fit.

    Example:
        >>> import torch, pyro_vae as pv
        >>> model = pv.surjections.FlowModel(pv.priors.StandardNormal(3), pv.flows.Composition(3))
        >>> pv.surjections.FlowGuide(model)(torch.randn(5, 3))["z"].shape
        torch.Size([5, 3])
    """

    def __init__(self, model: Any):
        super().__init__()
        if not hasattr(model, "layers") or not hasattr(model, "latents"):
            raise TypeError(
                f"FlowGuide takes a FlowModel and uses its layers, got {type(model).__name__}"
            )
        self.layers = model.layers
        self.latents = model.latents

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Sample the latents of a minibatch x and return them by name."""
        values: dict[str, Tensor] = {}
        below, event_dim = self._as_numbers(x), x.dim() - 1
        with plate_of_guide(DATA_PLATE, x.shape[0], dim=-1):
            for name, layer in zip(self.latents, self.layers, strict=True):
                q = layer.infer(below)
                check_batch(layer, below, event_dim, q)
                below = values[name] = pyro.sample(name, q)
                event_dim = len(q.event_shape)
        return values

    def _as_numbers(self, x: Tensor) -> Tensor:
        """Return integer levels as numbers of the parameters' dtype."""
        first = self.layers[0]
        if not isinstance(first, UniformDequantization):
            return x
        return first.on_grid(x, next((p.dtype for p in self.parameters()), None))
