"""One run of a pair of Pyro programs: check the contract and score every data point."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_vae._programs.agreement import (
    check_agreement,
    check_event_shape,
    check_rows,
    common_data_frame,
    is_delta,
)
from pyro_vae._programs.ancestral import JointSample
from pyro_vae._programs.data_plate import name_plates_in, names_for_guide, repeated_rows
from pyro_vae._programs.enumeration import (
    Enumeration,
    OwnDimensions,
    SummedOut,
    check_enumeration,
    is_enumerated,
    sampled_if_needed,
    uniform_where_masked,
)
from pyro_vae._programs.held_samples import HeldSamples, log_prob_of_draw
from pyro_vae._programs.outside import log_prob_on, require_same_support, support_to_check
from pyro_vae._programs.runs import AtValues, Program, as_guide, plain_trace, replay, trace_of
from pyro_vae._programs.sites import (
    PARTICLE_PLATE,
    WAS_GIVEN,
    Site,
    Unobserve,
    cannot_score,
    data_frame,
    is_factor,
    is_loss_of_guide,
    is_real,
    mask_of,
    masked_observations,
    observed_value,
    own_scale,
    placed,
    random_sites,
    rows_with_valid_parameters,
    sum_to_data_points,
    to_particle_layout,
    values_outside_support,
)
from pyro_vae._programs.trial_runs import OUT_OF_MEMORY
from pyro_vae._utils.messages import first_line


@dataclass(frozen=True)
class Factor:
    """One site's factor of p(x, z) or q(z|x).

    ``log_prob`` has shape (K, B) for a local site (inside the plate ``"data"``) and (K,) for a
    global one. It is masked, and has every scale except that of the plate ``"data"``.
    ``unscaled`` is masked, without any scale.
    """

    site: Site
    log_prob: Tensor
    unscaled: Tensor
    enumerated: bool = False

    @property
    def name(self) -> str:
        """The site's name."""
        return self.site["name"]

    @property
    def local(self) -> bool:
        """Whether the site has one value per data point."""
        return data_frame(self.site) is not None

    @property
    def observed(self) -> bool:
        """Whether the site's value is given."""
        return self.site["is_observed"]

    @property
    def is_factor(self) -> bool:
        """Whether the site is a pyro.factor: a density without a value."""
        return is_factor(self.site)

    @property
    def reparameterized(self) -> bool:
        """Whether gradients pass through the value; also True if it is observed or enumerated."""
        given = self.observed or self.enumerated
        return given or getattr(self.site["fn"], "has_rsample", False)

    @property
    def scaled(self) -> bool:
        """Whether the site has a scale other than that of the plate ``"data"``."""
        scale = own_scale(self.site)
        return isinstance(scale, Tensor) or scale != 1.0


class PairTrace:
    """One run of ``guide(*args)``, and of ``model(*args)`` replayed on the guide's samples.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        args: positional arguments of both programs.
        kwargs: keyword arguments of both programs.
        num_particles: K, sampled under an outer plate; there is no such plate if K is 1.
        plate_nesting: the number of batch dimensions that the programs use; needed if K > 1.
        hold_samples: run both programs on copies of the guide's samples, see ``Terms.path``.
        enumerates: whether a latent is known to be marked for enumeration. If False and a latent
            is marked, the programs run once more.
        folded: whether the particles are rows of the batch: the programs run on K copies of each
            row, instead of under an outer plate. The programs must treat rows independently.

    Raises:
        ValueError: The pair breaks the contract for programs (docs/contract.md).
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
        enumerates: bool = False,
        folded: bool = False,
    ):
        kwargs = kwargs or {}
        self._pair, self._arguments = (model, guide), (args, kwargs)
        self._copies = num_particles if folded else 1
        if folded:
            args, kwargs = repeated_rows((args, kwargs), len(args[0]), num_particles)
        guide = sampled_if_needed(as_guide(guide))
        self.num_particles = num_particles
        self.holds_samples = hold_samples
        outer = num_particles > 1 and not folded
        self.particle_dim = -1 - plate_nesting if outer else None
        if self.particle_dim is not None:
            particles = pyro.plate(PARTICLE_PLATE, num_particles, dim=self.particle_dim)
            model, guide = particles(model), particles(guide)
        run = functools.partial(self._run, model, guide, args, kwargs, hold_samples)
        first_enumerated = -1 - plate_nesting if enumerates else None
        guide_trace, model_trace = run(first_enumerated)
        sites = [*_sites(guide_trace, model_trace)]
        for site in sites:
            check_enumeration(site)
        if not enumerates and any(map(is_enumerated, sites)):
            common_data_frame(sites)
            enumerates, plate_nesting = True, _nesting(guide_trace, model_trace)
            guide_trace, model_trace = run(-1 - plate_nesting)
        elif outer or enumerates:
            _require_nesting(plate_nesting, guide_trace, model_trace)
        self.enumerates = enumerates
        unobserved = Unobserve()(model)
        self.replay_unobserved = lambda given: trace_of(
            replay(unobserved, _with(guide_trace, given)), *args, **kwargs
        )
        self._traces = {"model": model_trace, "guide": guide_trace}

        model_sites = {site["name"]: site for site in random_sites(model_trace)}
        guide_sites = {site["name"]: site for site in random_sites(guide_trace)}
        check_rows(model_trace, guide_trace)
        check_agreement(model_sites, guide_sites)
        frame = common_data_frame([*model_sites.values(), *guide_sites.values()])
        self.batch_size = frame.size // self._copies
        self.scale = (frame.full_size or frame.size) / frame.size
        if self.scale != 1.0:
            self.scale *= self._copies
        # Sites of the guide that cannot score the given value, see ``guide_at``.
        self.unscored: list[str] = []
        self._limited: set[str] = set()  # latents that the guide may sample outside their support
        self.averaged: list[str] = []
        self.summed: list[str] = []  # sites that only the model enumerates
        self.entangled: list[list[str]] = []
        self.summed_out: list[SummedOut] = []
        if enumerates:
            self.model, of_guide = self._enumerated(model_sites, guide_sites, plate_nesting)
        else:
            self.model = {name: self._factor(site) for name, site in model_sites.items()}
            of_guide = {name: self._factor(site) for name, site in guide_sites.items()}
        # Observed sites of the guide are not part of log q: they are a loss that training adds.
        self.guide = {n: f for n, f in of_guide.items() if not is_loss_of_guide(f.site)}
        self.guide_losses = [f for f in of_guide.values() if is_loss_of_guide(f.site)]

    def _run(
        self,
        model: Program,
        guide: Program,
        args: tuple,
        kwargs: dict,
        hold_samples: bool,
        first_enumerated: int | None,
    ) -> tuple[poutine.Trace, poutine.Trace]:
        """Return the traces of the guide and of the model."""
        if first_enumerated is not None:
            first_enumerated -= self.particle_dim is not None
            guide = EnumMessenger(first_available_dim=first_enumerated)(OwnDimensions()(guide))
            model = EnumMessenger()(OwnDimensions()(model))  # the dimensions after the guide's
        run_guide = functools.partial(plain_trace, guide)

        def run_model(*args: Any, **kwargs: Any) -> poutine.Trace:
            try:  # without the guide, which may have a fixed number of rows, as AutoGuides have
                trace = plain_trace(model, *args, **kwargs)
                trace.compute_log_prob()  # fails if observed rows do not fit a plate of fixed size
            except OUT_OF_MEMORY:
                raise
            except Exception:  # a model may need samples of the guide
                trace = plain_trace(replay(model, run_guide(*args, **kwargs)), *args, **kwargs)
            return trace

        self._samples = HeldSamples()
        with self._samples if hold_samples else contextlib.nullcontext():
            guide_trace = run_guide(*args, **kwargs)
        model_trace = plain_trace(replay(model, guide_trace), *args, **kwargs)
        names = name_plates_in(model_trace, model, args, kwargs, run_model)
        names = names_for_guide(model_trace, names)
        name_plates_in(guide_trace, guide, args, kwargs, run_guide, names)
        return guide_trace, model_trace

    @property
    def plate_nesting(self) -> int:
        """The number of batch dimensions of the programs' plates, without the particles' plate."""
        return _nesting(*self._traces.values())

    @property
    def plate_sizes(self) -> set[int]:
        """The sizes of the plates, without the particles' plate."""
        return {frame.size for frame in _plates(*self._traces.values())}

    def parameters(self, program: str) -> list[Tensor]:
        """Return the unconstrained tensors of the parameters that a program used in this run.

        Args:
            program: ``"model"`` or ``"guide"``.
        """
        return [*self.named_parameters(program).values()]

    def named_parameters(self, program: str) -> dict[str, Tensor]:
        """Return :meth:`parameters` by name."""
        nodes = self._traces[program].nodes.items()
        return {name: n["value"].unconstrained() for name, n in nodes if n["type"] == "param"}

    def depends_on(self, tensors: list[Tensor]) -> dict[str, list[bool]]:
        """Return, for each tensor, whether the model and the guide depend on it."""
        args, kwargs = self._arguments
        with torch.random.fork_rng(), torch.enable_grad():
            held = PairTrace(*self._pair, args, kwargs, hold_samples=True)
            of_guide = [f.log_prob for f in (*held.guide.values(), *held.guide_losses)]
            ends = {
                "model": [f.log_prob for f in held.model.values()],
                "guide": of_guide + [drawn for drawn, _ in held.held_samples()],
            }
            return {
                program: [g is not None for g in _gradients(values, tensors)]
                for program, values in ends.items()
            }

    def parameter_names(self, program: str) -> frozenset[str]:
        """Return the names of the parameters that the ``"model"`` or the ``"guide"`` used."""
        nodes = self._traces[program].nodes.items()
        return frozenset(name for name, node in nodes if node["type"] == "param")

    def guide_at(self, values: Mapping[str, Tensor]) -> Program:
        """Return the guide with given values at its sites, for a trial run.

        A flow without an inverse cannot score a given value. Its log-density is then zero, and the
        name of the site is in ``unscored``.
        """
        return AtValues(values)(self._pair[1])

    def drawn_values(self) -> dict[str, Tensor]:
        """Return the values that the guide sampled, by site, in the layout of the run."""
        drawn = (f for f in self.guide.values() if not f.observed and not f.enumerated)
        return {factor.name: factor.site["value"] for factor in drawn}

    def guide_of_copy(self, copy: int) -> Program:
        """Return the guide with the samples of one copy of the rows, in a run with ``folded``."""
        values = {}
        for name, factor in self.guide.items():
            dim = data_frame(factor.site).dim - factor.site["fn"].event_dim
            rows = factor.site["value"].unflatten(dim, (self._copies, -1))
            values[name] = rows.select(dim - 1, copy)
        return self.guide_at(values)

    def guide_of_particle(self, particle: int, single: PairTrace) -> Program:
        """Return the guide with the samples of one particle, in the layout of a single run.

        Args:
            particle: the index of a particle.
            single: a run of the pair with one particle.
        """
        values = {}
        for name, value in self.drawn_values().items():
            dim = self.particle_dim - self.guide[name].site["fn"].event_dim
            if value.dim() >= -dim:
                value = value.select(dim, particle if value.shape[dim] > 1 else 0)
            shape = single.guide[name].site["value"].shape
            values[name] = value.reshape(shape) if value.numel() == shape.numel() else value
        return self.guide_at(values)

    @property
    def latents(self) -> list[str]:
        """Names of the model's latent sites, in the model's order."""
        return [factor.name for factor in self.model.values() if not factor.observed]

    @property
    def summed_inside(self) -> list[Site]:
        """The sites that the model enumerates inside inner plates, in the model's order."""
        outside = {name for group in self.summed_out for name in group.sites}
        nodes = self._traces["model"].nodes
        return [nodes[name] for name in self.summed if name not in outside]

    def held_samples(self) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of each guide sample and its held copy."""
        return [*zip(self._samples.drawn.values(), self._samples.held.values(), strict=True)]

    def samples(self) -> dict[str, Tensor]:
        """Return the guide's samples of the local latents: ``(K, B, *inner plates, *event)``."""
        self.require_drawn()
        sites = [self.guide[name].site for name in self.latents if self.model[name].local]
        return {site["name"]: self._value(site) for site in sites}

    def observations(self) -> dict[str, Tensor]:
        """Return the values of the local observed sites: ``(B, *inner plates, *event)``."""
        return {s["name"]: observed_value(s)[: self.batch_size] for s in self._observed_sites}

    def masked_observations(self) -> dict[str, Tensor]:
        """Return which numbers of :meth:`observations` are masked, in the same shapes."""
        return {s["name"]: masked_observations(s)[: self.batch_size] for s in self._observed_sites}

    @property
    def _observed_sites(self) -> list[Site]:
        """The local observed sites."""
        return [f.site for f in self.model.values() if f.observed and f.local and not f.is_factor]

    @functools.cached_property
    def excluded(self) -> Tensor | None:
        """Whether each sample has a density of zero under the model, (K, B).

        It has a latent outside of its support, or a factor of minus infinity. The result is None
        if there can be no such sample.
        """
        # The first latent of a group that depends on enumerated values has the density of all.
        names = self._limited | {g[0] for g in self.entangled if not self._limited.isdisjoint(g)}
        able = [f for f in self.model.values() if f.is_factor or f.name in names]
        if not able:
            return None
        zero = [f.log_prob.isneginf() for f in able]
        zero = [each if f.local else each.unsqueeze(1) for f, each in zip(able, zero, strict=True)]
        return functools.reduce(torch.logical_or, zero).expand_as(self.zeros(local=True))

    def has_valid_parameters(self, *, except_in: Tensor) -> bool:
        """Return whether the parameters of all distributions are valid, with one particle.

        Args:
            except_in: the rows in which sites of the model may have any parameters, (B,).
        """
        for site in random_sites(self._traces["guide"]):
            if not rows_with_valid_parameters(site, self.batch_size).all():
                return False
        rows = (
            rows_with_valid_parameters(site, self.batch_size)
            for site in random_sites(self._traces["model"])
        )
        return all(bool((valid | except_in).all()) for valid in rows)

    def outside_support(self) -> dict[str, Constraint]:
        """Return the supports of latents that the guide samples on the whole real line, by name."""
        found = {}
        for name in sorted(self._limited):
            site = self.guide[name].site
            with contextlib.suppress(NotImplementedError):
                if is_real(site["fn"].support) and not is_delta(site) and mask_of(site) is None:
                    found[name] = self.model[name].site["fn"].support
        return found

    def sample_joint(self) -> JointSample:
        """Sample latents and data together from the model, as many as the minibatch has rows."""
        return JointSample(*self._pair, *self._arguments)

    def total(self, factors: Iterable[Factor], *, local: bool) -> Tensor:
        """Sum the log-densities of the local factors, (K, B), or of the global ones, (K,)."""
        total = None
        for factor in factors:
            if factor.local is local:
                total = factor.log_prob if total is None else total + factor.log_prob
        return self.zeros(local) if total is None else total

    def score(self) -> Tensor:
        """Sum the unscaled log-densities of the local sites without a reparameterized sample."""
        factors = [f for f in self.guide.values() if f.local and not f.reparameterized]
        return sum((f.unscaled for f in factors), self.zeros(local=True))

    def require_drawn(self) -> None:
        """Raise ValueError if the guide enumerates a site, because it then has no samples.

        Raises:
            ValueError: The guide enumerates a site.
        """
        if self.averaged:
            raise ValueError(
                f"the guide enumerates site {self.averaged[0]!r}, so its value is not a sample: it "
                "holds all values at once. Run the guide without "
                "infer={'enumerate': 'parallel'} there."
            )

    def _enumerated(
        self, model: dict[str, Site], guide: dict[str, Site], plate_nesting: int
    ) -> tuple[dict[str, Factor], dict[str, Factor]]:
        """Return the factors of both programs after summing over all enumerated sites."""
        width = plate_nesting + (self.particle_dim is not None)
        enumeration = Enumeration(model, guide, width)
        self.averaged, self.summed = enumeration.in_guide, enumeration.in_model
        tables, plain = [], []
        for sites in (model, guide):
            found, others = {}, {}
            for name, site in sites.items():
                table = self._table(site, width, enumeration)
                if table is None or not (is_enumerated(site) or enumeration.varies(table)):
                    others[name] = self._factor(site)
                    continue
                self._check_enumerated(site, of_guide=sites is guide)
                found[name] = table
            tables.append(found)
            plain.append(others)
        factors = []
        for sites, found, others in zip(
            (model, guide), enumeration.without(*tables), plain, strict=True
        ):
            for name, log_prob in found.items():
                enumerated, scale = name in enumeration.in_guide, own_scale(sites[name])
                scaled = scale_and_mask(log_prob, scale)
                others[name] = Factor(sites[name], scaled, log_prob, enumerated)
            factors.append({name: others[name] for name in sites if name in others})
        self.entangled, self.summed_out = enumeration.entangled, enumeration.summed_out
        return factors[0], factors[1]

    def _table(self, site: Site, width: int, enumeration: Enumeration) -> Tensor | None:
        """Return a local site's log-densities, (*enumerated values, *inner plates, K, B)."""
        if data_frame(site) is None:
            return None
        log_prob = uniform_where_masked(self._checked_log_prob(site), site)
        shape = torch.broadcast_shapes(log_prob.shape, (1,) * (width + enumeration.count))
        log_prob = log_prob.expand(shape)
        kept = enumeration.plates_to_keep(site, log_prob.shape[: enumeration.count])
        for position, dim in enumerate(enumeration.inner, start=enumeration.count):
            log_prob = log_prob.unsqueeze(position)
            if dim in kept:
                log_prob = log_prob.transpose(position, dim)
        outer = enumeration.count + len(enumeration.inner)
        rows = log_prob.flatten(end_dim=outer - 1)
        reduced = torch.vmap(functools.partial(self.reduced, site=site))(rows)
        return reduced.unflatten(0, log_prob.shape[:outer])

    @staticmethod
    def _check_enumerated(site: Site, *, of_guide: bool) -> None:
        """Raise ValueError if a site cannot be part of a sum over enumerated values."""
        scale = own_scale(site)
        if isinstance(scale, Tensor) and scale.numel() > 1:
            raise ValueError(
                f"site {site['name']!r} depends on an enumerated site, and its scale has shape "
                f"{tuple(scale.shape)}. A sum over enumerated values can only be scaled by one "
                "number. If the scale was for training, pass pv.unscaled(model) and "
                "pv.unscaled(guide)."
            )
        sampled = of_guide and not site["is_observed"] and not is_enumerated(site)
        if sampled and not getattr(site["fn"], "has_rsample", False):
            raise ValueError(
                f"site {site['name']!r} has no reparameterized sample and depends on an enumerated "
                "site. Enumerate this site too"
            )

    def _factor(self, site: Site) -> Factor:
        log_prob = self._checked_log_prob(site)
        scaled = scale_and_mask(log_prob, own_scale(site))
        unscaled = self.reduced(log_prob, site)
        return Factor(
            site, unscaled if scaled is log_prob else self.reduced(scaled, site), unscaled
        )

    def _checked_log_prob(self, site: Site) -> Tensor:
        """Check a site and return its masked log-density."""
        check_event_shape(site)
        drawn_at = self._drawn_at(site)
        if drawn_at is not None:
            require_same_support(site, drawn_at)
        try:
            log_prob = self._log_prob(site, drawn_at)
        except ValueError as error:
            raise ValueError(
                values_outside_support(site, site["value"])
                or f"site {site['name']!r}, of event shape {tuple(site['fn'].event_shape)}, cannot "
                f"score its value of shape {tuple(site['value'].shape)}: {first_line(error)}"
            ) from error
        except (KeyError, NotImplementedError) as error:
            raise ValueError(cannot_score(site, error)) from error
        return torch.as_tensor(scale_and_mask(log_prob, mask=site["mask"]))

    def _drawn_at(self, site: Site) -> Site | None:
        """Return the guide's site for a latent of the model, or None for any other site."""
        drawn_at = self._traces["guide"].nodes.get(site["name"])
        return None if drawn_at is site or site["is_observed"] else drawn_at

    def _log_prob(self, site: Site, drawn_at: Site | None) -> Tensor:
        fn, value = site["fn"], site["value"]
        try:
            if drawn_at is not None:
                support = support_to_check(site, drawn_at)
                if support is not None:
                    self._limited.add(site["name"])
                    return log_prob_on(support, site)
            return fn.log_prob(value, *site["args"], **site["kwargs"])
        except (KeyError, NotImplementedError):  # Pyro's flows without an inverse raise either one
            if value is self._samples.held.get(site["name"]):
                return log_prob_of_draw(fn, self._samples.drawn[site["name"]], value)
            if drawn_at is not None or not site["infer"].get(WAS_GIVEN):
                raise
            self.unscored.append(site["name"])
            return value.new_zeros(fn.batch_shape)

    def _value(self, site: Site) -> Tensor:
        """Return a site's value with its dimensions in order: ``(K, B, *inner plates, *event)``."""
        return self.to_particle_layout(site["value"], site)

    def to_particle_layout(self, value: Tensor, site: Site) -> Tensor:
        """Return values of a site in the order of ``sites.to_particle_layout``."""
        value = to_particle_layout(value, site, self.particle_dim)
        return value if self._copies == 1 else value[0].unflatten(0, (self._copies, -1))

    def placed(self, values: Tensor, site: Site, width: int | None = None) -> Tensor:
        """Reshape values (..., K, B) to the batch dimensions of a site, as ``sites.placed``."""
        if self._copies > 1:
            values = values.flatten(-2).unsqueeze(-2)
        return placed(values, site, self.particle_dim, width)

    def reduced(self, log_prob: Tensor, site: Site) -> Tensor:
        """Sum a site's log-densities for each particle and data point."""
        if self._copies == 1:
            return sum_to_data_points(
                log_prob, site, self.batch_size, self.particle_dim, self.num_particles
            )
        size = self._copies * self.batch_size
        summed = sum_to_data_points(log_prob, site, size, None, 1)
        if data_frame(site) is None:
            return summed.expand(self._copies)
        return summed.reshape(self._copies, self.batch_size)

    def masked_log_prob(self, site: Site) -> Tensor:
        """Return a site's masked, unscaled log-density for each element of its plates."""
        return self._checked_log_prob(site)

    def zeros(self, local: bool) -> Tensor:
        """Return zeros of shape (K, B), or (K,) for global sites."""
        some = next(iter(self.model.values())).log_prob
        return some.new_zeros([self.num_particles, self.batch_size][: 2 if local else 1])


def _gradients(values: list[Tensor], tensors: list[Tensor]) -> Sequence[Tensor | None]:
    total = sum(value.sum() for value in values)
    if not values or not total.requires_grad:
        return [None] * len(tensors)
    return torch.autograd.grad(total, tensors, retain_graph=True, allow_unused=True)


def _sites(*traces: poutine.Trace) -> Iterator[Site]:
    return itertools.chain(*map(random_sites, traces))


def _plates(*traces: poutine.Trace) -> Iterator[CondIndepStackFrame]:
    for site in _sites(*traces):
        for frame in site["cond_indep_stack"]:
            if frame.vectorized and frame.name != PARTICLE_PLATE:
                yield frame


def _nesting(*traces: poutine.Trace) -> int:
    return -min(frame.dim for frame in _plates(*traces))


def _require_nesting(given: int, *traces: poutine.Trace) -> None:
    """Raise ValueError if the programs use more batch dimensions than given.

    A plate would otherwise share a dimension with the particles or with enumerated values.
    """
    found = max((-frame.dim for frame in _plates(*traces)), default=0)
    if found > given:
        raise ValueError(
            f"the plates of the programs use {found} batch dimensions, but plate_nesting={given}. "
            "Programs that open more plates for other arguments need the largest number."
        )


def _with(trace: poutine.Trace, sites: Mapping[str, Site]) -> poutine.Trace:
    """Return a copy of a trace with more or other sites, for a replay."""
    trace = trace.copy()
    for name, site in sites.items():
        trace.nodes[name] = site
    return trace
