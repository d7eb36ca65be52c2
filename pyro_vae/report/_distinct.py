"""Check that pairs have not changed since their fits, and share no trained parameters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from pyro_vae._programs import fits
from pyro_vae._programs.pair_state import changed, state
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import parameter_store
from pyro_vae._utils.identity import method_of, owner_of
from pyro_vae._utils.user_warnings import warn_user
from pyro_vae.training import Fit

_REMEDY = (
    "A fit trains its pair in place. Make a new pair for each fit, or freeze the shared part "
    "before the second fit (requires_grad_(False))"
)


@dataclass(frozen=True)
class Candidate:
    """A pair to compare.

    Args:
        name: name of the pair.
        model: program of p(x, z).
        guide: program of q(z|x).
        fit: the Fit; None if (model, guide) was passed.
        parameters: the trainable tensors of the pair.
    """

    name: str
    model: Program
    guide: Program
    fit: Fit | None
    parameters: Sequence[Tensor]

    def is_pair_of(self, other: Candidate) -> bool:
        """Return whether the other candidate has the same two programs."""
        return all(
            owner_of(mine) is owner_of(its) and method_of(mine) == method_of(its)
            for mine, its in ((self.model, other.model), (self.guide, other.guide))
        )

    def has_values_of(self, other: Candidate) -> bool:
        """Return whether the trainable tensors of the other candidate have the same values."""
        return len(self.parameters) == len(other.parameters) and all(
            mine.shape == its.shape and torch.equal(mine.detach().cpu(), its.detach().cpu())
            for mine, its in zip(self.parameters, other.parameters, strict=True)
        )


@dataclass(frozen=True)
class _Now:
    """The tensors of a pair, compared with the record of its fit.

    Args:
        tensors: the tensors of the pair, by name.
        recorded: ids of the tensors whose values the fit recorded.
        changed: names of the tensors whose values differ from the record.
        is_fitted_again: whether the pair was fitted again after the Fit that was passed.
    """

    tensors: dict[str, Tensor]
    recorded: set[int]
    changed: list[str]
    is_fitted_again: bool

    def is_trainable(self, name: str) -> bool:
        """Return False for a buffer, because any run of a program may change it."""
        tensor = self.tensors.get(name)
        return tensor is None or tensor.requires_grad or isinstance(tensor, Parameter)


def require_distinct(candidates: Sequence[Candidate]) -> None:
    """Raise ValueError if a later fit changed a pair, or if two pairs share trained parameters.

    If code other than a fit changed the pair of a Fit, the pair is accepted with a warning.

    Raises:
        ValueError: A pair was fitted again after the Fit that was passed. A tensor of a fitted pair
            has changed since its fit, and another pair shares it. Two pairs share trainable
            parameters, and no fit recorded their values.
    """
    now = {each.name: _now(each) for each in candidates}
    ids = {name: set(map(id, pair.tensors.values())) for name, pair in now.items()}
    for each in candidates:
        pair = now[each.name]
        for name in pair.changed:
            tensor = pair.tensors.get(name)
            sharing = [n for n, found in ids.items() if n != each.name and id(tensor) in found]
            if sharing or pair.is_fitted_again:
                shared = f", and {sharing[0]!r} shares it" if sharing else ""
                raise ValueError(
                    f"{each.name!r} differs from the result of its fit: {name} has changed "
                    f"since{shared}. {_REMEDY}. If the pair of a Fit was trained again, pass "
                    "(model, guide) instead."
                )
        changed = [name for name in pair.changed if pair.is_trainable(name)]
        if changed and each.fit is not None:
            warn_user(
                f"{each.name!r} differs from the result of its fit: {changed[0]} has changed "
                "since. It is compared with its current values, and the history of that fit"
            )
    for one, other in itertools.combinations(candidates, 2):
        recorded = now[one.name].recorded | now[other.name].recorded
        both = set(map(id, one.parameters)) & set(map(id, other.parameters)) - recorded
        if both and not one.is_pair_of(other):
            name = next(n for n, t in now[one.name].tensors.items() if id(t) in both)
            raise ValueError(
                f"{one.name!r} and {other.name!r} share {name}, which both may have trained. Both "
                f"would be compared with its last value. {_REMEDY}."
            )


def _now(candidate: Candidate) -> _Now:
    pair = candidate.model, candidate.guide
    fitted = fits.find(*pair)
    last = {} if fitted is None else fitted.digests
    digests = last if candidate.fit is None else candidate.fit.digests
    with parameter_store(*pair):
        tensors, names = state(*pair), changed(*pair, digests)
    recorded = {id(tensor) for name, tensor in tensors.items() if name in digests}
    return _Now(tensors, recorded, names, bool(last) and last != digests)
