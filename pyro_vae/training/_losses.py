"""The loss of an objective, ours or Pyro's: to be differentiated, or for its value alone."""

from __future__ import annotations

from typing import Any

import pyro.infer
import torch
from torch import Tensor

from pyro_vae._programs.pair_trace import PairTrace, Program
from pyro_vae.objectives import Objective

# Of Pyro's objectives without a loss that can be differentiated, what takes their place here.
_INSTEAD = {
    "RenyiELBO": "pyro_vae.objectives.Renyi",
    "ReweightedWakeSleep": "pyro_vae.objectives.ReweightedWakeSleep",
    "TraceGraph_ELBO": "pyro_vae.objectives.ELBO or pyro.infer.Trace_ELBO",
    "JitTraceGraph_ELBO": "pyro_vae.objectives.ELBO or pyro.infer.Trace_ELBO",
    "TraceTailAdaptive_ELBO": "pyro_vae.objectives.Renyi",
}


def check_objective(objective: Any) -> None:
    """Refuse what has no loss that can be differentiated.

    Raises:
        TypeError: it is no ``pyro.infer.ELBO``, or one that states no loss.
    """
    known = isinstance(objective, pyro.infer.ELBO) and hasattr(objective, "differentiable_loss")
    if known and not isinstance(objective, pyro.infer.TraceTailAdaptive_ELBO):
        return
    instead = _INSTEAD.get(type(objective).__name__)
    remedy = "" if instead is None else f". Pass {instead}"
    raise TypeError(
        "objective must be a pyro.infer.ELBO with a differentiable_loss and its value, got "
        f"{objective!r}{remedy}"
    )


def check_enumeration(objective: pyro.infer.ELBO, trace: PairTrace) -> None:
    """Refuse objectives of Pyro that enumerated latents have no right loss under.

    Args:
        objective: passed by :func:`check_objective`.
        trace: a run of the pair.

    Raises:
        ValueError: Its loss would not be minus a sum of log-densities. Or it would draw a latent
            from the prior that the model sums out.
    """
    draws = isinstance(objective, pyro.infer.Trace_ELBO | pyro.infer.TraceMeanField_ELBO)
    if draws and trace.summed:
        raise ValueError(
            f"pyro.infer.{type(objective).__name__} draws latent site {trace.summed[0]!r} from its "
            "prior, which the guide does not sample: its loss is no bound. Pass "
            "pyro_vae.objectives.ELBO or pyro.infer.TraceEnum_ELBO, which sum over its values"
        )
    if trace.enumerates and isinstance(objective, pyro.infer.TraceTMC_ELBO):
        raise ValueError(
            "pyro.infer.TraceTMC_ELBO gives a loss that is too large by the logarithm of the "
            "number of values of each enumerated latent, and takes that logarithm of scaled "
            "densities where the plate subsamples. Pass pyro_vae.objectives.ELBO, which sums over "
            "the values exactly, or pyro.infer.TraceEnum_ELBO"
        )


def differentiable_loss(
    objective: pyro.infer.ELBO, model: Program, guide: Program, *args: Any
) -> Tensor:
    """Return the loss of a minibatch, to be differentiated, without counting a step.

    Pyro's objectives that compile by ``torch.jit`` are run without it: their graphs keep the
    number of rows, the scale and the mode of the modules of their first call.
    """
    if isinstance(objective, Objective):
        with objective.not_counting():
            return objective.differentiable_loss(model, guide, *args)
    own: Any = objective
    for each in type(objective).__mro__:
        if "differentiable_loss" in vars(each):
            if each.__module__.startswith("pyro.") and each.__name__.startswith("Jit"):
                own = super(each, objective)
            break
    return own.differentiable_loss(model, guide, *args)


@torch.no_grad()
def loss_value(
    objective: pyro.infer.ELBO, model: Program, guide: Program, *args: Any
) -> Tensor | float:
    """Return the loss of a minibatch without a gradient; ours as a tensor that is not read yet."""
    if isinstance(objective, Objective):
        return objective.differentiable_loss(model, guide, *args)
    return objective.loss(model, guide, *args)
