"""The latents of a model with one value per data point, found by tracing it."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

from pyro_vae._programs.data_plate import name_plates_in
from pyro_vae._programs.enumeration import check_enumeration, is_enumerated
from pyro_vae._programs.runs import is_traced, outside_of_plates, plain_trace, plate_of_guide
from pyro_vae._programs.sites import (
    DATA_PLATE,
    Site,
    cannot_score,
    data_frame,
    is_real,
    mask_of,
    mask_of_events,
    random_sites,
)
from pyro_vae._programs.trial_runs import OUT_OF_MEMORY, trial_run
from pyro_vae._utils.compiled_modules import compiled_modules_run_eagerly
from pyro_vae._utils.identity import ProgramMap
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.modules import modules
from pyro_vae._utils.random import restored_generators
from pyro_vae.distributions._circular import maps_onto_angles
from pyro_vae.distributions._supports import support_of

_own_names = ProgramMap()  # by model, the name that it gives to the plate of the data points


@dataclass(frozen=True)
class LatentSite:
    """A description, for guides, of one latent site with a value per data point.

    Values have one of two layouts. In the layout of the site they are ``(*outer, *batch
    dimensions, *event)``. As rows they are ``(*outer, B, count)``, one row per data point. The
    outer dimensions are left of all plates of the model; they hold particles.

    Args:
        name: the name of the site.
        plates: the frames of its vectorized plates, including the plate ``"data"``.
        batch_shape: sizes of its plates without the plate ``"data"``.
        event_shape: event shape of its unconstrained value.
        bijection: maps the reals onto the site's support.
        masked: whether the model masks the site; a guide then gets the mask from the model.
        nesting: the largest number of batch dimensions of any latent of the model.
    """

    name: str
    plates: tuple[CondIndepStackFrame, ...]
    batch_shape: torch.Size
    event_shape: torch.Size
    bijection: Transform
    masked: bool
    nesting: int

    @property
    def shape(self) -> torch.Size:
        """Shape of the unconstrained value of one data point."""
        return self.batch_shape + self.event_shape

    @property
    def data_dim(self) -> int:
        """The batch dimension of the data, counted from the right."""
        return next(frame.dim for frame in self.plates if frame.name == DATA_PLATE)

    @property
    def num_inputs(self) -> int:
        """The number of network inputs that :meth:`inputs_of` makes from one data point's value."""
        return self.shape.numel() * (2 if maps_onto_angles(self.bijection) else 1)

    def inputs_of(self, value: Tensor, batch_size: int) -> Tensor:
        """Return a value as inputs of a network, ``(*outer, B, num_inputs)``.

        The inputs are the unconstrained numbers. For angles, they are the cosine and the sine,
        which have no jump at 2 pi.
        """
        if not maps_onto_angles(self.bijection):
            return self.to_rows(self.bijection.inv(value), batch_size, len(self.event_shape))
        angles = self.to_rows(value, batch_size, len(self.event_shape))
        return torch.cat([angles.cos(), angles.sin()], -1)

    def batch_dims(self, batch_size: int) -> torch.Size:
        """Return the sizes of the batch dimensions for a batch of B data points."""
        dims = list(self.batch_shape)
        dims.insert(len(dims) + 1 + self.data_dim, batch_size)
        return torch.Size(dims)

    def from_rows(self, rows: Tensor, event_shape: Sequence[int]) -> Tensor:
        """Convert rows to values in the layout of the site.

        Args:
            rows: ``(*outer, B, count)``; count is the number of elements of ``batch_shape +
                event_shape``.
            event_shape: event shape of the values.
        """
        value = rows.reshape(*rows.shape[:-1], *self.batch_shape, *event_shape)
        dims = len(self.batch_shape) + 1
        outer = value.dim() - dims - len(event_shape)
        value = value.movedim(outer, value.dim() - len(event_shape) + self.data_dim)
        if outer:
            value = value[(slice(None),) * outer + (None,) * (self.nesting - dims)]
        return value

    def to_rows(self, value: Tensor, batch_size: int, event_dim: int) -> Tensor:
        """Convert values to rows, the inverse of :meth:`from_rows`.

        Args:
            value: ``(*outer, *batch dimensions, *event)``, or a shape that broadcasts to it.
            batch_size: B.
            event_dim: the number of event dimensions.
        """
        event = value.shape[value.dim() - event_dim :]
        inner = self.batch_dims(batch_size)
        batch = torch.broadcast_shapes(value.shape[: value.dim() - event_dim], inner)
        outer = batch[: max(0, len(batch) - self.nesting)]
        value = value.expand(*batch, *event).reshape(*outer, *inner, *event)
        value = value.movedim(value.dim() - event_dim + self.data_dim, len(outer))
        return value.reshape(*outer, batch_size, -1)


def latent_sites(model: Callable[..., Any], x: Tensor, *covariates: Any) -> tuple[LatentSite, ...]:
    """Trace the model once on x and describe its latent sites in the plate ``"data"``.

    Args:
        model: program of p(x, z).
        x: minibatch ``(B, *event)``.
        *covariates: further arguments of the program.

    Raises:
        ValueError: There is no such site, or no guide can sample or score one of them.
    """
    # The plates are read from a run on one row less. A plate that then keeps its size is a plate
    # that subsamples. The supports are read from a run on all rows.
    rows = slice(0, max(1, x.shape[0] - 1))
    fewer = [
        a[rows] if isinstance(a, Tensor) and a.dim() and len(a) == len(x) else a
        for a in (x, *covariates)
    ]
    eagerly = compiled_modules_run_eagerly(modules(model))
    with restored_generators(), torch.inference_mode(False), eagerly:
        latents = latents_of(model, x, *covariates)
        try:
            fewer_latents = latents_of(model, *fewer)
        except OUT_OF_MEMORY:
            raise
        except Exception:  # a program for one number of rows may raise any error
            fewer_latents = latents
    plates = {site["name"]: site["cond_indep_stack"] for site in fewer_latents}
    nesting = max(-f.dim for site in latents for f in site["cond_indep_stack"] if f.vectorized)
    described = tuple(_describe(site, plates[site["name"]], nesting) for site in latents)
    if any(next(_bounds(support_of(site["fn"])), None) is not None for site in latents):
        _require_fixed_bounds(model, x, *covariates)
    return described


def latents_of(model: Callable[..., Any], *arguments: Any) -> list[Site]:
    """Trace a model; return its latent sites in the plate ``"data"`` that are not enumerated.

    Raises:
        ValueError: There is no such site.
    """
    with torch.no_grad():
        return _latents(model, *arguments)


def _latents(model: Callable[..., Any], *arguments: Any) -> list[Site]:
    try:
        with outside_of_plates(), poutine.block(), poutine.trace() as tracer:
            model(*arguments)
    except NotImplementedError as error:  # a distribution cannot be sampled or expanded
        seen = [name for name, node in tracer.trace.nodes.items() if node["type"] == "sample"]
        raise ValueError(
            "a guide is made by a run of the model alone, but the distribution at the site after "
            f"{seen} cannot be sampled or expanded: NotImplementedError: {first_line(error)}. "
            "Use a distribution that can be sampled, and expanded in a plate."
        ) from error
    with outside_of_plates():
        run = functools.partial(plain_trace, model)
        name_plates_in(tracer.trace, model, arguments, {}, run)
    sites = list(random_sites(tracer.trace))
    for site in sites:
        check_enumeration(site)
    latents = [
        site
        for site in sites
        if not site["is_observed"] and data_frame(site) is not None and not is_enumerated(site)
    ]
    if not latents:
        raise ValueError(
            'the model has no latent site in the plate "data"; its sites are '
            f"{[site['name'] for site in sites]}. An amortized guide needs such a site: put "
            'pyro.sample("z", ...) inside `with pyro.plate("data", x.shape[0]):`.'
        )
    return latents


def _describe(site: Site, plates: tuple[CondIndepStackFrame, ...], nesting: int) -> LatentSite:
    fn = site["fn"]
    data_dim = data_frame(site).dim
    mask, of_events = mask_of(site), mask_of_events(site)
    if isinstance(mask, Tensor) and (mask != of_events[(..., *(None,) * fn.event_dim)]).any():
        raise ValueError(
            f"latent site {site['name']!r} masks single numbers of its event, but a guide of the "
            "library masks whole events. Put these numbers into a plate instead of .to_event(), "
            "or write your own guide."
        )
    for frame in plates:
        if frame.name != DATA_PLATE and frame.full_size not in (None, frame.size):
            raise ValueError(
                f"latent site {site['name']!r} is in the plate {frame.name!r}, which subsamples "
                f"{frame.size} of {frame.full_size}. An amortized guide needs all latents of a "
                "data point: write your own guide for this model."
            )
    bijection = _bijection_of(site, data_dim - fn.event_dim)
    batch_shape = list(fn.batch_shape)
    while len(batch_shape) > nesting and batch_shape[0] == 1:  # no plate has this dimension
        del batch_shape[0]
    del batch_shape[data_dim]
    return LatentSite(
        name=site["name"],
        plates=tuple(frame for frame in plates if frame.vectorized),
        batch_shape=torch.Size(batch_shape),
        event_shape=torch.Size(bijection.inverse_shape(fn.event_shape)),
        bijection=bijection,
        masked=mask_of(site) is not None,
        nesting=nesting,
    )


def _bijection_of(site: Site, axis: int) -> Transform:
    """Return a bijection from the reals onto the support of a site, or raise ValueError."""
    name, fn = site["name"], site["fn"]
    try:
        support = support_of(fn)
    except ValueError as error:
        raise ValueError(
            f"no guide can be made for latent site {name!r}, {type(fn).__name__}: {error}."
        ) from error
    try:
        bijection = biject_to(constant_over_data(support, axis, name))
    except NotImplementedError:
        raise ValueError(
            f"latent site {name!r} has the support {support}. There is no bijection from the reals "
            "onto it, so a continuous guide cannot sample it. Write your own guide, or sum the "
            "latent out of the model."
        ) from None
    if 0 in fn.event_shape:
        raise ValueError(
            f"latent site {name!r} has the event shape {tuple(fn.event_shape)}, without a number "
            "to sample. Observe the site, or remove it."
        )
    _require_score(site, support)
    return bijection


def _require_score(site: Site, support: Constraint) -> None:
    """Raise ValueError if a distribution cannot score a value, or scores angles on the reals."""
    fn, value = site["fn"], site["value"].detach().clone()
    try:
        with torch.no_grad():
            log_prob = fn.log_prob(value)
            if not is_real(support):
                return
            turned, moved = (fn.log_prob(value + by) for by in (2 * math.pi, 1.0))
    except (AssertionError, KeyError, NotImplementedError) as error:
        raise ValueError(cannot_score(site, error)) from error
    periodic = torch.allclose(turned, log_prob, rtol=1e-5, atol=1e-5)
    if periodic and not torch.allclose(moved, log_prob, rtol=1e-2, atol=1e-2):
        raise ValueError(
            f"latent site {site['name']!r} has a density on the real line that repeats itself "
            "every 2 pi, as of an angle. It has no integral on the real line. Give the class of "
            "its distribution `support = pyro_vae.distributions.circle`, or "
            "constraints.independent(circle, n) for n event dimensions."
        )


def constant_over_data(support: Constraint, axis: int, name: str) -> Constraint:
    """Return a support with one row of bounds, valid for batches of any size.

    Args:
        support: the support of a site.
        axis: the data's dimension in its bounds, counted from the right.
        name: the name of the site, for the message.

    Raises:
        ValueError: The bounds differ between data points.
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
                    f"the support of latent site {name!r} differs between data points. Amortized "
                    "guides and AIS need one for all. Scale the latent inside the model instead."
                )
            # If the data's dimension comes first, remove it: it would count as an event dimension.
            setattr(support, attribute, row.squeeze(axis) if axis == -row.dim() else row)
    return support


def _bounds(support: Constraint) -> Iterator[Tensor]:
    """Yield the bounds of a support that are tensors."""
    for value in vars(support).values():
        if isinstance(value, Constraint):
            yield from _bounds(value)
        elif isinstance(value, Tensor):
            yield value


def _require_fixed_bounds(model: Callable[..., Any], *arguments: Any) -> None:
    """Raise ValueError if a support depends on parameters, because the guide's would not move."""
    with restored_generators(), torch.inference_mode(False), torch.enable_grad():
        sites = _latents(model, *arguments)
    for site in sites:
        if any(bound.requires_grad for bound in _bounds(support_of(site["fn"]))):
            raise ValueError(
                f"the support of latent site {site['name']!r} has a bound that depends on "
                "parameters. The bound would move in training, but the guide's would not. Fix the "
                "bound, or scale the latent inside the model instead."
            )


def surroundings(
    sites: Sequence[LatentSite], model: Callable[..., Any], x: Tensor, *covariates: Any
) -> tuple[dict[str, AbstractContextManager], dict[str, bool | Tensor | None]]:
    """Return the plates and masks around latent sites of a model, for its guide.

    Args:
        sites: latent sites of the model.
        model: program of p(x, z).
        x: minibatch ``(B, *event)``.
        *covariates: further arguments of the model.

    Returns:
        The plates by name, with the plate ``"data"`` of the size of this batch; the masks by site.
        If Pyro runs the guide, and not the library, the plate has the name that the model gives it.
        Pyro's ``TraceEnum_ELBO`` compares the plates of model and guide by name.
    """
    masks: dict[str, bool | Tensor | None] = {}
    if masked := {site.name for site in sites if site.masked}:
        latents = latents_of(model, x, *covariates)
        masks = {site["name"]: mask_of_events(site) for site in latents if site["name"] in masked}
    data_plate = DATA_PLATE if is_traced() else _own_name(sites, model, x, *covariates)
    return _make_plates(sites, x, data_plate), masks


def _own_name(sites: Sequence[LatentSite], model: Callable[..., Any], *arguments: Any) -> str:
    """Return the name that a model gives to the plate of the data points at its latent sites."""
    if model not in _own_names:
        _own_names[model] = DATA_PLATE  # for a model that runs this guide, or cannot run
        try:
            with trial_run(model), outside_of_plates():
                nodes = poutine.trace(model).get_trace(*arguments).nodes
        except OUT_OF_MEMORY:
            raise
        except Exception:  # a guide can be sampled without its model
            return DATA_PLATE
        names = {
            frame.name
            for site in sites
            for frame in nodes[site.name]["cond_indep_stack"]
            if frame.vectorized and frame.dim == site.data_dim
        }
        _own_names[model] = names.pop() if len(names) == 1 else DATA_PLATE
    return _own_names.get(model, DATA_PLATE)


def _make_plates(
    sites: Sequence[LatentSite], x: Tensor, data_plate: str
) -> dict[str, AbstractContextManager]:
    plates = {}
    for frame in {frame.name: frame for site in sites for frame in site.plates}.values():
        name, size, full_size = frame.name, frame.size, frame.full_size
        if name == DATA_PLATE:
            name, size = data_plate, x.shape[0]
            full_size = None if full_size == frame.size else full_size
        plates[frame.name] = plate_of_guide(name, size, frame.dim, full_size)
    return plates


@contextlib.contextmanager
def inside(
    site: LatentSite,
    plates: Mapping[str, AbstractContextManager],
    masks: Mapping[str, bool | Tensor | None],
) -> Iterator[None]:
    """Enter the plates of a site, and its mask if there is one."""
    with contextlib.ExitStack() as stack:
        for frame in site.plates:
            stack.enter_context(plates[frame.name])
        if masks.get(site.name) is not None:
            stack.enter_context(poutine.mask(mask=masks[site.name]))
        yield
