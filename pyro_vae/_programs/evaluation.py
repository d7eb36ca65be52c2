"""Run programs in evaluation mode, and keep what depends on their parameters alone meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from pyro_vae._programs.pair_trace import Program
from pyro_vae._utils.modules import before_unknown, modules
from pyro_vae._utils.user_warnings import warn_user

Result = TypeVar("Result")

_RUNS_LOOKED_AT = 1000  # number of module runs; all checks together take a millisecond

# The results of the innermost block of evaluation_mode, by what they belong to.
_results: ContextVar[dict[object, object] | None] = ContextVar("results", default=None)
_gradients_of_parameters = ContextVar("gradients_of_parameters", default=True)


@contextlib.contextmanager
def evaluation_mode(*programs: Program) -> Iterator[None]:
    """Put the programs' modules into evaluation mode, without gradients, and restore their modes.

    Modules that cannot be found by name are switched just before their first run. This works for
    the first thousand module runs in the block.
    """
    flags: list[tuple[nn.Module, bool]] = []

    def evaluate(module: nn.Module) -> None:
        flags.extend((part, part.training) for part in module.modules())
        module.eval()

    found = modules(*programs)
    results = _results.set({})
    try:
        for module in found:
            evaluate(module)
        with torch.no_grad(), before_unknown(evaluate, *found, calls=_RUNS_LOOKED_AT):
            yield
    finally:
        _results.reset(results)
        for module, training in reversed(flags):  # a module shared by two others is listed twice
            if type(module).train is not nn.Module.train:  # it may do more than set the flag
                module.train(training)
        for module, training in reversed(flags):
            module.training = training


def warn_of_evaluation_mode(model: Program, guide: Program) -> None:
    """Warn if a pair is about to be trained in evaluation mode and has layers that it changes."""
    parts = [part for module in modules(model, guide) for part in module.modules()]
    changed = [part for part in parts if _is_changed(part)]
    if changed and not any(part.training for part in parts):
        warn_user(
            "model and guide are in evaluation mode, so the fit trains without dropout, batch norm "
            f"and the like ({type(changed[0]).__name__}). Call .train() on their modules before it"
        )


def _is_changed(module: nn.Module) -> bool:
    """Return whether a module that is trained computes something else in evaluation mode."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.modules.batchnorm._NormBase):
        parameters = [*module.parameters()]
        is_frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
        return module.track_running_stats and not is_frozen
    return getattr(module, "differs_in_evaluation", False)


@contextlib.contextmanager
def gradients_of_values() -> Iterator[None]:
    """Enable gradients with respect to values, such as latents, but not to parameters."""
    before = _gradients_of_parameters.set(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        _gradients_of_parameters.reset(before)


def once_per_evaluation(owner: object, compute: Callable[[], Result]) -> Result:
    """Return a result that depends only on the programs, which do not change in an evaluation.

    In a block of :func:`evaluation_mode` it is computed once, without gradients. It is computed in
    each call outside of a block and where parameters need gradients. A graph gets it as a constant
    if it is known before the graph is traced.

    Args:
        owner: what the result belongs to.
        compute: returns the result.
    """
    results = _results.get()
    if results is None or (torch.is_grad_enabled() and _gradients_of_parameters.get()):
        return compute()
    if owner not in results:
        if is_in_torch_dispatch_mode():
            return compute()
        with torch.inference_mode(False), torch.no_grad():
            results[owner] = compute()
    return results[owner]
