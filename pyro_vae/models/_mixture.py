"""A model with a mixture of Gaussians as prior, whose component is a sample site."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from torch import Tensor

from pyro_vae import priors
from pyro_vae._programs.sites import DATA_PLATE
from pyro_vae._utils.checks import require_batch, require_distribution
from pyro_vae._utils.init_args import records_init_args


@records_init_args
class MixtureModel(PyroModule):
    r"""The Gaussian-mixture VAE (Dilokthanakul et al. 2016; Jiang et al. 2017).

    .. math:: p(x, z, c) = \pi_c \, \mathcal{N}(z; \mu_c, \mathrm{diag}\,\sigma_c^2) \, p(x|z)

    The component c is enumerated: the model sums over c exactly, and the guide has only z. A
    :class:`LatentVariableModel` with a :class:`pyro_vae.priors.MixtureOfNormals` has the same
    p(x, z), without a site for c.

    Args:
        prior: the mixture, which is learned.
        likelihood: returns p(x|z) when called on z.

    Shape:
        x is ``(B, *event)``.

    Sites:
        ``"c"`` is latent and enumerated, ``"z"`` is latent and ``"x"`` is observed, all in the
        plate ``"data"``.

    Raises:
        TypeError: The prior is not a :class:`pyro_vae.priors.MixtureOfNormals`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16))
        >>> model = pv.models.MixtureModel(pv.priors.MixtureOfNormals(2, components=3), likelihood)
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
        >>> x = torch.rand(5, 16).round()
        >>> pv.evidence(model, guide, x, num_particles=10).values.shape
        torch.Size([5])
        >>> model.prior.responsibilities(guide(x)["z"]).shape  # p(c|z)
        torch.Size([5, 3])
    """

    def __init__(
        self,
        prior: priors.MixtureOfNormals,
        likelihood: Callable[[Tensor], TorchDistributionMixin],
    ):
        super().__init__()
        if not isinstance(prior, priors.MixtureOfNormals):
            raise TypeError(
                f"prior must be a priors.MixtureOfNormals for MixtureModel, got {prior!r}: with "
                "another prior, use LatentVariableModel"
            )
        self.prior = prior
        self.likelihood = likelihood

    def forward(self, x: Tensor) -> Tensor:
        """Run the program on a minibatch x and return the value of the site ``"x"``."""
        mixture = self.prior()
        with pyro.plate(DATA_PLATE, require_batch("x", x), dim=-1):
            p_c = dist.Categorical(logits=mixture.logits)
            c = pyro.sample("c", p_c, infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(mixture.loc[c], mixture.scale[c]).to_event(1))
            p_x = require_distribution("likelihood", self.likelihood(z))
            return pyro.sample("x", p_x, obs=x)
