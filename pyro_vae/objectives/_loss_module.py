"""The loss of a model and a guide as a torch module, for a plain PyTorch loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyro
from pyro.infer.elbo import ELBO, ELBOModule
from torch import Tensor, nn

from pyro_vae._utils.identity import is_blocked, owner_of
from pyro_vae._utils.referenced_objects import referenced_objects


class LossModule(ELBOModule):
    """The module that ``objective(model, guide)`` returns. Call it with a minibatch for the loss.

    It contains the modules of both programs, also if a program is a method of a module. A call
    warns if the loss depends on a parameter that the last :meth:`parameters` did not yield. A guide
    creates some of its parameters at its first call. The parameters of a plain function are in no
    module. An optimizer built from the earlier list would not train them.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        elbo: the objective.
    """

    _read: frozenset[int] = frozenset()  # ids of the parameters that named_parameters yielded last
    _compared: frozenset[int] = frozenset()  # _read at the last comparison

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any], elbo: ELBO):
        super().__init__(model, guide, elbo)
        for name, program in (("owner_of_model", model), ("owner_of_guide", guide)):
            owner = owner_of(program)  # the module of a method, or the module inside handlers
            known = is_blocked(program) or any(owner is module for module in self.children())
            if isinstance(owner, nn.Module) and not known:
                self.add_module(name, owner)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of both programs, as torch modules do."""
        found = list(super().named_parameters(*args, **kwargs))
        self._read = frozenset(id(parameter) for _, parameter in found)
        return iter(found)

    def extra_repr(self) -> str:
        """Show the objective, beside the model and the guide."""
        return f"(objective): {self.elbo!r}"

    def get_extra_state(self) -> dict[str, Any]:
        """Return the step and the averages of the objective, for ``state_dict``."""
        return {"step": self.elbo.step.clone(), "averages": dict(self.elbo.averages)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the result of :meth:`get_extra_state`, for ``load_state_dict``."""
        self.elbo.step, self.elbo.averages = state["step"].clone(), dict(state["averages"])

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the differentiable loss of a minibatch."""
        loss = super().forward(*args, **kwargs)
        if self._read != self._compared and loss.requires_grad:
            self._compared = self._read
            named = [
                *referenced_objects(model=self.model, guide=self.guide),
                *pyro.get_param_store().named_parameters(),
                *super().named_parameters(),
            ]
            names = {id(parameter): name for name, parameter in named}
            missing = {id(leaf) for leaf in _leaves(loss)} - self._read
            if found := [names[each] for each in missing if each in names]:
                warnings.warn(
                    f"the loss depends on parameter {min(found)!r}, which the last parameters() "
                    "did not yield. An optimizer built from that list does not train it. Call "
                    "this module once before you create the optimizer. If a program is a "
                    "function, make it a PyroModule, or train by pyro_vae.fit or pyro.infer.SVI. "
                    "If a component is a function that calls a module, pass the module itself",
                    stacklevel=2,
                )
        return loss


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """Yield the leaf tensors of the autograd graph of a loss."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [before for before, _ in node.next_functions]
