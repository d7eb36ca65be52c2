"""The model of a VAE."""

from __future__ import annotations

from collections.abc import Callable

import pyro
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from torch import Tensor

from pyro_vae._programs.sites import DATA_PLATE
from pyro_vae._utils.checks import require_batch, require_distribution
from pyro_vae._utils.init_args import records_init_args


@records_init_args
class LatentVariableModel(PyroModule):
    r""":math:`p(x, z) = \prod_n p(z_n)\, p(x_n|z_n)`: the generative model of a VAE.

    Args:
        prior: returns p(z) when called without arguments; see :mod:`pyro_vae.priors`.
        likelihood: returns p(x|z) when called on z; see :mod:`pyro_vae.likelihoods`.

    Shape:
        x is ``(B, *event)`` with the event shape of p(x|z).

    Sites:
        ``"z"`` is latent and ``"x"`` is observed, both in the plate ``"data"``.

    Example:
        >>> import torch, pyro_vae as pv
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
        ... )
        >>> pv.generate(model, torch.zeros(5, 16)).shape  # E[x|z] for five z from the prior
        torch.Size([5, 16])
    """

    def __init__(
        self,
        prior: Callable[[], TorchDistributionMixin],
        likelihood: Callable[[Tensor], TorchDistributionMixin],
    ):
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood

    def forward(self, x: Tensor) -> Tensor:
        """Run the program on a minibatch x and return the value of the site ``"x"``."""
        p_z = require_distribution(
            "prior", self.prior()
        )  # one prior for all data points, outside the plate
        with pyro.plate(DATA_PLATE, require_batch("x", x), dim=-1):
            z = pyro.sample("z", p_z)
            p_x = require_distribution("likelihood", self.likelihood(z))
            return pyro.sample("x", p_x, obs=x)
