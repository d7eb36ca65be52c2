"""The contract for programs, checked once on a first minibatch before anything is computed.

What Pyro and torch would say somewhere inside a run is said here in terms of the pair and its
data: which argument or site, what was expected, what came.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_vae.inputs import ShapeError
from pyro_vae.modules import NAME_IT, remember_unnamed, unnamed
from pyro_vae.positions import check_positions
from pyro_vae.sites import data_frame, values_outside_support
from pyro_vae.traces import Factor, PairTrace, Program
from pyro_vae.validating import values_checked

# What a program that meets data of another kind than it expects may raise somewhere inside.
_PROGRAM_ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    ShapeError,
    TypeError,
    ZeroDivisionError,
)


def check_pair(
    model: Program,
    guide: Program,
    batch: tuple[Any, ...],
    all_data: tuple[Tensor, ...] | None = None,
    num_data: int | None = None,
) -> PairTrace:
    """Run a pair once, with validation on, and refuse what breaks the contract.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        batch: x ``(B, *event)`` and any covariates.
        all_data: the columns that the batch comes from, to check every value against the support
            of the site that observes it; only the batch is checked if they are not given.
        num_data: how many data points there are, if ``all_data`` is not given.

    Returns:
        The run.

    Raises:
        ValueError: the pair cannot run on the batch; a site is missing, or stands in no plate
            ``"data"``, or in one of another size; a value is outside a site's support; a parameter
            belongs to a position in the minibatch.
    """
    x = batch[0]
    try:
        with torch.no_grad(), values_checked(True), remember_unnamed(model, guide):
            trace = PairTrace(model, guide, batch)
    except _PROGRAM_ERRORS as error:
        _refuse_other_devices(model, guide, x)
        rest = "" if len(batch) == 1 else f" and {len(batch) - 1} covariates"
        reason = str(error).split("Trace Shapes:")[0].strip()  # Pyro appends its whole trace
        raise ValueError(
            f"model and guide could not run on data x of shape {tuple(x.shape)} and dtype "
            f"{x.dtype}{rest}: {type(error).__name__}: {reason}. Are these the arguments, shapes "
            "and dtypes that the programs and their networks expect?"
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
    num_data = num_data if all_data is None else len(all_data[0])
    if num_data is not None:
        check_positions(model, guide, batch, trace, num_data)
    if all_data is not None:
        for factor, column in _observed_columns(trace, batch):
            outside = values_outside_support(factor.site, all_data[column])
            if outside is not None:
                raise ValueError(outside)
    return trace


def _refuse_other_devices(model: Program, guide: Program, x: Tensor) -> None:
    for module in unnamed(model, guide):
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            if tensor.device != x.device:
                raise ValueError(
                    f"a {type(module).__name__} that runs in model or guide is on {tensor.device}, "
                    f"the data on {x.device}. It was not moved there because no name leads to it: "
                    f"{NAME_IT}, or move it yourself."
                )


def observes_columns_alone(trace: PairTrace, batch: tuple[Any, ...]) -> bool:
    """Tell whether every local site observes a column of the data as it is.

    Then the check of all columns before the first step was a check of all that is observed.
    """
    found = {factor.name for factor, _ in _observed_columns(trace, batch)}
    return all(
        factor.name in found or factor.is_factor
        for factor in trace.model.values()
        if factor.observed and factor.local
    )


def _check_trace(trace: PairTrace, x: Tensor) -> None:
    if trace.batch_size != x.shape[0]:
        raise ValueError(
            f'the plate "data" has size {trace.batch_size} for a minibatch of {x.shape[0]} rows. '
            "Programs here are called with minibatches: use "
            '`pyro.plate("data", x.shape[0])`, or `pyro.plate("data", N, subsample=x)` where the '
            "minibatch stands for N rows."
        )
    for factor in (*trace.guide.values(), *trace.guide_losses, *trace.model.values()):
        _check_observation(factor, x)
        if not torch.isfinite(factor.log_prob).all():
            row = (~torch.isfinite(factor.log_prob)).nonzero()[0, -1].item()
            raise ValueError(
                f"site {factor.name!r} has a log-density of "
                f"{factor.log_prob.flatten()[row].item()} at row {row} of the first minibatch. "
                "Look for values outside its support, or a scale of zero or infinity."
            )


def _check_observation(factor: Factor, x: Tensor) -> None:
    """Refuse an observation that is shared by the whole batch, unless it is a mere constant."""
    value, frame = factor.site["value"], data_frame(factor.site)
    if not factor.observed or frame is None or factor.is_factor or value.numel() == 1:
        return
    axis = value.dim() - len(factor.site["fn"].event_shape) + frame.dim
    if axis < 0 or value.shape[axis] != x.shape[0]:
        raise ValueError(
            f"site {factor.name!r} observes a value of shape {tuple(value.shape)} for x of shape "
            f"{tuple(x.shape)}: it should hold {x.shape[0]} data, each of event shape "
            f"{tuple(factor.site['fn'].event_shape)}."
        )


def _observed_columns(trace: PairTrace, batch: tuple[Any, ...]) -> Iterator[tuple[Factor, int]]:
    """Yield the observed sites whose value is a column of the batch, with the column's number.

    Not masked ones: other rows of the column may be masked, and hold anything.
    """
    for factor in trace.model.values():
        value = factor.site["value"]
        if not factor.observed or isinstance(factor.site["mask"], Tensor):
            continue
        for number, column in enumerate(batch):
            if column.shape == value.shape and torch.equal(column, value):
                yield factor, number
                break
