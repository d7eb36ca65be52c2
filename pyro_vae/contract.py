"""The contract for programs, checked once on a first minibatch before anything is computed.

What Pyro and torch would say somewhere inside a run is said here in terms of the pair and its
data: which argument or site, what was expected, what came.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae import programs
from pyro_vae.inputs import ShapeError
from pyro_vae.minibatches import Batch, Minibatches, finite_rows
from pyro_vae.sites import data_frame, support_bounds, values_outside_support
from pyro_vae.traces import Factor, PairTrace, Program

# What a program that meets data of another kind than it expects may raise somewhere inside.
PROGRAM_ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    ShapeError,
    TypeError,
    ZeroDivisionError,
)
_ROWS_SHOWN = 10


def check_pair(
    model: Program, guide: Program, batch: Batch, batches: Minibatches | None = None
) -> PairTrace:
    """Run a pair once, with validation on, and refuse what breaks the contract.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        batch: x ``(B, *event)`` and any covariates.
        batches: the data that the batch is the first minibatch of. Rows with NaN or infinite
            values are run too, those of a stream as they come. Every value of a column in memory is checked
            against the support of the site that observes it. ``batches.values_checked`` tells whether this
            was a check of all that is observed.

    Returns:
        The run.

    Raises:
        ValueError: the pair cannot run on the batch; a site is missing, or stands in no plate
            ``"data"``, or in one of another size; a value is outside a site's support; NaN or
            infinite values of the data reach a density.
    """
    name = "data" if batches is None else batches.name
    trace = _run(model, guide, batch, torch.arange(len(batch[0])), name)
    if batches is not None:
        _check_nonfinite_rows(model, guide, batches)
        batches.values_checked = _check_supports(model, guide, trace, batch, batches)
    return trace


def reason(error: Exception) -> str:
    """Return what an error says, without the shapes of all sites that Pyro puts behind it."""
    return str(error).split("Trace Shapes:")[0].strip()


def _run(model: Program, guide: Program, batch: Batch, rows: Tensor, name: str) -> PairTrace:
    """Run a pair on rows of the data.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        batch: the rows, and covariates.
        rows: their numbers.
        name: what messages call the data.
    """
    try:
        return _run_on_numbers(model, guide, batch)
    except ValueError as error:
        if all(finite_rows(column).all() for column in batch):
            raise
        if not isinstance(error, _NonFiniteDensity):  # it may have an error of its own
            _run_on_numbers(model, guide, tuple(map(_with_zeros, batch)))
        where = next(i for i, c in enumerate(batch) if not finite_rows(c).all())
        bad = rows[(~finite_rows(batch[where])).nonzero()[:, 0].cpu()]
        column = name if where == 0 else f"{name} covariate {where}"
        raise nonfinite_data(column, bad, _what_they_reach(model, guide, batch)) from error


def nonfinite_data(column: str, rows: Tensor, reached: str) -> ValueError:
    """Make the error of NaN or infinite values that a pair does not keep out of its densities.

    Args:
        column: what messages call the data.
        rows: which hold such values.
        reached: what they make of the pair.
    """
    shown = ", ".join(map(str, rows[:_ROWS_SHOWN].tolist()))
    return ValueError(
        f"{column} has NaN or infinite values, first in row {rows[0].item()}, and {reached}. Rows "
        f"with such values are [{shown}{', ...' if len(rows) > _ROWS_SHOWN else ''}]. Remove or "
        "impute them. Or model them as missing: mask the site that observes them, by "
        ".mask(x.isfinite()) of its distribution or by poutine.mask, and let it observe, and the "
        "encoder take, x.where(x.isfinite(), 0) in place of x"
    )


def _what_they_reach(model: Program, guide: Program, batch: Batch) -> str:
    with torch.no_grad(), pyro.validation_enabled(False):
        try:
            trace = PairTrace(model, guide, batch)
        except (ValueError, *PROGRAM_ERRORS) as error:
            return f"the pair cannot run on them: {type(error).__name__}: {reason(error)}"
    for role, factors in (("guide", trace.guide), ("model", trace.model)):
        for factor in factors.values():
            if not (finite := torch.isfinite(factor.log_prob)).all():
                value = factor.log_prob[~finite][0].item()
                return f"the log-density of the {role}'s site {factor.name!r} is {value} there"
    return (
        "a site masks them, but its distribution is still given them, and then its gradient is "
        "not finite"
    )


def _with_zeros(column: Tensor) -> Tensor:
    return column.where(column.isfinite(), 0) if column.is_floating_point() else column


def _run_on_numbers(model: Program, guide: Program, batch: Batch) -> PairTrace:
    x = batch[0]
    try:
        with torch.no_grad(), pyro.validation_enabled(True):
            trace = PairTrace(model, guide, batch)
    except PROGRAM_ERRORS as error:
        rest = "" if len(batch) == 1 else f" and {len(batch) - 1} covariates"
        raise ValueError(
            f"model and guide could not run on data x of shape {tuple(x.shape)} and dtype "
            f"{x.dtype}{rest}: {type(error).__name__}: {reason(error)}. "
            f"{_columns_not_taken(model, guide, batch)}Are these the arguments, shapes and dtypes "
            "that the programs and their networks expect?"
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
    return trace


def _columns_not_taken(model: Program, guide: Program, batch: Batch) -> str:
    """Say which program does not take as many arguments as the data have columns."""
    for name, program in (("model", model), ("guide", guide)):
        function = program.forward if isinstance(program, torch.nn.Module) else program
        try:
            inspect.signature(function).bind(*batch)
        except TypeError:
            return (
                f"Each column of the data is an argument of both programs, and the {name} does not "
                f"take {len(batch)}. Leave out the columns that are none, such as labels (of a "
                "TensorDataset, pass its tensors[0]), or give both programs an argument for each. "
            )
        except ValueError:  # it has no signature
            continue
    return ""


def _check_nonfinite_rows(model: Program, guide: Program, batches: Minibatches) -> None:
    """Refuse NaN and infinite values that reach a density; of a stream, as they come."""
    rows = batches.nonfinite_rows()
    if rows is None:

        def check(batch: Batch, rows_before: int) -> None:
            numbers = rows_before + torch.arange(len(batch[0]))
            with programs.evaluation_mode(model, guide):
                try:
                    _run(model, guide, batch, numbers, batches.name)
                except ValueError:
                    if programs.has_finite_parameters(model, guide):  # else a step was to blame
                        raise

        batches.check_nonfinite = check
        return
    with torch.random.fork_rng(_devices(batches)):
        for some in rows.split(batches.batch_size) if len(rows) else ():
            _run(model, guide, batches.prepare(some), some.cpu(), batches.name)


def _check_supports(
    model: Program, guide: Program, trace: PairTrace, batch: Batch, batches: Minibatches
) -> bool:
    """Check all values in memory that a site observes as they are, against its support.

    A support whose bounds the program computes from the minibatch is not that of other rows.

    Returns:
        Whether that was a check of every local observed site.

    Raises:
        ValueError: a value is outside.
    """
    columns = batches.checked
    if columns is None:
        return False
    extremes: _Extremes | None = None
    checked = set()
    finite = torch.stack([finite_rows(column) for column in columns]).all(0)
    for factor, number in _observed_columns(trace, batch):
        outside = values_outside_support(factor.site, columns[number], finite)
        if (bounds := support_bounds(factor.site)) is not None:
            extremes = extremes or _Extremes(model, guide, columns, batches)
            others = [support_bounds(run.model[factor.name].site) for run in extremes.runs]
            varies = not all(_same(bounds, other) for other in others)
            if extremes.error is not None:
                raise ValueError(extremes.error if varies else outside or extremes.error)
            if varies:
                continue
        if outside is not None:
            raise ValueError(outside)
        checked.add(factor.name)
    return all(
        factor.name in checked or factor.is_factor
        for factor in trace.model.values()
        if factor.observed and factor.local
    )


class _Extremes:
    """A pair run on the rows with the least and the largest sum of a column, each repeated.

    Bounds that depend on the data differ there, if anywhere.

    Attributes:
        runs: those without an error.
        error: of the first run that has one.
    """

    def __init__(self, model: Program, guide: Program, columns: Batch, batches: Minibatches):
        self.runs: list[PairTrace] = []
        self.error: str | None = None
        size = min(batches.batch_size, len(columns[0]))
        sums = [c.flatten(1).sum(1, dtype=torch.float64) if c.dim() > 1 else c for c in columns]
        rows = [pick(each.nan_to_num(0.0)).item() for each in sums for pick in _PICKS]
        with torch.random.fork_rng(_devices(batches)):
            for row in dict.fromkeys(rows):
                repeated = tuple(column[[row] * size] for column in columns)
                numbers = torch.full((size,), row)
                try:
                    self.runs.append(_run(model, guide, repeated, numbers, batches.name))
                except ValueError as error:
                    text = str(error).replace("first in row 0", f"first in row {row}")
                    self.error = self.error or text


_PICKS = (torch.argmin, torch.argmax)


def _devices(batches: Minibatches) -> list[torch.device]:
    return [batches.device] if batches.device.type == "cuda" else []


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and not isinstance(a, Tensor) and a == b


class _NonFiniteDensity(ValueError):
    """A log-density that is NaN or infinite."""


def _check_trace(trace: PairTrace, x: Tensor) -> None:
    if trace.batch_size != x.shape[0]:
        raise ValueError(
            f'the plate "data" has size {trace.batch_size} for a minibatch of {x.shape[0]} rows. '
            "Programs here are called with minibatches: use "
            '`pyro.plate("data", x.shape[0])`, or `pyro.plate("data", N, subsample=x)` where the '
            "minibatch stands for N rows."
        )
    for factor in (*trace.guide.values(), *trace.model.values()):
        _check_observation(factor, x)
        if not torch.isfinite(factor.log_prob).all():
            row = (~torch.isfinite(factor.log_prob)).nonzero()[0, -1].item()
            raise _NonFiniteDensity(
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
