"""The contract for programs, checked once on a first minibatch before anything is computed.

What Pyro and torch would say somewhere inside a run is said here in terms of the pair and its
data: which argument or site, what was expected, what came.
"""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae.programs import parameters
from pyro_vae.sites import values_outside_support
from pyro_vae.traces import PairTrace, Program


def check_pair(
    model: Program, guide: Program, batch: tuple[Any, ...], all_x: Tensor | None = None
) -> PairTrace:
    """Run a pair once, with validation on, and refuse what breaks the contract.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        batch: x ``(B, *event)`` and any covariates.
        all_x: the data set that x comes from, to check every value against the support of the
            observed site that x is; only the batch is checked if it is not given.

    Returns:
        The run.

    Raises:
        ValueError: the pair cannot run on the batch; a site is missing, or stands in no plate
            ``"data"``, or in one of another size; a value is outside a site's support.
    """
    x = batch[0]
    _check_dtype(model, guide, x)
    try:
        with torch.no_grad(), pyro.validation_enabled(True):
            trace = PairTrace(model, guide, batch)
    except RuntimeError as error:
        raise ValueError(
            f"model and guide could not run on data x of shape {tuple(x.shape)} and dtype "
            f"{x.dtype}: {error}. Does x have the shape and dtype that their networks expect?"
        ) from error
    except ValueError as error:
        if "Shape mismatch inside plate" not in str(error):
            raise
        raise ValueError(
            f'{error}, for data x of shape {tuple(x.shape)}. In the plate "data" a site\'s batch '
            f"shape must be ({x.shape[0]},): all other dimensions belong to the event, so declare "
            "them with .to_event(n)."
        ) from error
    _check_trace(trace, x)
    if all_x is not None:
        _check_support(trace, x, all_x)
    return trace


def _check_dtype(model: Program, guide: Program, x: Tensor) -> None:
    dtypes = {p.dtype for p in parameters(model, guide)}
    if x.is_floating_point() and dtypes and x.dtype not in dtypes:
        expected = " or ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(
            f"data x has dtype {x.dtype}, but the parameters of model and guide have {expected}: "
            "convert one of them, for example with x.to(dtype) or module.to(dtype)."
        )


def _check_trace(trace: PairTrace, x: Tensor) -> None:
    if trace.batch_size != x.shape[0]:
        raise ValueError(
            f'the plate "data" has size {trace.batch_size} for a minibatch of {x.shape[0]} rows. '
            "Programs here are called with minibatches: use "
            '`pyro.plate("data", x.shape[0])`, or `pyro.plate("data", N, subsample=x)` where the '
            "minibatch stands for N rows."
        )
    for factor in (*trace.guide.values(), *trace.model.values()):
        if not torch.isfinite(factor.log_prob).all():
            row = (~torch.isfinite(factor.log_prob)).nonzero()[0, -1].item()
            raise ValueError(
                f"site {factor.name!r} has a log-density of "
                f"{factor.log_prob.flatten()[row].item()} at row {row} of the first minibatch. "
                "Look for values outside its support, or a scale of zero or infinity."
            )


def _check_support(trace: PairTrace, x: Tensor, all_x: Tensor) -> None:
    for factor in trace.model.values():
        value = factor.site["value"]
        if factor.observed and value.shape == x.shape and torch.equal(value, x):
            outside = values_outside_support(factor.site, all_x)
            if outside is not None:
                raise ValueError(outside)
