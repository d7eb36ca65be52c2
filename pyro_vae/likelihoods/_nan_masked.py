"""Data with missing numbers."""

from __future__ import annotations

from collections.abc import Callable

from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_vae import distributions
from pyro_vae._utils.init_args import records_init_args
from pyro_vae.likelihoods._scales import OptimalScale


@records_init_args
class NanMasked(nn.Module):
    r"""A likelihood that leaves out the missing numbers of x, which are NaN or infinite.

    .. math:: \log p(x_{obs}|z) = \sum_{d \,:\, x_d \text{ is finite}} \log p(x_d|z)

    It wraps any other likelihood of independent numbers, in any model. See
    :class:`pyro_vae.distributions.NanMasked`. The encoder needs :class:`pyro_vae.nets.ZeroImputed`.
    :func:`pyro_vae.impute` then fills the gaps.

    Args:
        likelihood: returns p(x|z) when called on z, such as a :class:`Normal`.

    Raises:
        ValueError: The likelihood has an :class:`OptimalScale`, which one number for all x
            determines. In a call: the numbers of x are not independent given z.

    Example:
        >>> import torch, pyro_vae as pv
        >>> likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 3))
        >>> model = pv.LatentVariableModel(
        ...     pv.priors.StandardNormal(2), pv.likelihoods.NanMasked(likelihood)
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, pv.nets.ZeroImputed(pv.nets.MLP(3, [8])))
        >>> x = torch.tensor([[1.0, 0.0, torch.nan], [torch.nan, torch.nan, torch.nan]])
        >>> pv.terms(model, guide, x, num_particles=4).log_likelihood[:, 1]
        tensor([0., 0., 0., 0.], ...)
    """

    def __init__(self, likelihood: Callable[..., TorchDistributionMixin]):
        super().__init__()
        if isinstance(getattr(likelihood, "scale", None), OptimalScale):
            raise ValueError(  # noqa: TRY004 - a Normal with another scale is valid
                f"{type(likelihood).__name__} with an OptimalScale computes one scale from all "
                "numbers of x, so no number can be left out. Use a SharedScale, which is learned"
            )
        self.likelihood = likelihood

    def forward(self, *inputs: Tensor) -> TorchDistributionMixin:
        """Return p(x|z) of the wrapped likelihood, without missing numbers."""
        return distributions.NanMasked(self.likelihood(*inputs))
