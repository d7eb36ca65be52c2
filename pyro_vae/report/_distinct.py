"""Whether the pairs of a comparison are what their fits made of them, and do not share that."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Parameter

from pyro_vae._programs import fits
from pyro_vae._programs.pair_state import changed, state
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import parameter_store
from pyro_vae._utils.identity import method_of, owner_of
from pyro_vae.training import Fit

_REMEDY = (
    "A fit trains its pair in place. Make a pair of its own for each fit, or freeze what several "
    "fits share before the second one (requires_grad_(False))"
)


@dataclass(frozen=True)
class Candidate:
    """A pair that is to be compared.

    Args:
        name: of the pair.
        model: program of p(x, z).
        guide: program of q(z|x).
        fit: how it was fitted, None if a pair was given.
        parameters: its trainable tensors.
    """

    name: str
    model: Program
    guide: Program
    fit: Fit | None
    parameters: Sequence[Tensor]

    def is_pair_of(self, other: Candidate) -> bool:
        """Tell whether the other has the same two programs."""
        return all(
            owner_of(mine) is owner_of(its) and method_of(mine) == method_of(its)
            for mine, its in ((self.model, other.model), (self.guide, other.guide))
        )


@dataclass(frozen=True)
class _Now:
    """A pair as it is now, and as its fit left it.

    Args:
        tensors: of the pair, by name.
        recorded: ids of those whose values its fit left on record.
        changed: names of those that have other values than on record.
        is_fitted_again: whether there was another fit of the pair after the one that is given.
    """

    tensors: dict[str, Tensor]
    recorded: set[int]
    changed: list[str]
    is_fitted_again: bool

    def is_trainable(self, name: str) -> bool:
        """Tell a parameter from a buffer, which a program may change whenever it runs."""
        tensor = self.tensors.get(name)
        return tensor is None or tensor.requires_grad or isinstance(tensor, Parameter)


def require_distinct(candidates: Sequence[Candidate]) -> None:
    """Refuse pairs that are not as their fits left them, or that may have trained one another's.

    A Fit whose pair was changed by something else than a fit is taken as it stands, with a warning.

    Raises:
        ValueError: a pair was fitted again after the Fit that is given; a tensor of a fitted pair
            has changed since its fit, and another pair shares it; two pairs share trainable
            parameters, and no fit tells whose they are.
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
                    f"{each.name!r} is not as its fit left it: {name} has changed since{shared}. "
                    f"{_REMEDY}; or pass (model, guide) in place of a Fit that was trained on."
                )
        changed = [name for name in pair.changed if pair.is_trainable(name)]
        if changed and each.fit is not None:
            warnings.warn(
                f"{each.name!r} is not as its fit left it: {changed[0]} has changed since. It is "
                "compared as it stands, with the history of that fit",
                stacklevel=3,
            )
    for one, other in itertools.combinations(candidates, 2):
        recorded = now[one.name].recorded | now[other.name].recorded
        both = set(map(id, one.parameters)) & set(map(id, other.parameters)) - recorded
        if both and not one.is_pair_of(other):
            name = next(n for n, t in now[one.name].tensors.items() if id(t) in both)
            raise ValueError(
                f"{one.name!r} and {other.name!r} share {name}, which both may have trained: "
                f"its last value would stand in both rows. {_REMEDY}."
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
