"""Guides for models with a Markov chain of latents, a step for each step of the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions.transforms import IndependentTransform

from pyro_vae._programs.latent_sites import LatentSite, latent_sites, latents_of, surroundings
from pyro_vae._programs.sites import Site, mask_of_events
from pyro_vae._utils.init_args import records_init_args
from pyro_vae.guides import _families as families
from pyro_vae.guides._encoding import features_of
from pyro_vae.guides._families import Family
from pyro_vae.guides._lazy_modules import LazyModules
from pyro_vae.guides._model_ref import ModelRef
from pyro_vae.guides._posterior import Posterior
from pyro_vae.nets import MLP


@records_init_args
class SequenceGuide(PyroModule):
    r"""A structured inference network (Krishnan, Shalit & Sontag 2017), from the future backwards.

    .. math::
        q(z|x) = q(z_1|h_1) \prod_{t=2}^{\ell} q(z_t|z_{t-1}, h_t), \qquad
        h_t = \mathrm{GRU}(x_t, h_{t+1}), \quad h_{\ell+1} = 0

    :math:`h_t` is a summary of :math:`x_t, \dots, x_\ell`, which with :math:`z_{t-1}` is all that
    the posterior of :math:`z_t` depends on in a :class:`pyro_vae.models.SequenceModel`. One network
    for all t > 1 maps both to the parameters of the family; :math:`z_1`, without a step before it,
    has its own. The length :math:`\ell` of a sequence is the last step whose latent the model does
    not mask; x behind it is not looked at.

    The model is traced at the first call, which makes the networks, and again in each call, for
    the masks and for the number of steps, which may differ from call to call.

    Args:
        model: program of p(x, z), with a latent in the plate ``"data"`` for each of the T steps
            of x, in order, of the same shape and support. It is traced, not kept as a submodule.
        encoder: network from single steps ``(B T, *event)`` to features ``(B T, ...)`` for the
            GRU; if not given, the GRU has x itself.
        family: makes the family of D dimensions; see :mod:`pyro_vae.guides`.
        recurrent: width of :math:`h_t`.
        hidden: widths of the hidden layers between :math:`(z_{t-1}, h_t)` and the parameters; none
            for a linear map.

    Shape:
        x is ``(B, T, *event)``; covariates, such as lengths, go to the model alone. A call returns
        the latents by name, each ``(..., B, *its event)``.

    Raises:
        ValueError: ``recurrent`` is not positive; in a call: the model has not one latent for each
            step of x; at the first call: they differ in shape, plates or support, or what
            :class:`pyro_vae.guides.AmortizedGuide` refuses.

    Example:
        >>> import torch, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> model = pv.models.SequenceModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     transition=lambda z: dist.Normal(0.9 * z, 0.4).to_event(1),
        ...     likelihood=lambda z: dist.Normal(z, 0.1).to_event(1),
        ... )
        >>> guide = pv.guides.SequenceGuide(model, recurrent=8, hidden=[16])
        >>> guide(torch.randn(3, 4, 2), torch.tensor([4, 1, 3]))["z_4"].shape
        torch.Size([3, 2])
        >>> list(guide(torch.randn(3, 2, 2)))  # shorter sequences, the same parameters
        ['z_1', 'z_2']
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module | None = None,
        family: Callable[[int], Family] = families.Normal,
        recurrent: int = 64,
        hidden: Sequence[int] = (64,),
    ):
        super().__init__()
        if recurrent < 1:
            raise ValueError(f"recurrent must be at least 1, got {recurrent}")
        self._model = ModelRef(model)
        self._family, self._recurrent, self._hidden = family, recurrent, tuple(hidden)
        self.encoder = encoder
        self.built = LazyModules()  # the networks and the family, made at the first call
        self._site: LatentSite | None = None  # what the latents have in common

    def forward(self, x: Tensor, *covariates: Any) -> dict[str, Tensor]:
        """Sample the latents of the data plate given x."""
        latents = latents_of(self._model.program, x, *covariates)
        _check_steps(x, [site["name"] for site in latents])
        if self._site is None:
            first, *others = latent_sites(self._model.program, x, *covariates)
            for other in others:
                _check_alike(first, other)
            features = self._features(x[:, :1])
            self.build([first], features.shape[-1], like=features)
        summaries = self._summaries(x, _lengths(latents, self._site, x))
        plates, _ = surroundings([self._site], self._model.program, x, *covariates)
        family = self.built["family"]
        values: dict[str, Tensor] = {}
        rows: Tensor | None = None  # of the step before, as inputs of a network
        for latent, summary in zip(latents, summaries.unbind(1), strict=True):
            name, mask = latent["name"], mask_of_events(latent)
            if rows is None:
                parameters = self.built["first"](summary)
            else:
                summary = summary.expand(*rows.shape[:-1], -1)
                parameters = self.built["combiner"](torch.cat([rows, summary], -1))
            site = dataclasses.replace(self._site, name=name)
            posterior = Posterior([site], lambda _: family, joint=False)
            values |= posterior(parameters, plates, {name: mask})
            rows = site.inputs_of(values[name], x.shape[0])
        return values

    def _summaries(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Return :math:`h_1` to :math:`h_T`, ``(B, T, F)``; what is padded has that of the last."""
        batch_size, num_steps = x.shape[:2]
        # From the last step of a sequence to its first, which then stands for the rest. Read in
        # this order twice, the steps are in theirs again, and padding is never read.
        backwards = lengths.unsqueeze(-1) - 1 - torch.arange(num_steps, device=x.device)
        backwards = backwards.clamp(min=0)
        data = torch.arange(batch_size, device=x.device).unsqueeze(-1)
        features = self._features(x[data, backwards])
        # A cell rather than an nn.GRU, which on CUDA has no gradient in evaluation mode.
        states: list[Tensor | None] = [None]
        for feature in features.unbind(1):
            states.append(self.built["cell"](feature, states[-1]))
        return torch.stack(states[1:], 1)[data, backwards]

    def _features(self, x: Tensor) -> Tensor:
        """Return what the GRU has of each step, ``(B, T, F)``."""
        if self.encoder is not None:
            return features_of(self.encoder, x.flatten(0, 1)).unflatten(0, x.shape[:2])
        x = x.reshape(*x.shape[:2], -1)
        if x.is_floating_point():
            return x
        return x.to(self.built["cell"].weight_ih.dtype if self.built else torch.get_default_dtype())

    def build(self, sites: Sequence[LatentSite], width: int, like: Tensor) -> None:
        """Make the networks, as the first call does.

        Args:
            sites: of the model, the first alone: the others are like it.
            width: F, what the GRU has of each step.
            like: a tensor of the features' device and type.
        """
        (first,) = sites

        def make() -> dict[str, nn.Module]:
            posterior = Posterior([first], self._family, joint=False)
            given, count = first.num_inputs, posterior.num_parameters
            return {
                "cell": nn.GRUCell(width, self._recurrent),
                "first": MLP(self._recurrent, self._hidden, count),
                "combiner": MLP(given + self._recurrent, self._hidden, count),
                "family": posterior.families[0],
            }

        self.built.fill(make, sites, width, like)
        # The masks come with the latents of each call.
        self._site = dataclasses.replace(first, masked=False)


def _check_steps(x: Tensor, names: list[str]) -> None:
    if x.dim() < 2 or len(names) != x.shape[1]:
        raise ValueError(
            "SequenceGuide needs a model with one latent for each step of x, (B, T, *event): for x "
            f"of shape {tuple(x.shape)} the latents of the model are {names}. For other models, "
            "take HierarchicalGuide(order='top-down')."
        )


def _lengths(latents: Sequence[Site], site: LatentSite, x: Tensor) -> Tensor:
    """Return the number of the last step whose latent counts, ``(B,)``."""
    batch_size = x.shape[0]
    lengths = torch.zeros(batch_size, dtype=torch.long, device=x.device)
    for number, latent in enumerate(latents, 1):
        mask = mask_of_events(latent)
        if isinstance(mask, Tensor):
            counts = site.to_rows(mask, batch_size, event_dim=0).any(-1)
            lengths = torch.where(counts, number, lengths)
        else:
            lengths = torch.full_like(lengths, number)
    return lengths


def _check_alike(first: LatentSite, other: LatentSite) -> None:
    if _kind(first) != _kind(other):
        raise ValueError(
            "SequenceGuide has one network for all steps, but the latent sites "
            f"{first.name!r} and {other.name!r} differ in shape, plates or support: "
            f"{tuple(first.shape)} and {tuple(other.shape)}, {first.bijection.codomain} and "
            f"{other.bijection.codomain}. Take HierarchicalGuide(order='top-down')."
        )


def _kind(site: LatentSite) -> tuple[Any, ...]:
    bijection = site.bijection
    while isinstance(bijection, IndependentTransform):  # which equals itself alone
        bijection = bijection.base_transform
    plates = [(frame.name, frame.dim) for frame in site.plates]
    return site.batch_shape, site.event_shape, plates, bijection
