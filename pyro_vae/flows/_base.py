"""What a layer of a flow is: numbers in, an invertible transform out."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from pyro_vae._utils.checks import checked, require_floats


class Flow(nn.Module):
    """One layer of a normalizing flow on R^D, its parameters a function of something else.

    Called on ``num_parameters`` unconstrained numbers, it gives the transform that they stand for.
    In :class:`pyro_vae.guides.AmortizedFlow` the encoder gives them, for each datum. A subclass
    says how many it takes; zeros must give a transform that can be inverted.

    Args:
        dim: D.

    Attributes:
        num_parameters: how many numbers a transform takes.
        min_dim: the least D that the flow makes sense for.

    Shape:
        from ``(*batch, num_parameters)`` to a transform of ``(..., *batch, D)``; both broadcast.

    Raises:
        ValueError: D is less than ``min_dim``; in a call, there are not ``num_parameters``.
        TypeError: D is no whole number; in a call, the parameters are no floating-point numbers.
    """

    num_parameters: int
    min_dim = 1

    @checked
    def __init__(self, dim: int):
        super().__init__()
        if dim < self.min_dim:
            raise ValueError(
                f"the flow {type(self).__name__} needs at least {self.min_dim} dimensions, got dim="
                f"{dim}: take Planar or Radial, or AmortizedNormal, or join several latents"
            )
        self.dim = dim

    def __call__(self, parameters: Tensor) -> Transform:
        """Return the transform of these parameters."""
        transform = super().__call__(
            require_floats("parameters", parameters, (self.num_parameters,))
        )
        for each in (transform, getattr(transform, "inv", None)):
            if isinstance(each, FlowTransform):
                each.dim = self.dim
        return transform

    @abstractmethod
    def forward(self, parameters: Tensor) -> Transform:
        """Return the transform of these parameters."""


class FlowTransform(Transform):
    """A bijection of R^D that keeps what it computed last, its log-determinant included.

    Attributes:
        dim: D, where a :class:`Flow` made it; values of another size are refused.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self):
        super().__init__(cache_size=1)
        self.dim: int | None = None
        self._log_det: Tensor | None = None

    @abstractmethod
    def map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(x), (..., D), and log|det df/dx|, (...)."""

    @abstractmethod
    def unmap(self, y: Tensor) -> Tensor:
        """Return the x with f(x) = y."""

    def _call(self, x: Tensor) -> Tensor:
        y, self._log_det = self.map(self._checked("x", x))
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        self._log_det = None
        x = self.unmap(collapse_expanded_dims(self._checked("y", y)))
        return x.expand(torch.broadcast_shapes(x.shape, y.shape))

    def _checked(self, name: str, value: Tensor) -> Tensor:
        return require_floats(name, value, () if self.dim is None else (self.dim,))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log|det df/dx| at x."""
        known = self._cached_x_y[0] is x and self._cached_x_y[1] is y
        if not known or self._log_det is None:
            log_det = self.map(collapse_expanded_dims(x))[1]
            return log_det.expand(torch.broadcast_shapes(log_det.shape, x.shape[:-1]))
        return self._log_det


def collapse_expanded_dims(values: Tensor, event_dim: int = 1) -> Tensor:
    """Leave values out that are mere repetitions, made by expanding a batch dimension.

    So one z that is scored under many x is inverted once, where the flow does not depend on x.

    Args:
        values: ``(*batch, *event)``.
        event_dim: dimensions of the event.
    """
    for dim in range(values.dim() - event_dim):
        if values.stride(dim) == 0 and values.shape[dim] > 1:
            values = values.narrow(dim, 0, 1)
    return values
