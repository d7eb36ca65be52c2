"""One run of a pair of Pyro programs: the contract checked, every density reduced to its datum."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_vae.sites import (
    PARTICLE_PLATE,
    Site,
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
    global one. It is masked, and scaled by everything but the plate ``"data"``.
    """

    site: Site
    log_prob: Tensor

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
    ):
        kwargs = kwargs or {}
        self.num_particles = num_particles
        self.particle_dim = None if num_particles == 1 else -1 - plate_nesting
        if self.particle_dim is not None:
            particles = pyro.plate(PARTICLE_PLATE, num_particles, dim=self.particle_dim)
            model, guide = particles(model), particles(guide)
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = _replay(model, guide_trace, args, kwargs)
        self._replay_unobserved = lambda: _replay(
            poutine.uncondition(model), guide_trace, args, kwargs
        )
        self._traces = {"model": model_trace, "guide": guide_trace}

        model_sites = {site["name"]: site for site in random_sites(model_trace)}
        guide_sites = {site["name"]: site for site in random_sites(guide_trace)}
        _check_names(model_sites, guide_sites)
        frame = _common_data_frame([*model_sites.values(), *guide_sites.values()])
        self.batch_size = frame.size
        self.scale = (frame.full_size or frame.size) / frame.size
        self.model = {name: self._factor(site) for name, site in model_sites.items()}
        self.guide = {name: self._factor(site) for name, site in guide_sites.items()}

    @property
    def plate_nesting(self) -> int:
        """How many batch dimensions the programs' plates use, the particles' plate apart."""
        factors = [*self.model.values(), *self.guide.values()]
        return -min(
            frame.dim
            for factor in factors
            for frame in factor.site["cond_indep_stack"]
            if frame.vectorized and frame.name != PARTICLE_PLATE
        )

    def parameter_names(self, program: str) -> frozenset[str]:
        """Return the names under which the ``"model"`` or the ``"guide"`` met parameters."""
        nodes = self._traces[program].nodes.items()
        return frozenset(name for name, node in nodes if node["type"] == "param")

    @property
    def latents(self) -> list[str]:
        """Names of the model's latent sites, in the model's order."""
        return [factor.name for factor in self.model.values() if not factor.observed]

    def samples(self) -> dict[str, Tensor]:
        """Return what the guide drew at the local latents: ``(K, B, *inner plates, *event)``."""
        sites = [self.guide[name].site for name in self.latents if self.model[name].local]
        return {site["name"]: self._value(site) for site in sites}

    def observations(self) -> dict[str, Tensor]:
        """Return the values of the local observed sites: ``(B, *inner plates, *event)``."""
        sites = [f.site for f in self.model.values() if f.observed and f.local]
        return {site["name"]: self._value(site)[0] for site in sites}

    def predict(self) -> dict[str, Tensor]:
        """Draw the local observed sites anew: ``(K, B, *inner plates, *event)``."""
        sites = random_sites(self._replay_unobserved())
        return {
            site["name"]: self._value(site)
            for site in sites
            if site["infer"].get("was_observed") and data_frame(site) is not None
        }

    def total(self, factors: Iterable[Factor], *, local: bool) -> Tensor:
        """Sum the log-densities of the local factors (K, B), or of the global ones (K,)."""
        total = None
        for factor in factors:
            if factor.local is local:
                total = factor.log_prob if total is None else total + factor.log_prob
        return self._zeros(local) if total is None else total

    def kl(self, *, local: bool) -> Tensor:
        """Sum log q - log p over the local (K, B) or global (K,) latents, see ``Terms.kl``."""
        total = self._zeros(local)
        for name, q in self.guide.items():
            if q.local is not local:
                continue
            p = self.model[name] if name in self.latents else None
            closed_form = None if p is None else closed_form_kl(q.site, p.site)
            if closed_form is not None:
                self._check_order()
                total = total + self._reduce(closed_form, q.site)
            else:
                total = total + q.log_prob if p is None else total + q.log_prob - p.log_prob
        return total

    def _check_order(self) -> None:
        guide_order = [name for name in self.guide if name in self.latents]
        if guide_order != self.latents:
            raise ValueError(
                "an analytic KL needs model and guide to sample their latents in the same order; "
                f"the model's order is {self.latents}, the guide's {guide_order}. Reorder the "
                "guide, or use objectives.ELBO."
            )

    def _factor(self, site: Site) -> Factor:
        try:
            log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        except ValueError as error:
            raise ValueError(
                values_outside_support(site, site["value"])
                or f"site {site['name']!r}, of event shape {tuple(site['fn'].event_shape)}, cannot "
                f"score its value of shape {tuple(site['value'].shape)}: {error}"
            ) from error
        log_prob = scale_and_mask(log_prob, own_scale(site), site["mask"])
        return Factor(site, self._reduce(torch.as_tensor(log_prob), site))

    def _value(self, site: Site) -> Tensor:
        """Return a site's value with its dimensions in order: ``(K, B, *inner plates, *event)``."""
        value, event_dim = site["value"], site["fn"].event_dim
        batch_dims = range(event_dim - value.dim(), 0)
        plates = [frame.dim for frame in site["cond_indep_stack"] if frame.vectorized]
        kept = [dim for dim in batch_dims if dim in plates]
        value = value.squeeze([dim - event_dim for dim in batch_dims if dim not in plates])
        data_axis = kept.index(data_frame(site).dim)
        if self.particle_dim is None or self.particle_dim not in kept:
            value, data_axis = value.unsqueeze(0), data_axis + 1
        return value.movedim(data_axis, 1)

    def _reduce(self, log_prob: Tensor, site: Site) -> Tensor:
        return reduce_to_datum(
            log_prob, site, self.batch_size, self.particle_dim, self.num_particles
        )

    def _zeros(self, local: bool) -> Tensor:
        some = next(iter(self.model.values())).log_prob
        return some.new_zeros([self.num_particles, self.batch_size][: 2 if local else 1])


def _replay(model: Program, guide_trace: poutine.Trace, args: tuple, kwargs: dict) -> poutine.Trace:
    return poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)


def guide_log_prob(
    guide: Program, args: tuple, values: dict[str, Tensor], *, plate_nesting: int
) -> Tensor:
    """Score given values under the guide: log q(z_m|x_b) for all M values and B data points.

    Args:
        guide: program of q(z|x).
        args: a minibatch x of B rows, and covariates.
        values: by latent site, ``(M, *inner plates, *event)``.
        plate_nesting: how many batch dimensions the guide uses.

    Returns:
        Shape (M, B), in nats.

    Raises:
        ValueError: the guide has auxiliary sites, or a density that cannot be had at a value the
            guide did not draw.
    """
    sites = {s["name"]: s for s in random_sites(poutine.trace(guide).get_trace(*args))}
    if auxiliary := [n for n, s in sites.items() if n not in values and not s["is_observed"]]:
        raise ValueError(
            f"the guide has the auxiliary site {auxiliary[0]!r}: its density at given latents is "
            "an integral over that site, which is not known"
        )
    num_values = len(next(iter(values.values())))
    given = {}
    for name, value in values.items():
        dim, event_dim = data_frame(sites[name]).dim, sites[name]["fn"].event_dim
        value = value.unsqueeze(value.dim() - event_dim + 1 + dim)
        missing = 1 + plate_nesting + event_dim - value.dim()
        given[name] = value.reshape(num_values, *(1,) * missing, *value.shape[1:])
    particles = pyro.plate(PARTICLE_PLATE, num_values, dim=-1 - plate_nesting)
    trace = poutine.trace(particles(poutine.condition(guide, data=given))).get_trace(*args)
    log_prob = torch.zeros(())
    for site in random_sites(trace):
        try:
            site_log_prob = site["fn"].log_prob(site["value"])
        except (KeyError, NotImplementedError) as error:
            raise ValueError(
                f"guide site {site['name']!r} cannot be scored at a value that the guide did not "
                f"draw: {site['fn']} has no inverse"
            ) from error
        site_log_prob = scale_and_mask(site_log_prob, own_scale(site), site["mask"])
        batch_size = data_frame(site).size
        reduced = reduce_to_datum(site_log_prob, site, batch_size, -1 - plate_nesting, num_values)
        log_prob = reduced + log_prob.to(reduced.device)
    return log_prob


def _check_names(model: dict[str, Site], guide: dict[str, Site]) -> None:
    latents = [name for name, site in model.items() if not site["is_observed"]]
    for name in latents:
        if name not in guide or guide[name]["is_observed"]:
            raise ValueError(
                f"latent site {name!r} of the model is missing in the guide, which samples "
                f"{[n for n, s in guide.items() if not s['is_observed']]}. Add "
                f"pyro.sample({name!r}, ...) to the guide, or observe it in the model."
            )
        inside = [data_frame(sites[name]) is not None for sites in (model, guide)]
        if inside[0] != inside[1]:
            where = [("outside", "inside")[flag] for flag in inside]
            raise ValueError(
                f'site {name!r} stands {where[0]} the plate "data" in the model and {where[1]} it '
                "in the guide: both must agree."
            )
    for name, site in guide.items():
        if (
            name not in latents
            and not site["is_observed"]
            and not site["infer"].get("is_auxiliary")
        ):
            raise ValueError(
                f"the guide samples site {name!r}, which is no latent site of the model; those are "
                f'{latents}. Rename it, or mark it with infer={{"is_auxiliary": True}}.'
            )


def _common_data_frame(sites: list[Site]) -> CondIndepStackFrame:
    """Return the frame of the plate ``"data"``, which all sites inside it must share."""
    frames = {site["name"]: data_frame(site) for site in sites if data_frame(site) is not None}
    if not frames:
        plates = {frame.name for site in sites for frame in site["cond_indep_stack"]}
        raise ValueError(
            'no site of the model stands in a vectorised plate named "data"; its sites are '
            f"{[site['name'] for site in sites]} and its plates "
            f"{sorted(plates - {PARTICLE_PLATE})}. Put everything that belongs to a datum inside "
            '`with pyro.plate("data", x.shape[0]):`.'
        )
    (first, frame), *others = frames.items()
    for name, other in others:
        if (other.size, other.full_size) != (frame.size, frame.full_size):
            raise ValueError(
                f'the plate "data" has size {frame.size} (of {frame.full_size}) at site {first!r} '
                f"and {other.size} (of {other.full_size}) at site {name!r}: they must agree."
            )
    return frame
