"""One run of a pair of Pyro programs: the contract checked, every density reduced to its datum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, Unit
from pyro.distributions.util import scale_and_mask
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from pyro_vae.dreams import Dream
from pyro_vae.rules import check_agreement, check_event_shape, common_data_frame
from pyro_vae.samples import HeldSamples, log_prob_of_draw
from pyro_vae.sites import (
    PARTICLE_PLATE,
    Site,
    Unobserve,
    arranged,
    base_distribution,
    closed_form_kl,
    data_frame,
    own_scale,
    random_sites,
    reduce_to_datum,
    values_outside_support,
)

Program = Callable[..., Any]


@dataclass(frozen=True)
class Factor:
    """One site's factor of p(x, z) or q(z|x).

    ``log_prob`` has shape (K, B) for a local site, one inside the plate ``"data"``, and (K,) for a
    global one. It is masked, and scaled by everything but the plate ``"data"``; ``unscaled`` is
    masked alone.
    """

    site: Site
    log_prob: Tensor
    unscaled: Tensor

    @property
    def name(self) -> str:
        """The site's name."""
        return self.site["name"]

    @property
    def local(self) -> bool:
        """Whether the site belongs to a datum."""
        return data_frame(self.site) is not None

    @property
    def observed(self) -> bool:
        """Whether the site's value is given."""
        return self.site["is_observed"]

    @property
    def is_factor(self) -> bool:
        """Whether the site is a pyro.factor: a density without a value."""
        return isinstance(self.site["fn"], Unit)

    @property
    def reparameterized(self) -> bool:
        """Whether gradients pass through the site's value."""
        return self.observed or getattr(self.site["fn"], "has_rsample", False)

    @property
    def scaled(self) -> bool:
        """Whether anything but the plate ``"data"`` scales the site."""
        scale = own_scale(self.site)
        return isinstance(scale, Tensor) or scale != 1.0


class PairTrace:
    """One run of ``guide(*args)``, and of ``model(*args)`` replayed on what the guide drew.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        args: positional arguments of both.
        kwargs: keyword arguments of both.
        num_particles: K, drawn under an outer plate; that plate is left out when K is 1.
        plate_nesting: how many batch dimensions the programs use themselves; needed if K > 1.
        hold_samples: run both programs on copies of the guide's samples, see ``Terms.path``.

    Raises:
        ValueError: the pair breaks the contract for programs (docs/contract.md).
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        args: tuple = (),
        kwargs: dict | None = None,
        *,
        num_particles: int = 1,
        plate_nesting: int | None = None,
        hold_samples: bool = False,
    ):
        kwargs = kwargs or {}
        self._pair, self._arguments = (model, guide), (args, kwargs)
        self.num_particles = num_particles
        self.particle_dim = None if num_particles == 1 else -1 - plate_nesting
        if self.particle_dim is not None:
            particles = pyro.plate(PARTICLE_PLATE, num_particles, dim=self.particle_dim)
            model, guide = particles(model), particles(guide)
        self._samples = HeldSamples()
        with self._samples if hold_samples else nullcontext():
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = _replay(model, guide_trace, args, kwargs)
        self._replay_unobserved = lambda: _replay(Unobserve()(model), guide_trace, args, kwargs)
        self._traces = {"model": model_trace, "guide": guide_trace}

        model_sites = {site["name"]: site for site in random_sites(model_trace)}
        guide_sites = {site["name"]: site for site in random_sites(guide_trace)}
        check_agreement(model_sites, guide_sites)
        frame = common_data_frame([*model_sites.values(), *guide_sites.values()])
        self.batch_size = frame.size
        self.scale = (frame.full_size or frame.size) / frame.size
        self.model = {name: self._factor(site) for name, site in model_sites.items()}
        self.guide = {name: self._factor(site) for name, site in guide_sites.items()}

    @property
    def plate_nesting(self) -> int:
        """How many batch dimensions the programs' plates use, the particles' plate apart."""
        return -min(frame.dim for frame in self._plates())

    @property
    def plate_sizes(self) -> set[int]:
        """The sizes of those plates."""
        return {frame.size for frame in self._plates()}

    def parameters(self) -> list[Tensor]:
        """Return the tensors behind all parameters that the run met, unconstrained."""
        nodes = [n for trace in self._traces.values() for n in trace.nodes.values()]
        return list(
            dict.fromkeys(n["value"].unconstrained() for n in nodes if n["type"] == "param")
        )

    def parameter_names(self, program: str) -> frozenset[str]:
        """Return the names under which the ``"model"`` or the ``"guide"`` met parameters."""
        nodes = self._traces[program].nodes.items()
        return frozenset(name for name, node in nodes if node["type"] == "param")

    @property
    def latents(self) -> list[str]:
        """Names of the model's latent sites, in the model's order."""
        return [factor.name for factor in self.model.values() if not factor.observed]

    def held_samples(self) -> list[tuple[Tensor, Tensor]]:
        """Return the guide's samples, each as it was drawn and as it was held."""
        return [*zip(self._samples.drawn.values(), self._samples.held.values(), strict=True)]

    def samples(self) -> dict[str, Tensor]:
        """Return what the guide drew at the local latents: ``(K, B, *inner plates, *event)``."""
        sites = [self.guide[name].site for name in self.latents if self.model[name].local]
        return {site["name"]: self._value(site) for site in sites}

    def observations(self) -> dict[str, Tensor]:
        """Return the values of the local observed sites: ``(B, *inner plates, *event)``."""
        sites = [f.site for f in self.model.values() if f.observed and f.local and not f.is_factor]
        return {site["name"]: self._value(site)[0] for site in sites}

    def predict(self) -> dict[str, Tensor]:
        """Draw the local observed sites anew: ``(K, B, *inner plates, *event)``."""
        sites = random_sites(self._replay_unobserved())
        return {
            site["name"]: self._value(site)
            for site in sites
            if site["infer"].get("was_observed")
            and data_frame(site) is not None
            and not isinstance(site["fn"], Unit)
        }

    def dream(self) -> Dream:
        """Let the model draw latents and data together, as many as the minibatch has."""
        return Dream(*self._pair, *self._arguments)

    def total(self, factors: Iterable[Factor], *, local: bool) -> Tensor:
        """Sum the log-densities of the local factors (K, B), or of the global ones (K,)."""
        total = None
        for factor in factors:
            if factor.local is local:
                total = factor.log_prob if total is None else total + factor.log_prob
        return self._zeros(local) if total is None else total

    def score(self) -> Tensor:
        """Sum the unscaled log-densities of the local sites without a reparameterised sample."""
        factors = [f for f in self.guide.values() if f.local and not f.reparameterized]
        return sum((f.unscaled for f in factors), self._zeros(local=True))

    def kl(self, *, local: bool) -> Tensor:
        """Sum log q - log p over the local (K, B) or global (K,) latents, see ``Terms.kl``."""
        total = self._zeros(local)
        for name, q in self.guide.items():
            if q.local is local:
                total = total + self._kl(name)
        return total

    def kl_of_sites(self) -> dict[str, Tensor]:
        """Return log q - log p of each local latent (K, B), see ``Terms.kl_of_sites``."""
        behind = [f.name for f in self.guide.values() if f.local and f.name not in self.latents]
        names = [name for name in self.latents if self.model[name].local]
        if behind and len(names) > 1:
            raise ValueError(
                f"the KL of each site is asked for, but the guide gives sites {names} one joint "
                f"density, at {behind[0]!r}: build it with joint=False, or ask for no more than "
                "the sum"
            )
        if behind:
            return {names[0]: self.kl(local=True)}
        return {name: self._kl(name) for name in names}

    def kl_of_dimensions(self) -> dict[str, Tensor]:
        """Return log q - log p of each number of each local latent, ``Terms.kl_of_dimensions``."""
        found = {}
        for name in self.latents:
            q, p = self.guide[name], self.model[name]
            if q.local:
                q_each, p_each = self._each_dimension(q), self._each_dimension(p)
                try:
                    kl = kl_divergence(q_each, p_each)
                except NotImplementedError:
                    value = q.site["value"]
                    kl = q_each.log_prob(value) - p_each.log_prob(value)
                found[name] = self._arranged(kl, q.site)
        return found

    def log_guide_of_pairs(self) -> Tensor:
        """Return log q of each number of each latent given each datum, ``Terms`` says more."""
        names = [name for name in self.latents if self.guide[name].local]
        if len(names) != 1:
            raise ValueError(
                "the aggregated posterior of a minibatch takes one latent site in the plate "
                f'"data", got {names}: draw them as one'
            )
        q = self.guide[names[0]]
        each = self._each_dimension(q)
        if not isinstance(each, Normal):
            raise TypeError(
                f"the aggregated posterior of a minibatch takes Gaussians with independent "
                f"dimensions, but latent site {names[0]!r} has {type(each).__name__} under the "
                "guide: take AmortizedNormal"
            )
        value, loc, scale = (
            self._arranged(v, q.site).reshape(self.num_particles, self.batch_size, -1)
            for v in (q.site["value"], each.loc, each.scale)
        )
        return Normal(loc.unsqueeze(1), scale.unsqueeze(1)).log_prob(value.unsqueeze(2))

    def _each_dimension(self, factor: Factor) -> Any:
        """The distribution of each number of a latent, if they are independent."""
        site = factor.site
        each = base_distribution(site["fn"])
        behind = [f.name for f in self.guide.values() if f.local and f.name not in self.latents]
        if each.event_shape or behind or isinstance(each, Delta):
            raise ValueError(
                f"the KL of each dimension is asked for, but those of latent site {factor.name!r} "
                "are not independent, or have no density, under both model and guide: take a "
                "guide such as AmortizedNormal, or ask for the KL of the site"
            )
        if site["mask"] is not None or factor.scaled:
            raise ValueError(
                f"the KL of each dimension is asked for, but latent site {factor.name!r} is masked "
                "or scaled: ask for the KL of the site"
            )
        return each

    def _kl(self, name: str) -> Tensor:
        """The difference at a site of the guide, its expectation where that is known."""
        # In another order, a closed form would hold fixed what depends on its site.
        in_order = [each for each in self.guide if each in self.latents] == self.latents
        q = self.guide[name]
        if name not in self.latents:
            return q.log_prob
        p = self.model[name]
        closed_form = closed_form_kl(q.site, p.site) if in_order else None
        if closed_form is not None:
            return self._reduce(closed_form, q.site)
        return q.log_prob - p.log_prob

    def _plates(self) -> Iterator[CondIndepStackFrame]:
        for factor in (*self.model.values(), *self.guide.values()):
            for frame in factor.site["cond_indep_stack"]:
                if frame.vectorized and frame.name != PARTICLE_PLATE:
                    yield frame

    def _factor(self, site: Site) -> Factor:
        check_event_shape(site)
        try:
            log_prob = self._log_prob(site)
        except ValueError as error:
            raise ValueError(
                values_outside_support(site, site["value"])
                or f"site {site['name']!r}, of event shape {tuple(site['fn'].event_shape)}, cannot "
                f"score its value of shape {tuple(site['value'].shape)}: {error}"
            ) from error
        log_prob = torch.as_tensor(scale_and_mask(log_prob, mask=site["mask"]))
        scaled = scale_and_mask(log_prob, own_scale(site))
        unscaled = self._reduce(log_prob, site)
        return Factor(
            site, unscaled if scaled is log_prob else self._reduce(scaled, site), unscaled
        )

    def _log_prob(self, site: Site) -> Tensor:
        fn, value = site["fn"], site["value"]
        try:
            return fn.log_prob(value, *site["args"], **site["kwargs"])
        except (KeyError, NotImplementedError):  # Pyro's flows without an inverse raise either
            if value is not self._samples.held.get(site["name"]):
                raise
            return log_prob_of_draw(fn, self._samples.drawn[site["name"]], value)

    def _value(self, site: Site) -> Tensor:
        """Return a site's value with its dimensions in order: ``(K, B, *inner plates, *event)``."""
        return self._arranged(site["value"], site)

    def _arranged(self, value: Tensor, site: Site) -> Tensor:
        return arranged(value, site, self.particle_dim)

    def _reduce(self, log_prob: Tensor, site: Site) -> Tensor:
        return reduce_to_datum(
            log_prob, site, self.batch_size, self.particle_dim, self.num_particles
        )

    def _zeros(self, local: bool) -> Tensor:
        some = next(iter(self.model.values())).log_prob
        return some.new_zeros([self.num_particles, self.batch_size][: 2 if local else 1])


def _replay(model: Program, guide_trace: poutine.Trace, args: tuple, kwargs: dict) -> poutine.Trace:
    return poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
