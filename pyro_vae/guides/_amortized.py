"""Amortized guides: an encoder gives the parameters of a family, for any model's latents.

Like Pyro's AutoGuides, a guide here takes the model and finds its latent sites by itself. Unlike
them, it is amortized: an encoder reads x, and one linear head gives the parameters of the latent
sites in the plate ``"data"``. Sites outside that plate are left to a guide beside this one.
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
    r"""q(z|x) of any family, for the latents of any model.

    .. math::
        q(z|x) = T_\# \, q_{\lambda(x)}, \qquad \lambda(x) = A \, \mathrm{encoder}(x) + a

    :math:`T` maps the reals onto the supports of the latent sites in the plate ``"data"``
    (``biject_to``; for a real support it is the identity) and # is the push-forward;
    :math:`q_\lambda` is the family's distribution with parameters :math:`\lambda`.

    The model is traced at the guide's first call, which makes the head; :func:`pyro_vae.fit` makes
    that call itself. The density is had at any values: ``poutine.condition(guide, data={"z": z})``
    traced on x scores z.

    Args:
        model: program of p(x, z) to build the guide for. It is traced, not kept as a submodule.
        encoder: network from the program's arguments to features (B, ...), flattened to (B, F).
        family: makes the family of D dimensions; see :mod:`pyro_vae.guides`.
        joint: whether several latents (or those of an inner plate) have one joint distribution;
            if not, they are independent given x, each of the family. A family of independent
            dimensions knows no difference.

    Shape:
        x is ``(B, *event)``. A call returns the latents by name, each ``(..., B, *its event)``.

    Raises:
        ValueError: at the first call: the model has no latent site in the plate ``"data"``; a
            latent is discrete; the encoder's output does not begin with the batch dimension; the
            family cannot have a latent's dimensions.
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
        """Return the parameters of the family for each datum, ``(B, P)``."""
        features = features_of(self.encoder, x, *covariates)
        if not self.built:
            sites = latent_sites(self._model.program, x, *covariates)
            self.build(sites, features.shape[-1], like=features)
        return self.built["head"](features)

    def build(self, sites: Sequence[LatentSite], width: int, like: Tensor) -> None:
        """Make the head, as the first call does.

        Args:
            sites: of the model.
            width: F, of the encoder's features.
            like: a tensor of their device and type.
        """

        def make() -> dict[str, nn.Module]:
            posterior = Posterior(sites, self._family, self._joint)
            return {"head": nn.Linear(width, posterior.num_parameters), "posterior": posterior}

        self.built.fill(make, sites, width, like)

    def sample(self, parameters: Tensor, x: Tensor, *covariates: Any) -> dict[str, Tensor]:
        """Sample the latents, given parameters ``(B, P)`` in place of the encoder's."""
        posterior = self.built["posterior"]
        plates, masks = surroundings(posterior.sites, self._model.program, x, *covariates)
        return posterior(parameters, plates, masks)


@records_init_args
class AmortizedNormal(AmortizedGuide):
    r"""Diagonal Gaussians (Kingma & Welling 2014, eq. 9).

    .. math::
        q(z|x) = \prod_s (T_s)_\# \, \mathcal{N}\bigl(\mu_s(x), \mathrm{diag}\,\sigma_s^2(x)\bigr)

    over the latent sites s; :math:`\sigma_s` by a softplus. See :class:`AmortizedGuide` for the
    arguments, the shapes and the errors.

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
    r"""A point for each datum: an autoencoder, or a most probable z.

    .. math:: q(z|x) = \delta(z - T(\mu(x)))

    What the ELBO makes of :math:`\log q` is a number that is given, or learned: a deterministic
    inverse of the model's flow brings its own log-determinant.

    Args:
        model: program of p(x, z).
        encoder: network from the program's arguments to features.
        log_density: of each dimension, a constant; None makes it an output of the head, for an
            objective of your own: the ELBO would lower it without end.
    """

    def __init__(
        self, model: Callable[..., Any], encoder: nn.Module, log_density: float | None = 0.0
    ):
        family = functools.partial(families.Delta, log_density=log_density)
        super().__init__(model, encoder, family)


@records_init_args
class AmortizedMultivariateNormal(AmortizedGuide):
    r"""Gaussians of full covariance :math:`L(x) L(x)^\top`, over all latents.

    Args:
        model: program of p(x, z).
        encoder: network from the program's arguments to features.
        joint: whether several latents are correlated; see :class:`AmortizedGuide`.
    """

    def __init__(self, model: Callable[..., Any], encoder: nn.Module, joint: bool = True):
        super().__init__(model, encoder, families.MultivariateNormal, joint)


@records_init_args
class AmortizedLowRankNormal(AmortizedGuide):
    r"""Gaussians of covariance :math:`W(x) W(x)^\top + \mathrm{diag}\,\sigma^2(x)`.

    Args:
        model: program of p(x, z).
        encoder: network from the program's arguments to features.
        rank: columns of W.
        joint: whether several latents are correlated; see :class:`AmortizedGuide`.
    """

    def __init__(
        self, model: Callable[..., Any], encoder: nn.Module, rank: int = 4, joint: bool = True
    ):
        family = functools.partial(families.LowRankNormal, rank=rank)
        super().__init__(model, encoder, family, joint)


@records_init_args
class AmortizedMixture(AmortizedGuide):
    r"""Mixtures of diagonal Gaussians, with gradients to the weights.

    .. math:: q(z|x) = T_\# \sum_k \pi_k(x) \, \mathcal{N}(\mu_k(x), \mathrm{diag}\,\sigma_k^2(x))

    See :class:`pyro_vae.distributions.MixtureOfDiagNormals`.

    Args:
        model: program of p(x, z).
        encoder: network from the program's arguments to features.
        components: K.
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
            - \sum_l \log|\det J_l(x)|, \qquad z = T f_L \circ \dots \circ f_1(\epsilon)

    The encoder gives the parameters of the layers (planar, radial, Sylvester, Householder), or the
    context of their networks (autoregressive, coupling, spline).

    Args:
        model: program of p(x, z).
        encoder: network from the program's arguments to features.
        flow: makes a layer from D: a class of :mod:`pyro_vae.flows`, a ``functools.partial`` of
            one, or your own :class:`pyro_vae.flows.Flow`.
        length: how many layers.
        amortized: whether the layers depend on x; if not, one flow serves all data.
        joint: whether one flow moves all latents; see :class:`AmortizedGuide`.

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
