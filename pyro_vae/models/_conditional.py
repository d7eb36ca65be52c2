"""The model of a conditional VAE."""

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
class ConditionalModel(PyroModule):
    r""":math:`p(x, z|y) = \prod_n p(z_n)\, p(x_n|z_n, y_n)`, a conditional VAE (Sohn et al. 2015).

    Args:
        prior: returns p(z) when called without arguments. With ``conditional_prior``, it returns
            p(z|y) when called on the covariates, as a likelihood does.
        likelihood: returns p(x|z, y) when called on z and the covariates. Wrap a network in
            ``nets.Joined`` to call it on several tensors.
        conditional_prior: whether the prior depends on the covariates.

    Shape:
        x is ``(B, *event)``, each covariate ``(B, ...)``.

    Sites:
        ``"z"`` is latent and ``"x"`` is observed, both in the plate ``"data"``.

    Raises:
        ValueError: The model is called without covariates.

    Example:
        >>> import torch, pyro_vae as pv
        >>> model = pv.models.ConditionalModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.Joined(pv.nets.MLP(2 + 3, [8], 16))),
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, pv.nets.Joined(pv.nets.MLP(16 + 3, [8])))
        >>> x, y = torch.rand(20, 16).round(), torch.eye(3)[torch.randint(3, (20,))]
        >>> fit = pv.fit(model, guide, (x, y), batch_size=10, epochs=1, progress=False)
        >>> pv.generate(model, x, y).shape
        torch.Size([20, 16])
    """

    def __init__(
        self,
        prior: Callable[..., TorchDistributionMixin],
        likelihood: Callable[..., TorchDistributionMixin],
        conditional_prior: bool = False,
    ):
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood
        self._conditional_prior = conditional_prior

    def forward(self, x: Tensor, *covariates: Tensor) -> Tensor:
        """Run the program on a minibatch x and its covariates, and return x."""
        if not covariates:
            raise ValueError("ConditionalModel needs covariates, but got x alone: call it on x, y")
        p_z = self.prior(*covariates) if self._conditional_prior else self.prior()
        require_distribution("prior", p_z)
        with pyro.plate(DATA_PLATE, require_batch("x", x), dim=-1):
            z = pyro.sample("z", p_z)
            p_x = require_distribution("likelihood", self.likelihood(z, *covariates))
            return pyro.sample("x", p_x, obs=x)
