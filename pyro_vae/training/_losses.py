"""Compute the loss of an objective of pyro_vae or Pyro, with or without a gradient."""

from __future__ import annotations

import math
from typing import Any

import pyro.infer
import torch
from torch import Tensor

from pyro_vae._programs.pair_trace import PairTrace, Program
from pyro_vae._programs.terms import Terms, terms
from pyro_vae._programs.trial_runs import trial_run
from pyro_vae.objectives import Objective
from pyro_vae.objectives._base import terms_of_losses

# Replacements for Pyro's objectives without a differentiable loss.
_INSTEAD = {
    "RenyiELBO": "pyro_vae.objectives.Renyi",
    "ReweightedWakeSleep": "pyro_vae.objectives.ReweightedWakeSleep",
    "TraceGraph_ELBO": "pyro_vae.objectives.ELBO or pyro.infer.Trace_ELBO",
    "JitTraceGraph_ELBO": "pyro_vae.objectives.ELBO or pyro.infer.Trace_ELBO",
    "TraceTailAdaptive_ELBO": "pyro_vae.objectives.Renyi",
}


def check_objective(objective: Any) -> None:
    """Raise TypeError if an objective has no differentiable loss.

    Raises:
        TypeError: The objective is not a ``pyro.infer.ELBO``, or lacks one of the two losses in the
            message.
    """
    known = isinstance(objective, pyro.infer.ELBO) and hasattr(objective, "differentiable_loss")
    if known and not isinstance(objective, pyro.infer.TraceTailAdaptive_ELBO):
        return
    instead = _INSTEAD.get(type(objective).__name__)
    remedy = "" if instead is None else f". Pass {instead}"
    raise TypeError(
        "objective must be a pyro.infer.ELBO with a differentiable_loss and a loss, got "
        f"{objective!r}{remedy}"
    )


def check_enumeration(objective: pyro.infer.ELBO, trace: PairTrace) -> None:
    """Raise ValueError if Pyro's objective has a wrong loss for enumerated latents.

    Args:
        objective: An objective that :func:`check_objective` accepts.
        trace: A run of the pair.

    Raises:
        ValueError: The loss would not be minus a sum of log-densities. Or the objective would
            sample a latent from its prior that the model sums out.
    """
    draws = isinstance(objective, pyro.infer.Trace_ELBO | pyro.infer.TraceMeanField_ELBO)
    if draws and trace.summed:
        raise ValueError(
            f"pyro.infer.{type(objective).__name__} samples latent site {trace.summed[0]!r} from "
            "its prior, because the guide does not sample it. So the loss is not a bound. Pass "
            "pyro_vae.objectives.ELBO or pyro.infer.TraceEnum_ELBO, which sum over its values"
        )
    if trace.enumerates and isinstance(objective, pyro.infer.TraceTMC_ELBO):
        raise ValueError(
            "the loss of pyro.infer.TraceTMC_ELBO is too large by the logarithm of the number of "
            "values of each enumerated latent. It is also wrong for scaled densities, if the plate "
            "subsamples. Pass pyro_vae.objectives.ELBO, which sums over the values exactly, or "
            "pyro.infer.TraceEnum_ELBO"
        )


def differentiable_loss(
    objective: pyro.infer.ELBO, model: Program, guide: Program, *args: Any
) -> Tensor:
    """Return the loss of a minibatch with its graph, without counting a step.

    Pyro's objectives that compile with ``torch.jit`` run uncompiled. Their graphs would fix the
    number of rows, the scale and the mode of the modules at the first call.
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
    """Return the loss of a minibatch without a gradient. Pyro's objectives return a number."""
    if isinstance(objective, Objective):
        return objective.differentiable_loss(model, guide, *args)
    return objective.loss(model, guide, *args)


@torch.no_grad()
def loss_and_elbo(
    objective: pyro.infer.ELBO, model: Program, guide: Program, *args: Any
) -> tuple[Tensor | float, Tensor | float]:
    """Return the loss of a minibatch, and its ELBO per data point.

    An objective of the library computes terms, whose log-densities give the ELBO too. For other
    objectives the pair runs once more, without an effect on random numbers and modules. The ELBO is
    NaN if the guide gives a latent one point, or if the terms cannot be computed.
    """
    with terms_of_losses() as found:
        loss = loss_value(objective, model, guide, *args)
    try:
        if len(found) == 1:
            return loss, _elbo(found[0])
        with trial_run(model, guide):
            return loss, _elbo(terms(model, guide, *args))
    except ValueError:
        return loss, math.nan


def _elbo(t: Terms) -> Tensor | float:
    if t.points:
        return math.nan
    local = (t.log_likelihood - t.kl).mean(0)
    shared = (t.log_likelihood_global - t.kl_global).mean()
    return local.mean() + shared / (t.scale * len(local))
