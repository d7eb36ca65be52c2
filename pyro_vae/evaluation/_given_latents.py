"""Latents that a user gives for a model: placed at their sites, inside of their supports."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_vae._programs.runs import AtValues
from pyro_vae._programs.sites import Site, data_frame, is_discrete, is_scored
from pyro_vae.distributions._circular import circle
from pyro_vae.distributions._supports import support_of


class OutsideSupportError(ValueError):
    """A given latent is outside of the support of its site.

    Args:
        fact: the site, its support and the given values.
        remedy: the sentence that says how to correct them.
    """

    def __init__(self, fact: str, remedy: str):
        super().__init__(f"{fact} {remedy}")
        self.fact = fact


@contextlib.contextmanager
def remedy_outside_support(remedy: str) -> Iterator[None]:
    """Give errors of latents outside of their support another remedy, for a caller's own latents.

    Args:
        remedy: a sentence for the user.
    """
    try:
        yield
    except OutsideSupportError as error:
        raise OutsideSupportError(error.fact, remedy) from None


class AtGivenLatents(AtValues):
    """Give latents their values, after a check that the values are inside of the supports.

    A masked latent has no density. There, a value outside of the support, such as NaN, is replaced
    by a sample of the model.

    Args:
        values: values by site, in the layout of the sites.
        latents: the sites of another run of the model, which have the data plate's name.
        rows: the number of each row of the values in the argument of the user.

    Raises:
        OutsideSupportError: A value is outside of its support.
    """

    def __init__(self, values: Mapping[str, Tensor], latents: Mapping[str, Site], rows: Tensor):
        super().__init__(values)
        self._latents, self._rows = latents, rows

    def _pyro_sample(self, msg: Site) -> None:
        super()._pyro_sample(msg)
        if msg["name"] not in self._values or msg["is_observed"]:
            return
        value, fn = msg["value"], msg["fn"]
        support = _known_support(fn)
        checked = None if support is None else _check(support, value)
        if checked is None or checked[0].all():
            return
        inside, event_dim = checked
        scored = is_scored(msg)
        if event_dim and scored.dim():
            scored = scored.flatten(-event_dim).all(-1)
        wrong = ~inside & scored.expand_as(inside)
        if wrong.any():
            axis = data_frame(self._latents[msg["name"]]).dim - (fn.event_dim - event_dim)
            bad = wrong.movedim(axis, 0).flatten(1).any(1) if wrong.dim() > 1 else wrong
            row = int(bad.nonzero()[0])
            of_row = value.select(axis - event_dim, row)
            raise _error(msg, support, of_row, int(self._rows[row]))
        kept = inside.reshape(*inside.shape, *(1,) * event_dim)
        msg["value"] = torch.where(kept, value, fn.sample().to(value.dtype))


def _known_support(fn: Any) -> Constraint | None:
    try:
        return support_of(fn)
    except ValueError:  # it has no density, or its support cannot be derived
        with contextlib.suppress(NotImplementedError):
            return fn.support
    return None


def _check(support: Constraint, value: Tensor) -> tuple[Tensor, int] | None:
    """Return whether values are inside of a support, and the number of event dimensions of one.

    Numbers that a support checks alone are checked alone. The result is None if the support cannot
    check the values.
    """
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    event_dim = support.event_dim
    try:
        inside = _in_simplex(value) if support is constraints.simplex else support.check(value)
        inside = inside.expand(value.shape[: value.dim() - event_dim])
    except (NotImplementedError, RuntimeError, ValueError):
        return None
    if value.is_floating_point():
        finite = value.isfinite()
        inside = inside & (finite.flatten(-event_dim).all(-1) if event_dim else finite)
    return inside, event_dim


def _in_simplex(value: Tensor) -> Tensor:
    """Check probabilities with torch's tolerance, or a larger one for a dtype of low precision."""
    tolerance = max(1e-6, 10 * torch.finfo(value.dtype).eps) if value.is_floating_point() else 0.0
    near_one = (value.double().sum(-1) - 1).abs() <= tolerance
    return (value >= 0).all(-1) & near_one


def _error(site: Site, support: Constraint, values: Tensor, row: int) -> OutsideSupportError:
    name, real = site["name"], values.is_floating_point()
    if real and not values.isfinite().all():
        fact = f"z has NaN or infinite values at latent site {name!r}, first in row {row}."
        return OutsideSupportError(fact, "Pass finite latents.")
    low, high = values.min().item(), values.max().item()
    fact = (
        f"z is outside of the support of latent site {name!r}, first in row {row}. Expected "
        f"{described(support)}, but row {row} has numbers in [{low:g}, {high:g}]."
    )
    if is_discrete(site["fn"]):
        return OutsideSupportError(
            fact, "Pass levels, such as a sample of pv.encode(..., num_samples=1), not means."
        )
    return OutsideSupportError(
        fact, "Pass values that the model can sample, such as the mean or samples of pv.encode."
    )


def described(support: Constraint) -> str:
    """Return the values of a support in words."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    known = {
        constraints.real: "real numbers",
        constraints.real_vector: "real numbers",
        constraints.simplex: "numbers of at least 0 whose sum is 1",
        constraints.boolean: "0 or 1",
        constraints.one_hot: "one-hot vectors",
        constraints.sphere: "vectors of length 1",
        constraints.ordered_vector: "vectors in ascending order",
        constraints.positive_ordered_vector: "vectors above 0 in ascending order",
        circle: "angles from -pi to pi",
    }
    for each, text in known.items():
        if support is each:
            return text
    lower, upper = (_bound(support, end) for end in ("lower_bound", "upper_bound"))
    whole = "whole numbers" if support.is_discrete else "numbers"
    if "" in (lower, upper) or lower is upper is None:
        return str(support)
    if upper is None:
        return f"{whole} {_at_or(support, 'above')} {lower}"
    if lower is None:
        return f"{whole} below {upper}"
    return f"{whole} from {lower} to {upper}"


def _at_or(support: Constraint, word: str) -> str:
    closed = isinstance(support, constraints.greater_than_eq) or support.is_discrete
    return "of at least" if closed else word


def _bound(support: Constraint, end: str) -> str | None:
    """Return a bound as a text, None without one, or "" if it differs between numbers."""
    bound = getattr(support, end, None)
    if isinstance(bound, Tensor):
        if (bound != bound.flatten()[0]).any():
            return ""
        bound = bound.flatten()[0].item()
    return None if bound is None else f"{bound:g}"
