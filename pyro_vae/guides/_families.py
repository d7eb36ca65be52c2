"""Families of distributions on R^D, as functions of unconstrained parameters.

A guide combines a family with a source of its parameters: an encoder, a table or gradient steps.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions.utils import _standard_normal

from pyro_vae._utils.checks import positive_integer
from pyro_vae._utils.init_args import records_init_args
from pyro_vae._utils.numerics import softplus_scale
from pyro_vae._utils.precision import exact_product, rounds_products
from pyro_vae.distributions._mixtures import MixtureOfDiagNormals
from pyro_vae.flows import Flow


class Family(nn.Module):
    """Distributions on R^D with P unconstrained parameters.

    Args:
        dim: D.

    Attributes:
        num_parameters: P.
        independent: whether the dimensions are independent. If True, a call takes P/D tensors and
            returns a distribution of scalars.

    Shape:
        Parameters ``(*batch, P)`` give batch shape ``batch`` and event shape ``(D,)``. If
        ``independent``, P/D tensors of any shape give that batch shape and scalar events.
    """

    num_parameters: int
    independent = False

    def __init__(self, dim: int):
        super().__init__()
        self.dim = positive_integer("dim", dim)

    @abstractmethod
    def forward(self, parameters: Any) -> TorchDistributionMixin:
        """Return the distribution with these parameters, in one tensor or one for each kind."""


@records_init_args
class Normal(Family):
    r"""Diagonal Gaussians with parameters :math:`\mu`, and :math:`\sigma` by a softplus."""

    independent = True

    def __init__(self, dim: int):
        super().__init__(dim)
        self.num_parameters = 2 * dim

    def forward(self, parameters: Sequence[Tensor]) -> TorchDistributionMixin:
        """Return independent Gaussians."""
        loc, raw_scale = parameters
        return dist.Normal(loc, softplus_scale(raw_scale))


@records_init_args
class Delta(Family):
    """Point masses with a constant log-density.

    Args:
        dim: D.
        log_density: log-density of each dimension; None makes it a parameter per data point.
    """

    independent = True

    def __init__(self, dim: int, log_density: float | None = 0.0):
        super().__init__(dim)
        self._log_density = log_density
        self.num_parameters = dim if log_density is not None else 2 * dim

    def forward(self, parameters: Sequence[Tensor]) -> TorchDistributionMixin:
        """Return independent point masses."""
        if self._log_density is None:
            point, log_density = parameters
            return dist.Delta(point, log_density)
        (point,) = parameters
        return dist.Delta(point, torch.full_like(point, self._log_density))


@records_init_args
class MultivariateNormal(Family):
    r"""Gaussians with any covariance :math:`LL^\top`; L is lower triangular (Cholesky)."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self._sizes = [dim, dim, dim * (dim - 1) // 2]
        self.num_parameters = sum(self._sizes)

    def forward(self, parameters: Tensor) -> TorchDistributionMixin:
        """Return a Gaussian."""
        loc, diagonal, below = parameters.split(self._sizes, -1)
        rows, columns = torch.tril_indices(self.dim, self.dim, -1, device=loc.device)
        triangle = torch.diag_embed(softplus_scale(diagonal))
        place = (rows * self.dim + columns).expand(below.shape)
        # This scale keeps the correlations of a new guide small in any number of dimensions.
        below = below / math.sqrt(self.dim)
        triangle = triangle.flatten(-2).scatter(-1, place, below).unflatten(-1, (self.dim, -1))
        return _MultivariateNormal(loc, scale_tril=triangle)


class _MultivariateNormal(dist.MultivariateNormal):
    """torch's class, whose samples and densities do not depend on the precision of products.

    The density of a sample inverts L, which would amplify the rounding of the sample.
    """

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        shape = self._extended_shape(sample_shape)
        noise = _standard_normal(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + _times(self._unbroadcasted_scale_tril, noise)


@records_init_args
class LowRankNormal(Family):
    r"""Gaussians with covariance :math:`WW^\top + \mathrm{diag}(\sigma^2)`; W has low rank.

    Args:
        dim: D.
        rank: number of columns of W, at most D; a larger rank is reduced to D.

    Raises:
        ValueError: The rank is not positive.
    """

    def __init__(self, dim: int, rank: int = 4):
        super().__init__(dim)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self._rank = rank = min(rank, dim)
        self._sizes = [dim, dim, dim * rank]
        self.num_parameters = sum(self._sizes)

    def forward(self, parameters: Tensor) -> TorchDistributionMixin:
        """Return a Gaussian."""
        loc, diagonal, factor = parameters.split(self._sizes, -1)
        factor = factor.unflatten(-1, (self.dim, self._rank)) / math.sqrt(self._rank)
        return _LowRankNormal.of(loc, factor, softplus_scale(diagonal).square())


_OF_LOW_RANK = ("loc", "_unbroadcasted_cov_factor", "_unbroadcasted_cov_diag", "_capacitance_tril")


class _LowRankNormal(dist.LowRankMultivariateNormal):
    """torch's class, but log_prob does not subtract two large numbers.

    Neither samples nor densities depend on the precision of float32 products.
    """

    @classmethod
    def of(cls, loc: Tensor, factor: Tensor, diagonal: Tensor) -> _LowRankNormal:
        """Return a Gaussian. torch's constructor computes a product, here in full precision."""
        if not rounds_products(loc):
            return cls(loc, factor, diagonal)
        normal = cls(loc.double(), factor.double(), diagonal.double())
        for name in _OF_LOW_RANK:
            setattr(normal, name, getattr(normal, name).to(loc.dtype))
        return normal

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        shape = self._extended_shape(sample_shape)
        factor = self._unbroadcasted_cov_factor
        of_factor, of_diagonal = (
            _standard_normal(each, dtype=self.loc.dtype, device=self.loc.device)
            for each in (shape[:-1] + factor.shape[-1:], shape)
        )
        scale = self._unbroadcasted_cov_diag.sqrt()
        return self.loc + _times(factor, of_factor) + scale * of_diagonal

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        scale = self._unbroadcasted_cov_diag.sqrt()
        factor = self._unbroadcasted_cov_factor / scale.unsqueeze(-1)
        residual = ((value - self.loc) / scale).unsqueeze(-1)
        # r'(I + AA')^-1 r is the minimum over c of |r - Ac|^2 + |c|^2. So an error in c has only
        # a second-order effect.
        c = torch.cholesky_solve(exact_product(factor.mT, residual), self._capacitance_tril)
        rest = residual - exact_product(factor, c)
        square = rest.square().sum((-1, -2)) + c.square().sum((-1, -2))
        half_log_det = self._capacitance_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        half_log_det = half_log_det + scale.log().sum(-1)
        dim = self.event_shape[0]
        return -0.5 * (square + dim * math.log(2 * math.pi)) - half_log_det


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return exact_product(matrix, vector.unsqueeze(-1)).squeeze(-1)


@records_init_args
class Mixture(Family):
    """Mixtures of diagonal Gaussians, see :class:`pyro_vae.distributions.MixtureOfDiagNormals`.

    Learned offsets, shared by all data points, separate the components from the start.

    Args:
        dim: D.
        components: K, the number of Gaussians.

    Raises:
        ValueError: ``components`` is not positive.
    """

    def __init__(self, dim: int, components: int = 4):
        super().__init__(dim)
        if components < 1:
            raise ValueError(f"components must be at least 1, got {components}")
        self._components = components
        self.offsets = nn.Parameter(0.5 * torch.randn(components, dim))
        self.num_parameters = components * (2 * dim + 1)

    def forward(self, parameters: Tensor) -> TorchDistributionMixin:
        """Return a mixture."""
        parameters = parameters.unflatten(-1, (self._components, -1))
        logits, loc, raw_scale = parameters.split([1, self.dim, self.dim], -1)
        return MixtureOfDiagNormals(
            logits.squeeze(-1), loc + self.offsets, softplus_scale(raw_scale)
        )


@records_init_args
class Transformed(Family):
    r"""Diagonal Gaussians pushed through layers of a flow (Rezende & Mohamed 2015, eq. 7).

    .. math::
        z = f_L \circ \ldots \circ f_1(\epsilon), \qquad
        \log q(z) = \log\mathcal{N}(\epsilon; \mu, \sigma^2) - \sum_l \log|\det J_l|

    Args:
        dim: D.
        flow: function from D to a layer, such as :class:`pyro_vae.flows.Planar`.
        length: L, the number of layers.
        amortized: whether the input also holds the layers' parameters, or their context. If False,
            they are free parameters of one flow that all data points share. Scoring M values under
            N Gaussians then takes M inversions.

    Raises:
        ValueError: ``length`` is not positive, or the flow needs more dimensions.
    """

    def __init__(
        self, dim: int, flow: Callable[[int], Flow], length: int = 8, amortized: bool = True
    ):
        super().__init__(dim)
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.layers = nn.ModuleList(flow(dim) for _ in range(length))
        self._sizes = [layer.num_parameters for layer in self.layers]
        self.free: nn.Parameter | None = None
        self.num_parameters = 2 * dim
        if amortized:
            self.num_parameters += sum(self._sizes)
        else:
            self.free = nn.Parameter(0.1 * torch.randn(sum(self._sizes)))

    def forward(self, parameters: Tensor) -> TorchDistributionMixin:
        """Return a transformed Gaussian."""
        loc, raw_scale, rest = parameters.tensor_split([self.dim, 2 * self.dim], -1)
        rest = rest if self.free is None else self.free
        transforms = [
            layer(numbers)
            for layer, numbers in zip(self.layers, rest.split(self._sizes, -1), strict=True)
        ]
        base = dist.Normal(loc, softplus_scale(raw_scale)).to_event(1)
        return dist.TransformedDistribution(base, transforms)
