"""The base class of flow layers: maps unconstrained parameters to an invertible transform."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from pyro_vae._utils.checks import checked, require_floats


class Flow(nn.Module):
    """One layer of a normalizing flow on R^D, with parameters from outside, such as an encoder.

    A call maps ``num_parameters`` unconstrained numbers to a transform. In
    :class:`pyro_vae.guides.AmortizedFlow`, the encoder computes these numbers for each data point.
    A subclass must set ``num_parameters``. Zeros must give an invertible transform.

    Args:
        dim: D.

    Attributes:
        num_parameters: number of parameters of one transform.
        min_dim: the smallest D that the flow is useful for.

    Shape:
        Parameters ``(*batch, num_parameters)`` give a transform of ``(..., *batch, D)``; both
        broadcast.

    Raises:
        ValueError: D is less than ``min_dim``. A call raises it if the last dimension is not
            ``num_parameters``.
        TypeError: D is not an integer. A call raises it if the parameters are not
            floating-point numbers.
    """

    num_parameters: int
    min_dim = 1

    @checked
    def __init__(self, dim: int):
        super().__init__()
        if dim < self.min_dim:
            raise ValueError(
                f"the flow {type(self).__name__} needs at least {self.min_dim} dimensions, got dim="
                f"{dim}. Use Planar, Radial or AmortizedNormal, or pass joint=True for several "
                "latents."
            )
        self.dim = dim

    def __call__(self, parameters: Tensor) -> Transform:
        """Return the transform with these parameters."""
        transform = super().__call__(
            require_floats("parameters", parameters, (self.num_parameters,))
        )
        for each in (transform, getattr(transform, "inv", None)):
            if isinstance(each, FlowTransform):
                each.dim = self.dim
        return transform

    @abstractmethod
    def forward(self, parameters: Tensor) -> Transform:
        """Return the transform with these parameters."""


class FlowTransform(Transform):
    """A bijection of R^D that caches its last input, output and log-determinant.

    Attributes:
        dim: D, set if a :class:`Flow` made the transform. Values of another size then raise an
            error.
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
        """Return x such that f(x) = y."""

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
    """Remove the repeated values of expanded batch dimensions; keep each dimension with size 1.

    So if one z is scored under many x and the flow does not depend on x, z is inverted once.

    Args:
        values: ``(*batch, *event)``.
        event_dim: number of event dimensions.
    """
    for dim in range(values.dim() - event_dim):
        if values.stride(dim) == 0 and values.shape[dim] > 1:
            values = values.narrow(dim, 0, 1)
    return values
