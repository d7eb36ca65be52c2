"""A guide for models with a Markov chain of latents, one for each step of the data."""

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
    r"""A structured inference network (Krishnan, Shalit & Sontag 2017) with a backward GRU.

    .. math::
        q(z|x) = q(z_1|h_1) \prod_{t=2}^{\ell} q(z_t|z_{t-1}, h_t), \qquad
        h_t = \mathrm{GRU}(x_t, h_{t+1}), \quad h_{\ell+1} = 0

    :math:`h_t` is a summary of :math:`x_t, \ldots, x_\ell`. In a
    :class:`pyro_vae.models.SequenceModel`, the posterior of :math:`z_t` depends only on these
    steps and on :math:`z_{t-1}`. One network for all t > 1 maps :math:`(z_{t-1}, h_t)` to the
    parameters of the family. Another network does so for :math:`z_1`, from :math:`h_1` alone.
    The length :math:`\ell` of a sequence is the last step whose latent the model does not mask.
    The guide does not read x after that step.

    The first call traces the model and creates the networks. Every later call traces it again for
    the masks and the number of steps, which may differ between calls.

    Args:
        model: program of p(x, z), with one latent in the plate ``"data"`` for each of the T steps
            of x, in order. All latents have the same shape and support. The model does not become
            a submodule.
        encoder: network from single steps ``(B T, *event)`` to features ``(B T, ...)`` for the
            GRU; without it, the GRU reads x itself.
        family: function from D to a family of D dimensions; see :mod:`pyro_vae.guides`.
        recurrent: width of :math:`h_t`.
        hidden: widths of the hidden layers between :math:`(z_{t-1}, h_t)` and the parameters; an
            empty sequence makes the map linear.

    Shape:
        x is ``(B, T, *event)``. Only the model uses the covariates, such as lengths. A call
        returns the latents by name, each ``(..., B, *event)`` with the event shape of its site.

    Raises:
        ValueError: ``recurrent`` is not positive. A call raises it if the model does not have one
            latent for each step of x. The first call raises it if the latents differ in shape,
            plates or support. It also raises the errors of
            :class:`pyro_vae.guides.AmortizedGuide`.

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
        self._site: LatentSite | None = None  # the properties that all latents share

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
        rows: Tensor | None = None  # the previous latent, as inputs of a network
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
        """Return :math:`h_1` to :math:`h_T`, ``(B, T, F)``; padded steps repeat the last."""
        batch_size, num_steps = x.shape[:2]
        # Indices from the last step of each sequence down to its first, which then repeats.
        # Indexing twice with them restores the order of the steps. Padding is never read.
        backwards = lengths.unsqueeze(-1) - 1 - torch.arange(num_steps, device=x.device)
        backwards = backwards.clamp(min=0)
        data = torch.arange(batch_size, device=x.device).unsqueeze(-1)
        features = self._features(x[data, backwards])
        # A cell, because nn.GRU on CUDA has no gradient in evaluation mode.
        states: list[Tensor | None] = [None]
        for feature in features.unbind(1):
            states.append(self.built["cell"](feature, states[-1]))
        return torch.stack(states[1:], 1)[data, backwards]

    def _features(self, x: Tensor) -> Tensor:
        """Return the inputs of the GRU for each step, ``(B, T, F)``."""
        if self.encoder is not None:
            return features_of(self.encoder, x.flatten(0, 1)).unflatten(0, x.shape[:2])
        x = x.reshape(*x.shape[:2], -1)
        if x.is_floating_point():
            return x
        return x.to(self.built["cell"].weight_ih.dtype if self.built else torch.get_default_dtype())

    def build(self, sites: Sequence[LatentSite], width: int, like: Tensor) -> None:
        """Create the networks, as the first call does.

        Args:
            sites: the first latent site of the model alone, because all others are like it.
            width: F, the number of the GRU's inputs for each step.
            like: a tensor with the device and dtype of the features.
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
            "SequenceGuide needs a model with one latent for each step of x, (B, T, *event). For x "
            f"of shape {tuple(x.shape)}, the latents of the model are {names}. For other models, "
            "use HierarchicalGuide(order='top-down')."
        )


def _lengths(latents: Sequence[Site], site: LatentSite, x: Tensor) -> Tensor:
    """Return the number of the last step whose latent is not masked, ``(B,)``."""
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
            f"{other.bijection.codomain}. Use HierarchicalGuide(order='top-down')."
        )


def _kind(site: LatentSite) -> tuple[Any, ...]:
    bijection = site.bijection
    while isinstance(bijection, IndependentTransform):  # it compares by identity, so unwrap it
        bijection = bijection.base_transform
    plates = [(frame.name, frame.dim) for frame in site.plates]
    return site.batch_shape, site.event_shape, plates, bijection
