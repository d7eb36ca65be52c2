"""Whether the pairs of a comparison are what their fits made of them, and do not share that."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Parameter

from pyro_vae import fits, programs
from pyro_vae.identity import method_of, owner_of
from pyro_vae.state import changed, state
from pyro_vae.traces import Program
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


def require_distinct(candidates: Sequence[Candidate]) -> None:
    """Refuse pairs that are not as their fits left them, or that may have trained one another's.

    Raises:
        ValueError: tensors of a fitted pair have changed since its fit; two pairs share trainable
            parameters, and no fit tells whose they are.
    """
    tensors, changes, recorded = {}, {}, {}
    for each in candidates:
        fitted = fits.find(each.model, each.guide)
        digests: Mapping[str, int] = {} if fitted is None else fitted.digests
        digests = digests if each.fit is None else each.fit.digests
        with programs.parameter_store(each.model, each.guide):
            tensors[each.name] = state(each.model, each.guide)
            changes[each.name] = changed(each.model, each.guide, digests)
        recorded[each.name] = {id(t) for n, t in tensors[each.name].items() if n in digests}
    ids = {name: set(map(id, found.values())) for name, found in tensors.items()}
    for each in candidates:
        for name in changes[each.name]:
            tensor = tensors[each.name].get(name)
            others = [
                other.name
                for other in candidates
                if other is not each and id(tensor) in ids[other.name]
            ]
            # A program may change its buffers whenever it runs.
            is_buffer = isinstance(tensor, Tensor) and not (
                tensor.requires_grad or isinstance(tensor, Parameter)
            )
            if others or (each.fit is not None and not is_buffer):
                shared = f", and {others[0]!r} shares it" if others else ""
                raise ValueError(
                    f"{each.name!r} is not as its fit left it: {name} has changed since{shared}. "
                    f"{_REMEDY}; or pass (model, guide) in place of a Fit that was trained on."
                )
    for one, other in itertools.combinations(candidates, 2):
        if one.is_pair_of(other):
            continue
        known = recorded[one.name] | recorded[other.name]
        both = set(map(id, one.parameters)) & set(map(id, other.parameters)) - known
        if both:
            name = next(n for n, t in tensors[one.name].items() if id(t) in both)
            raise ValueError(
                f"{one.name!r} and {other.name!r} share {name}, which both may have trained: "
                f"its last value would stand in both rows. {_REMEDY}."
            )
