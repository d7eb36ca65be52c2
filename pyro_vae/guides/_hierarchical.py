"""Guides for models with several layers of latents or with a sequence of latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae._programs.latent_sites import LatentSite, latent_sites, surroundings
from pyro_vae._utils.init_args import records_init_args
from pyro_vae.guides import _families as families
from pyro_vae.guides._encoding import features_of
from pyro_vae.guides._families import Family
from pyro_vae.guides._lazy_modules import LazyModules
from pyro_vae.guides._model_ref import ModelRef
from pyro_vae.guides._posterior import Posterior
from pyro_vae.nets import MLP


@records_init_args
class HierarchicalGuide(PyroModule):
    r"""Samples the latents in order, each conditioned on x and the earlier latents.

    .. math:: q(z|x) = \prod_{l} q(z_{\sigma(l)} \mid z_{\sigma(<l)}, x)

    All factors are of the same family. For each factor, a network maps the encoder's features and
    the values of the earlier latents to the parameters. A latent in an inner plate has one joint
    distribution over this plate. If it is masked, the elements of the plate are independent given
    the features and the earlier latents.

    Args:
        model: program of p(x, z). It does not become a submodule.
        encoder: network from the program's arguments to features (B, ...), flattened to (B, F).
        family: function from D to a family of D dimensions; see :mod:`pyro_vae.guides`.
        order: ``"top-down"`` is the model's sampling order (Sønderby et al. 2016; forward in time).
            ``"bottom-up"`` is the reverse order (Rezende et al. 2014; Burda et al. 2016). The names
            of all latents set any other order.
        history: number of earlier latents that each latent depends on; None means all. With 1,
            the latents form a Markov chain.
        hidden: widths of the hidden layers of each factor's network.

    Raises:
        ValueError: ``history`` is negative. The first call raises it if the model has no latent
            site in the plate ``"data"`` or if ``order`` does not name all of them. It also raises
            the errors of :class:`pyro_vae.guides.AmortizedGuide`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module,
        family: Callable[[int], Family] = families.Normal,
        order: str | Sequence[str] = "bottom-up",
        history: int | None = None,
        hidden: Sequence[int] = (64,),
    ):
        super().__init__()
        if history is not None and history < 0:
            raise ValueError(f"history must be 0 or more, or None, got {history}")
        self._model = ModelRef(model)
        self._family, self._order, self._hidden = family, order, tuple(hidden)
        self._history = history
        self.encoder = encoder
        self.built = LazyModules()  # a network and a posterior per site, made at the first call
        self._sites: tuple[LatentSite, ...] = ()

    def forward(self, x: Tensor, *covariates: Any) -> dict[str, Tensor]:
        """Sample the latents of the data plate given x."""
        features = features_of(self.encoder, x, *covariates)
        if not self._sites:
            sites = latent_sites(self._model.program, x, *covariates)
            self.build(sites, features.shape[-1], like=features)
        plates, masks = surroundings(self._sites, self._model.program, x, *covariates)
        values: dict[str, Tensor] = {}
        rows: list[Tensor] = []
        for number, site in enumerate(self._sites):
            given = [features, *rows[self._first_before(number) :]]
            batch = torch.broadcast_shapes(*(each.shape[:-1] for each in given))
            given = torch.cat([each.expand(*batch, -1) for each in given], -1)
            parameters = self.built[f"network_{number}"](given)
            values |= self.built[f"posterior_{number}"](parameters, plates, masks)
            rows.append(site.inputs_of(values[site.name], x.shape[0]))
        return values

    def _first_before(self, number: int) -> int:
        return 0 if self._history is None else max(0, number - self._history)

    def build(self, sites: Sequence[LatentSite], width: int, like: Tensor) -> None:
        """Create a network for each latent, as the first call does.

        Args:
            sites: the latent sites, in the model's order.
            width: F, the number of the encoder's features.
            like: a tensor with the device and dtype of the features.
        """
        ordered = self._ordered(tuple(sites))
        counts = [site.num_inputs for site in ordered]

        def make() -> dict[str, nn.Module]:
            modules: dict[str, nn.Module] = {}
            for number, site in enumerate(ordered):
                # A masked site has no joint distribution over its inner plates.
                posterior = Posterior([site], self._family, joint=not site.masked)
                inputs = width + sum(counts[self._first_before(number) : number])
                network = MLP(inputs, self._hidden, posterior.num_parameters)
                modules |= {f"network_{number}": network, f"posterior_{number}": posterior}
            return modules

        self.built.fill(make, sites, width, like)
        self._sites = ordered

    def _ordered(self, sites: tuple[LatentSite, ...]) -> tuple[LatentSite, ...]:
        if self._order == "top-down":
            return sites
        if self._order == "bottom-up":
            return sites[::-1]
        by_name = {site.name: site for site in sites}
        if isinstance(self._order, str) or sorted(self._order) != sorted(by_name):
            raise ValueError(
                'order must be "top-down", "bottom-up", or the names of all latent sites of the '
                f"model, which are {list(by_name)}; got {self._order!r}"
            )
        return tuple(by_name[name] for name in self._order)
