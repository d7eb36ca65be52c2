"""A learned mixture of Gaussians as the prior."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_vae._utils.init_args import records_init_args
from pyro_vae._utils.numerics import softplus_scale
from pyro_vae.distributions import _mixtures as mixtures


@records_init_args
class MixtureOfNormals(nn.Module):
    r"""A mixture of K diagonal Gaussians with learned weights, means and scales.

    .. math:: p(z) = \sum_k \pi_k \, \mathcal{N}(z; \mu_k, \mathrm{diag}\,\sigma_k^2)

    Args:
        dim: D of z.
        components: K.

    Raises:
        ValueError: A size is not positive.

    Example:
        >>> import torch, pyro_vae as pv
        >>> pv.priors.MixtureOfNormals(50, components=10)().log_prob(torch.zeros(7, 50)).shape
        torch.Size([7])
    """

    def __init__(self, dim: int, components: int = 10):
        super().__init__()
        if min(dim, components) < 1:
            raise ValueError(
                f"MixtureOfNormals needs positive sizes, got dim={dim}, components={components}"
            )
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(0.5 * torch.randn(components, dim))
        self.raw_scale = nn.Parameter(torch.zeros(components, dim))

    def forward(self) -> mixtures.MixtureOfDiagNormals:
        """Return p(z): batch shape (), event shape (D,)."""
        return mixtures.MixtureOfDiagNormals(self.logits, self.loc, softplus_scale(self.raw_scale))

    def responsibilities(self, z: Tensor) -> Tensor:
        r"""Return :math:`p(k|z)`, shape ``(..., K)``, for z of shape ``(..., D)``."""
        return self().log_joint(z).softmax(-1)
