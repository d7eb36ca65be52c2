"""Amortized guides: an encoder computes the parameters of q(z|x), for the latents of any model.

Like Pyro's AutoGuides, these guides find the latent sites of a model automatically. Unlike
AutoGuides, they are amortized. An encoder reads x, and one linear head computes the parameters of
the latent sites in the plate ``"data"``. For sites outside that plate, use another guide.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae import flows
from pyro_vae._programs.latent_sites import LatentSite, latent_sites, surroundings
from pyro_vae._utils.init_args import records_init_args
from pyro_vae.guides import _families as families
from pyro_vae.guides._encoding import features_of
from pyro_vae.guides._families import Family
from pyro_vae.guides._lazy_modules import LazyModules
from pyro_vae.guides._model_ref import ModelRef
from pyro_vae.guides._posterior import Posterior


@records_init_args
class AmortizedGuide(PyroModule):
    r"""Amortized q(z|x) of any family, for the latent variables of any model.

    .. math::
        q(z|x) = T_\# \, q_{\lambda(x)}, \qquad \lambda(x) = A \, \mathrm{encoder}(x) + a

    :math:`T` maps the reals onto the supports of the latent sites in the plate ``"data"``. It is
    ``biject_to``, or the identity for a real support, and :math:`T_\#` is the push-forward. The
    family's distribution with parameters :math:`\lambda` is :math:`q_\lambda`.

    The guide's first call traces the model and creates the head. :func:`pyro_vae.fit` makes this
    call itself. A guide can score any value, not only its own samples. To score z, trace
    ``poutine.condition(guide, data={"z": z})`` on x.

    Args:
        model: program of p(x, z) to build the guide for. It does not become a submodule, and is
            not copied with the guide. To copy both, write ``copy.deepcopy((model, guide))``.
        encoder: network from the program's arguments to features (B, ...), flattened to (B, F).
        family: function from D to a family of D dimensions; see :mod:`pyro_vae.guides`.
        joint: whether several latents (or those of an inner plate) have one joint distribution.
            If False, they are independent given x, each of the family. For a family with
            independent dimensions, both values give the same guide.

    Shape:
        x is ``(B, *event)``. A call returns the latents by name, each ``(..., B, *event)`` with
        the event shape of its site.

    Raises:
        ValueError: The first call raises it if the model has no latent site in the plate
            ``"data"`` or if a latent is discrete. It also does so if the encoder's output does not
            begin with the batch dimension, or if the family does not support a latent's dimension.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module,
        family: Callable[[int], Family],
        joint: bool = True,
    ):
        super().__init__()
        self._model = ModelRef(model)
        self._family, self._joint = family, joint
        self.encoder = encoder
        self.built = LazyModules()  # the head and the posterior, made at the first call

    def forward(self, x: Tensor, *covariates: Any) -> dict[str, Tensor]:
        """Sample the latents of the data plate given x."""
        return self.sample(self.parameters_of(x, *covariates), x, *covariates)

    def parameters_of(self, x: Tensor, *covariates: Any) -> Tensor:
        """Return the parameters of the family for each data point, ``(B, P)``."""
        features = features_of(self.encoder, x, *covariates)
        if not self.built:
            sites = latent_sites(self._model.program, x, *covariates)
            self.build(sites, features.shape[-1], like=features)
        return self.built["head"](features)

    def build(self, sites: Sequence[LatentSite], width: int, like: Tensor) -> None:
        """Create the head, as the first call does.

        Args:
            sites: the latent sites of the model.
            width: F, the number of the encoder's features.
            like: a tensor with the device and dtype of the features.
        """

        def make() -> dict[str, nn.Module]:
            posterior = Posterior(sites, self._family, self._joint)
            return {"head": nn.Linear(width, posterior.num_parameters), "posterior": posterior}

        self.built.fill(make, sites, width, like)

    def sample(self, parameters: Tensor, x: Tensor, *covariates: Any) -> dict[str, Tensor]:
        """Sample the latents from given parameters ``(B, P)``, without the encoder."""
        posterior = self.built["posterior"]
        plates, masks = surroundings(posterior.sites, self._model.program, x, *covariates)
        return posterior(parameters, plates, masks)


@records_init_args
class AmortizedNormal(AmortizedGuide):
    r"""Diagonal Gaussians (Kingma & Welling 2014, eq. 9).

    .. math::
        q(z|x) = \prod_s (T_s)_\# \, \mathcal{N}\bigl(\mu_s(x), \mathrm{diag}\,\sigma_s^2(x)\bigr)

    The product is over the latent sites s. A softplus makes :math:`\sigma_s` positive. See
    :class:`AmortizedGuide` for the arguments, the shapes and the errors.

    Args:
        model: program of p(x, z).
        encoder: network from the program's arguments to features.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        ...         pyro.sample("x", dist.Normal(weights, 0.1).to_event(1), obs=x)
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(3, [16]))
        >>> weights = guide(torch.rand(4, 3))["weights"]
        >>> torch.allclose(weights.sum(-1), torch.ones(4))
        True
    """

    def __init__(self, model: Callable[..., Any], encoder: nn.Module):
        super().__init__(model, encoder, families.Normal)


@records_init_args
class AmortizedDelta(AmortizedGuide):
    r"""A point estimate of z for each data point, as in an autoencoder or for MAP inference.

    .. math:: q(z|x) = \delta(z - T(\mu(x)))

    The value of :math:`\log q` in the ELBO is a given constant, or an output of the head. The
    output suits a deterministic inverse of the model's flow, which has its own log-determinant.

    Args:
        model: program of p(x, z).
        encoder: network from the program's arguments to features.
        log_density: constant log-density of each dimension. With None, the head outputs it; use
            this only with your own objective, because the ELBO would decrease it without bound.
    """

    def __init__(
        self, model: Callable[..., Any], encoder: nn.Module, log_density: float | None = 0.0
    ):
        family = functools.partial(families.Delta, log_density=log_density)
        super().__init__(model, encoder, family)


@records_init_args
class AmortizedMultivariateNormal(AmortizedGuide):
    r"""Gaussians with full covariance :math:`L(x) L(x)^\top` over all latents.

    Args:
        model: program of p(x, z).
        encoder: network from the program's arguments to features.
        joint: whether several latents are correlated; see :class:`AmortizedGuide`.
    """

    def __init__(self, model: Callable[..., Any], encoder: nn.Module, joint: bool = True):
        super().__init__(model, encoder, families.MultivariateNormal, joint)


@records_init_args
class AmortizedLowRankNormal(AmortizedGuide):
    r"""Gaussians with covariance :math:`W(x) W(x)^\top + \mathrm{diag}\,\sigma^2(x)`.

    Args:
        model: program of p(x, z).
        encoder: network from the program's arguments to features.
        rank: number of columns of W.
        joint: whether several latents are correlated; see :class:`AmortizedGuide`.
    """

    def __init__(
        self, model: Callable[..., Any], encoder: nn.Module, rank: int = 4, joint: bool = True
    ):
        family = functools.partial(families.LowRankNormal, rank=rank)
        super().__init__(model, encoder, family, joint)


@records_init_args
class AmortizedMixture(AmortizedGuide):
    r"""Mixtures of diagonal Gaussians, with gradients for the mixture weights.

    .. math:: q(z|x) = T_\# \sum_k \pi_k(x) \, \mathcal{N}(\mu_k(x), \mathrm{diag}\,\sigma_k^2(x))

    See :class:`pyro_vae.distributions.MixtureOfDiagNormals`.

    Args:
        model: program of p(x, z).
        encoder: network from the program's arguments to features.
        components: K, the number of Gaussians.
        joint: whether several latents share the component; see :class:`AmortizedGuide`.
    """

    def __init__(
        self, model: Callable[..., Any], encoder: nn.Module, components: int = 4, joint: bool = True
    ):
        family = functools.partial(families.Mixture, components=components)
        super().__init__(model, encoder, family, joint)


@records_init_args
class AmortizedFlow(AmortizedGuide):
    r"""A Gaussian pushed through a normalizing flow (Rezende & Mohamed 2015, eq. 7).

    .. math::
        \log q(z|x) = \log\mathcal{N}(\epsilon; \mu(x), \sigma^2(x))
            - \sum_l \log|\det J_l(x)|, \qquad z = T f_L \circ \ldots \circ f_1(\epsilon)

    Here :math:`f_l` are the layers and :math:`J_l` their Jacobians. :math:`T` maps the result onto
    the support of the latent. For planar, radial, Sylvester and Householder flows, the encoder
    computes the parameters of the layers. For autoregressive, coupling and spline flows, it
    computes an input of their networks, the context.

    Args:
        model: program of p(x, z).
        encoder: network from the program's arguments to features.
        flow: function from the number of dimensions D to a layer. It may be a class of
            :mod:`pyro_vae.flows`, a ``functools.partial`` of such a class, or your own subclass of
            :class:`pyro_vae.flows.Flow`.
        length: number of layers.
        amortized: whether the layers depend on x. If False, all data points share one flow.
        joint: whether one flow transforms all latents; see :class:`AmortizedGuide`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
        ... )
        >>> guide = pv.guides.AmortizedFlow(
        ...     model, pv.nets.MLP(16, [8]), flow=pv.flows.InverseAutoregressive, length=2
        ... )
        >>> guide(torch.zeros(5, 16))["z"].shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module,
        flow: Callable[[int], flows.Flow] = flows.Planar,
        length: int = 8,
        amortized: bool = True,
        joint: bool = True,
    ):
        family = functools.partial(
            families.Transformed, flow=flow, length=length, amortized=amortized
        )
        super().__init__(model, encoder, family, joint)
