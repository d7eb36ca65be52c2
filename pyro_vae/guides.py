"""Guides: amortized programs of q(z|x), built for any model by tracing it once.

Like Pyro's AutoGuides, a guide here takes the model and finds its latent sites by itself. Unlike
them, it is amortized: an encoder reads x, and one linear head gives the parameters of every
latent site in the plate ``"data"``. Sites outside that plate are left to a guide beside this one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import IndependentTransform, Transform, identity_transform
from torch.nn import functional as F

from pyro_vae.sites import DATA_PLATE, Site, data_frame, random_sites


@dataclass(frozen=True)
class LatentSite:
    """What a guide must know of a latent site of the model that belongs to a datum.

    Args:
        name: of the site.
        plates: the frames of its vectorised plates, the plate ``"data"`` among them.
        batch_shape: sizes of its plates, that of ``"data"`` left out.
        event_shape: of its value, unconstrained.
        bijection: maps the reals onto the site's support.
        masked: whether the model masks it; the guide then asks the model for the mask.
    """

    name: str
    plates: tuple[CondIndepStackFrame, ...]
    batch_shape: torch.Size
    event_shape: torch.Size
    bijection: Transform
    masked: bool

    @property
    def shape(self) -> torch.Size:
        """Shape of one datum's unconstrained value."""
        return self.batch_shape + self.event_shape

    @property
    def data_axis(self) -> int:
        """Where the data dimension stands among the batch dimensions, from the left."""
        dim = next(frame.dim for frame in self.plates if frame.name == DATA_PLATE)
        return len(self.batch_shape) + 1 + dim


class AmortizedNormal(PyroModule):
    r"""The diagonal Gaussian guide, for the latents of any model (Kingma & Welling 2014, eq. 9).

    .. math::
        q(z|x) = \prod_s (T_s)_\# \, \mathcal{N}\bigl(\mu_s(x), \mathrm{diag}\,\sigma_s^2(x)\bigr)

    over the latent sites s in the plate ``"data"``. :math:`T_s` maps the reals onto the support of
    the site (``biject_to``; for a real support it is the identity) and # is the push-forward. One
    linear head on ``encoder(x, *covariates)`` gives every :math:`\mu_s` and, through a softplus,
    every :math:`\sigma_s`.

    The model is traced at the guide's first call, which makes the head; :func:`pyro_vae.fit` makes
    that call itself.

    Args:
        model: program of p(x, z) to build the guide for. It is traced, not kept as a submodule.
        encoder: network from the program's arguments to features (B, ...), flattened to (B, F).

    Shape:
        x is ``(B, *event)``. A call returns the latents by name, each ``(..., B, *its event)``.

    Raises:
        ValueError: at the first call: the model has no latent site in the plate ``"data"``; a
            latent is discrete; the encoder's output does not begin with the batch dimension.

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
        super().__init__()
        self._model = (model,)  # in a tuple, so that its parameters are not the guide's
        self.encoder = encoder
        self.head: nn.Linear | None = None
        self.sites: tuple[LatentSite, ...] = ()

    def forward(self, x: Tensor, *covariates: Any) -> dict[str, Tensor]:
        """Sample the latents of the data plate given x."""
        features = self.encoder(x, *covariates)
        if not self.sites:
            self._build(features, x, *covariates)
        parameters = self.head(features.flatten(1))
        plates = _make_plates(self.sites, x)
        masks = self._masks(x, *covariates)
        values = {}
        for site, raw in zip(self.sites, self._split(parameters), strict=True):
            with contextlib.ExitStack() as stack:
                for frame in site.plates:
                    stack.enter_context(plates[frame.name])
                if site.masked:
                    stack.enter_context(poutine.mask(mask=masks[site.name]))
                values[site.name] = pyro.sample(site.name, self._posterior(site, raw))
        return values

    def _masks(self, x: Tensor, *covariates: Any) -> dict[str, Tensor]:
        if not any(site.masked for site in self.sites):
            return {}
        return {s["name"]: s["mask"] for s in _latents(self._model[0], x, *covariates)}

    def _split(self, parameters: Tensor) -> tuple[Tensor, ...]:
        return parameters.split([2 * site.shape.numel() for site in self.sites], dim=-1)

    def _posterior(self, site: LatentSite, raw: Tensor) -> TorchDistributionMixin:
        raw = raw.unflatten(-1, (2, *site.shape)).movedim(0, 1 + site.data_axis)
        loc, raw_scale = raw.unbind(0)
        # softplus(log(e - 1)) = 1: a fresh guide starts at the scale of a standard normal prior.
        scale = F.softplus(raw_scale + 0.5413248546129181)
        return push_forward(dist.Normal(loc, scale), site.bijection, len(site.event_shape))

    def _build(self, features: Tensor, x: Tensor, *covariates: Any) -> None:
        if features.dim() < 2 or features.shape[0] != x.shape[0]:
            raise ValueError(
                f"the encoder must map x of shape {tuple(x.shape)} to features of shape "
                f"({x.shape[0]}, F), one row for each datum; got {tuple(features.shape)}"
            )
        sites = latent_sites(self._model[0], x, *covariates)
        inputs, outputs = features[0].numel(), 2 * sum(site.shape.numel() for site in sites)
        if self.head is None:
            self.head = nn.Linear(inputs, outputs, device=features.device, dtype=features.dtype)
        elif (self.head.in_features, self.head.out_features) != (inputs, outputs):
            raise ValueError(
                f"the head that was loaded maps {self.head.in_features} features to "
                f"{self.head.out_features} parameters; this encoder and model need {inputs} and "
                f"{outputs}"
            )
        self.sites = sites

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Make the head that is about to be loaded, where no call has made it yet."""
        weight = state_dict.get(f"{prefix}head.weight")
        if weight is not None and self.head is None:
            self.head = nn.Linear(*weight.shape[::-1], device=weight.device, dtype=weight.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)


def push_forward(
    base: TorchDistributionMixin, bijection: Transform, event_dim: int
) -> TorchDistributionMixin:
    """Map a distribution of unconstrained scalars through a bijection onto a support.

    Args:
        base: distribution of scalars, of batch shape ``(..., *event)``.
        bijection: from the reals onto the support, over the event.
        event_dim: how many of the base's rightmost batch dimensions make an event.

    Returns:
        A distribution over the support, in the form that closed-form KLs are known for: the base
        itself where the support is real, and independent scalars where the bijection acts so.
    """
    while isinstance(bijection, IndependentTransform):
        bijection = bijection.base_transform
    if bijection == identity_transform:
        return base.to_event(event_dim)
    # The cache lets a sample be scored without inverting; a new one for each draw is never stale.
    bijection = bijection.with_cache(1)
    inner = bijection.domain.event_dim
    pushed = dist.TransformedDistribution(base.to_event(inner), [bijection])
    return pushed.to_event(event_dim - inner)


def latent_sites(model: Callable[..., Any], x: Tensor, *covariates: Any) -> tuple[LatentSite, ...]:
    """Trace the model once on x and describe its latent sites in the plate ``"data"``.

    Args:
        model: program of p(x, z).
        x: minibatch ``(B, *event)``.
        *covariates: further arguments of the program.

    Raises:
        ValueError: there is no such site, or one has a discrete support.
    """
    # The plates are read with one row less than there may be data in all: one that keeps its size
    # subsamples. The supports are read with all rows.
    rows = slice(0, max(1, x.shape[0] - 1))
    fewer = [
        a[rows] if isinstance(a, Tensor) and a.dim() and len(a) == len(x) else a
        for a in (x, *covariates)
    ]
    plates = {site["name"]: site["cond_indep_stack"] for site in _latents(model, *fewer)}
    latents = _latents(model, x, *covariates)
    return tuple(_describe(site, plates[site["name"]]) for site in latents)


def _latents(model: Callable[..., Any], *arguments: Any) -> list[Site]:
    with torch.no_grad(), poutine.block():
        sites = list(random_sites(poutine.trace(model).get_trace(*arguments)))
    latents = [site for site in sites if not site["is_observed"] and data_frame(site) is not None]
    if not latents:
        raise ValueError(
            'the model has no latent site in the plate "data"; its sites are '
            f"{[site['name'] for site in sites]}. An amortized guide needs one: put "
            'pyro.sample("z", ...) inside `with pyro.plate("data", x.shape[0]):`.'
        )
    return latents


def _describe(site: Site, plates: tuple[CondIndepStackFrame, ...]) -> LatentSite:
    fn = site["fn"]
    data_dim = data_frame(site).dim
    for frame in plates:
        if frame.name != DATA_PLATE and frame.full_size not in (None, frame.size):
            raise ValueError(
                f"latent site {site['name']!r} stands in the plate {frame.name!r}, which "
                f"subsamples {frame.size} of {frame.full_size}: an amortized guide needs all of a "
                "datum's latents. Write its guide yourself."
            )
    try:
        support = constant_over_data(fn.support, data_dim - fn.event_dim, site["name"])
        bijection = biject_to(support)
    except NotImplementedError:
        raise ValueError(
            f"latent site {site['name']!r} has the support {fn.support}, onto which nothing maps "
            "the reals: a continuous guide cannot sample it. Write its guide yourself, or sum it "
            "out of the model."
        ) from None
    batch_shape = list(fn.batch_shape)
    del batch_shape[data_dim]
    return LatentSite(
        name=site["name"],
        plates=tuple(frame for frame in plates if frame.vectorized),
        batch_shape=torch.Size(batch_shape),
        event_shape=torch.Size(bijection.inverse_shape(fn.event_shape)),
        bijection=bijection,
        masked=isinstance(site["mask"], Tensor),
    )


def constant_over_data(support: Constraint, axis: int, name: str) -> Constraint:
    """Return a support whose bounds have one row, for they must hold for batches of any size.

    Args:
        support: of a site.
        axis: where the data's dimension stands in its bounds, from the right.
        name: of the site, for the message.

    Raises:
        ValueError: the bounds differ from datum to datum.
    """
    support = copy.copy(support)
    for attribute, value in vars(support).items():
        if isinstance(value, Constraint):
            setattr(support, attribute, constant_over_data(value, axis, name))
        elif isinstance(value, Tensor) and (value == value.flatten()[0]).all():
            setattr(support, attribute, value.flatten()[0].item())
        elif isinstance(value, Tensor) and value.dim() >= -axis:
            row = value.narrow(axis, 0, 1)
            if not (value == row).all():
                raise ValueError(
                    f"the support of latent site {name!r} differs from datum to datum: an "
                    "amortized guide needs one for all. Scale the latent inside the model instead."
                )
            setattr(support, attribute, row)
    return support


def _make_plates(sites: tuple[LatentSite, ...], x: Tensor) -> dict[str, pyro.plate]:
    """Make the model's plates anew, that of the data for the batch at hand."""
    plates = {}
    for frame in {frame.name: frame for site in sites for frame in site.plates}.values():
        if frame.name != DATA_PLATE:
            plates[frame.name] = pyro.plate(frame.name, frame.size, dim=frame.dim)
        elif frame.full_size in (None, frame.size):
            plates[frame.name] = pyro.plate(frame.name, x.shape[0], dim=frame.dim)
        else:  # the batch stands for more data than it holds
            batch = torch.arange(x.shape[0], device=x.device)
            plates[frame.name] = pyro.plate(
                frame.name, frame.full_size, subsample=batch, dim=frame.dim
            )
    return plates
