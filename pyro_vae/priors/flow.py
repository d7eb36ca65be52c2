"""A normalizing flow as the prior."""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import nn
from torch.distributions import constraints
from torch.distributions.transforms import Transform


class FlowPrior(nn.Module):
    r""":math:`p(z) = \mathcal{N}(f^{-1}(z); 0, I)\,|\det \partial f^{-1} / \partial z|`, f learned.

    The density is taken at what the guide draws, so a step costs the way from z to noise: one pass
    for coupling flows and masked autoregressive ones, D passes for inverse autoregressive ones, a
    root for planar ones. Sampling goes the other way.

    Args:
        dim: D of z.
        transform: called without arguments, gives f, a bijection of R^D, such as a
            :class:`pyro_vae.flows.Composition`; a torch transform serves too.

    Raises:
        ValueError: ``dim`` is not positive; f is no bijection of R^D.

    Example:
        >>> import torch, pyro_vae as pv
        >>> f = pv.flows.Composition(2, pv.flows.AffineCoupling, length=4)
        >>> prior = pv.priors.FlowPrior(2, f)
        >>> prior().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    def __init__(self, dim: int, transform: Callable[[], Transform] | Transform):
        super().__init__()
        if dim < 1:
            raise ValueError(f"FlowPrior needs a positive dim, got {dim}")
        self.transform = transform
        self.register_buffer("loc", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self._check()

    def forward(self) -> TorchDistributionMixin:
        """Return p(z): batch shape (), event shape (D,)."""
        base = dist.Normal(self.loc, self.scale).to_event(1)
        return dist.TransformedDistribution(base, [self._made()])

    def _made(self) -> Transform:
        return self.transform if isinstance(self.transform, Transform) else self.transform()

    def _check(self) -> None:
        transform, dim = self._made(), len(self.loc)
        known = getattr(self.transform, "dim", dim)
        if known != dim:
            raise ValueError(f"the prior is of {dim} dimensions, but its transform of {known}")
        real = {constraints.real, constraints.real_vector}
        is_real = real.issuperset((transform.domain, transform.codomain))
        if not transform.bijective or not is_real or self._shape(transform) != (dim,):
            raise ValueError(
                f"the prior's transform must be a bijection of R^{dim}, got {transform} from "
                f"{transform.domain} onto {transform.codomain}"
            )

    def _shape(self, transform: Transform) -> tuple[int, ...]:
        try:
            with torch.no_grad():
                return tuple(transform(self.loc).shape)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"the prior's transform cannot be applied to z of shape ({len(self.loc)},): {error}"
            ) from error
