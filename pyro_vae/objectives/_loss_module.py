"""The loss of one pair as a torch module, for training loops of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pyro
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn


class LossModule(ELBOModule):
    """What ``objective(model, guide)`` gives: called with a minibatch, it returns the loss.

    It warns where the loss depends on a parameter that :meth:`parameters` did not yield when they
    were read last. A guide makes some of its parameters at its first call, and no module holds
    those of a plain function. An optimizer of what was read would leave them as they are.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        elbo: the objective.
    """

    _read: frozenset[int] = frozenset()  # by id: what named_parameters yielded last
    _compared: frozenset[int] = frozenset()  # what was read at the last comparison

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of both programs, as torch modules do."""
        found = list(super().named_parameters(*args, **kwargs))
        self._read = frozenset(id(parameter) for _, parameter in found)
        return iter(found)

    def get_extra_state(self) -> dict[str, Any]:
        """Return what the objective counts and remembers, for ``state_dict``."""
        return {"step": self.elbo.step.clone(), "averages": dict(self.elbo.averages)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what :meth:`get_extra_state` returned, for ``load_state_dict``."""
        self.elbo.step, self.elbo.averages = state["step"].clone(), dict(state["averages"])

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a minibatch, to be differentiated."""
        loss = super().forward(*args, **kwargs)
        if self._read != self._compared and loss.requires_grad:
            self._compared = self._read
            named = [*pyro.get_param_store().named_parameters(), *super().named_parameters()]
            names = {id(parameter): name for name, parameter in named}
            missing = {id(leaf) for leaf in _leaves(loss)} - self._read
            if found := [names[each] for each in missing if each in names]:
                warnings.warn(
                    f"the loss depends on parameter {min(found)!r}, which parameters() did not "
                    "yield when they were read last. If the optimizer was made of those, it does "
                    "not train this one. Call this module once before you make the optimizer. "
                    "Where a program is a function, make it a PyroModule, or train by "
                    "pyro_vae.fit or pyro.infer.SVI",
                    stacklevel=2,
                )
        return loss


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """Yield the leaves that a loss can be differentiated by."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [before for before, _ in node.next_functions]
