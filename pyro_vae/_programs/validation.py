"""Check the contract for programs on a first minibatch, before any training or evaluation.

Errors that Pyro or torch would raise deep inside a run are raised here instead. Each message
names the argument or site, the expected value and the given one.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_vae._programs.argument_shapes import remember
from pyro_vae._programs.evaluation import evaluation_mode
from pyro_vae._programs.minibatch_supports import check_supports
from pyro_vae._programs.pair_trace import Factor, PairTrace, Program
from pyro_vae._programs.parameters import has_finite_parameters
from pyro_vae._programs.positions import check_positions
from pyro_vae._programs.runs import as_guide, trace_of
from pyro_vae._programs.sites import data_frame, refuse_mismatch, values_outside_support
from pyro_vae._utils.checks import ShapeError
from pyro_vae._utils.compiled_modules import compiled_modules_run_eagerly
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.modules import NAME_IT, modules, remember_unnamed, unnamed
from pyro_vae._utils.network_outputs import NetworkError
from pyro_vae._utils.random import random_state, set_random_state
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._columns import finite_rows
from pyro_vae.datasets._minibatches import Batch, Minibatches
from pyro_vae.datasets._unused_columns import takes

# Errors that a program may raise for data of an unexpected shape, dtype or number of columns.
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
    model: Program,
    guide: Program,
    batch: Batch,
    batches: Minibatches | None = None,
    *,
    weighs: bool = False,
    name: str = "data",
) -> PairTrace:
    """Run a pair once with validation on, and raise ValueError if it breaks the contract.

    The shapes and dtypes of the batch are remembered for the model, see ``argument_shapes``.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        batch: x ``(B, *event)`` and any covariates.
        batches: all of the data; ``batch`` is their first minibatch. Rows with NaN or infinite
            values are run too (those of a stream, as they arrive). Every value of a column in
            memory is checked against the support of the site that observes it. If all observed
            values were checked, ``batches.values_checked`` becomes True.
        weighs: whether samples of the guide may have zero density under the model.
        name: the name of the batch in messages if ``batches`` is not given.

    Returns:
        The run.

    Raises:
        ValueError: The pair cannot run on the batch. A site is missing, is outside the plate
            ``"data"``, or that plate has the wrong size. A value is outside a site's support. NaN
            or infinite data reach a density. A parameter has one entry per minibatch position.
    """
    name = name if batches is None else batches.name
    rows = torch.arange(len(batch[0]))
    with compiled_modules_run_eagerly(modules(model, guide)):
        trace = _run(model, guide, batch, rows, name, weighs=weighs)
        if batches is not None:
            if batches.num_data is not None:
                check_positions(model, guide, batch, trace, batches.num_data)
            _check_nonfinite_rows(model, guide, batches, weighs=weighs)
            run = functools.partial(_run_on_numbers, model, guide, name=name, weighs=weighs)
            batches.values_checked = check_supports(run, trace, batch, batches)
        remember(model, batch)
    return trace


def _run(
    model: Program, guide: Program, batch: Batch, rows: Tensor, name: str, *, weighs: bool
) -> PairTrace:
    """Run a pair on some rows of the data.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        batch: the rows, and covariates.
        rows: the indices of these rows.
        name: the name of the data in messages.
        weighs: see :func:`check_pair`.
    """
    try:
        return _run_on_numbers(model, guide, batch, name, weighs=weighs)
    except ValueError as error:
        if all(finite_rows(column).all() for column in batch):
            raise
        if not isinstance(error, _NonFiniteDensityError):  # the cause may not be NaN
            _run_on_numbers(model, guide, tuple(map(_with_zeros, batch)), name, weighs=weighs)
        numbers = _columns_at_fault(model, guide, batch, name, weighs=weighs)
        finite = torch.stack([finite_rows(batch[number]) for number in numbers]).all(0)
        bad = rows[(~finite).nonzero()[:, 0].cpu()]
        reached = _what_they_reach(model, guide, batch)
        raise nonfinite_data(name, bad, reached, numbers) from error


def _columns_at_fault(
    model: Program, guide: Program, batch: Batch, name: str, *, weighs: bool
) -> list[int]:
    """Return the column whose NaN or infinite values make a pair fail, or all that have some."""
    numbers = [number for number, column in enumerate(batch) if not finite_rows(column).all()]
    for number in numbers if len(numbers) > 1 else ():
        some = [_with_zeros(c) if i == number else c for i, c in enumerate(batch)]
        try:
            _run_on_numbers(model, guide, tuple(some), name, weighs=weighs)
        except ValueError:
            continue
        return [number]
    return numbers


def nonfinite_data(
    name: str, rows: Tensor, reached: str, columns: Sequence[int] = (0,)
) -> ValueError:
    """Return the ValueError for NaN or infinite data that reach a density or a gradient.

    Args:
        name: the name of the data in messages.
        rows: indices of the rows with NaN or infinite values.
        reached: the effect of these values on the pair.
        columns: numbers of the columns that have these values: 0 for x, then the covariates.
    """
    shown = ", ".join(map(str, rows[:_ROWS_SHOWN].tolist()))
    names = [name if number == 0 else f"{name} covariate {number}" for number in columns]
    remedies = []
    if 0 in columns:
        remedies.append(
            "Remove them, or model them as missing data: wrap the likelihood in "
            "pv.likelihoods.NanMasked, or the distribution of your own observed site in "
            "pv.distributions.NanMasked. Wrap the encoder in pv.nets.ZeroImputed, or give it "
            "x.where(x.isfinite(), 0). See docs/missing-data.md"
        )
    if any(columns):
        remedies.append(
            "Missing values of a covariate that no site observes cannot be left out of a density. "
            "Remove these rows, or replace the values before, for example by the mean of the "
            "covariate. If the model observes the covariate, wrap its distribution in "
            "pv.distributions.NanMasked, and give the guide numbers in place of NaN"
        )
    return ValueError(
        f"{' and '.join(names)} {'has' if len(names) == 1 else 'have'} NaN or infinite values, "
        f"first in row {rows[0].item()}, and {reached}. Rows with such values: "
        f"[{shown}{', ...' if len(rows) > _ROWS_SHOWN else ''}]. {'. '.join(remedies)}"
    )


def _what_they_reach(model: Program, guide: Program, batch: Batch) -> str:
    with torch.no_grad(), values_checked(False):
        try:
            trace = PairTrace(model, guide, batch)
        except (ValueError, *PROGRAM_ERRORS) as error:
            return f"the pair cannot run on them: {type(error).__name__}: {first_line(error)}"
    for role, factors in (("guide", trace.guide), ("model", trace.model)):
        for factor in factors.values():
            if not (finite := torch.isfinite(factor.log_prob)).all():
                value = factor.log_prob[~finite][0].item()
                return f"the log-density of the {role}'s site {factor.name!r} is {value} there"
    return (
        "the site that observes them is masked, but its distribution still receives them: its "
        "gradient is not finite"
    )


def _failing_program(guide: Program, batch: Batch) -> str:
    """Return ``"guide"`` if the guide alone cannot run on a minibatch, else ``"model"``."""
    try:
        with torch.no_grad():
            trace_of(as_guide(guide), *batch)
    except (ValueError, *PROGRAM_ERRORS):
        return "guide"
    return "model"


def _with_zeros(column: Tensor) -> Tensor:
    return column.where(column.isfinite(), 0) if column.is_floating_point() else column


def _run_on_numbers(
    model: Program, guide: Program, batch: Batch, name: str = "data", *, weighs: bool
) -> PairTrace:
    x = batch[0]
    try:
        with torch.no_grad(), remember_unnamed(model, guide):
            trace = checked_run(model, guide, batch, weighs=weighs)
    except NetworkError:
        raise
    except PROGRAM_ERRORS as error:
        _refuse_other_devices(model, guide, x)
        raise _cannot_run(model, guide, batch, name, error) from error
    except ValueError as error:
        refuse_mismatch(error, x)
        if _is_of_library(error):
            raise
        raise _cannot_run(model, guide, batch, name, error) from error
    _check_trace(trace, x, weighs=weighs)
    return trace


def checked_run(model: Program, guide: Program, batch: Batch, *, weighs: bool) -> PairTrace:
    """Run a pair once with one particle and value checks.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        batch: x and any covariates.
        weighs: whether samples of the guide may have zero density under the model. The parameters
            of later distributions may be invalid there, such as a rate that is a negative latent.

    Raises:
        ValueError: A value or a parameter is invalid.
    """
    device = batch[0].device
    noise = random_state(device) if weighs else {}
    try:
        with values_checked(True):
            return PairTrace(model, guide, batch)
    except ValueError as error:
        if not weighs:
            raise
        trace = None
        with contextlib.suppress(ValueError, *PROGRAM_ERRORS), values_checked(False):
            set_random_state(noise, device)  # for the same samples
            trace = PairTrace(model, guide, batch)
        excluded = None if trace is None else trace.excluded
        if excluded is None or not trace.has_valid_parameters(except_in=excluded[0]):
            raise
        _check_observations(trace, ~excluded[0], error)
        return trace


def _check_observations(trace: PairTrace, possible: Tensor, error: ValueError) -> None:
    """Raise ValueError if a finite observed value of some rows is outside of its support.

    Args:
        trace: a run with one particle.
        possible: the rows to check, (B,).
        error: the cause of the check.
    """
    for factor in trace.model.values():
        if not factor.observed or not factor.local or factor.is_factor:
            continue
        site, value = factor.site, factor.site["value"]
        rows = possible & finite_rows(value) if len(value) == len(possible) else possible
        if (outside := values_outside_support(site, value, rows)) is not None:
            raise ValueError(outside) from error


def _cannot_run(
    model: Program, guide: Program, batch: Batch, name: str, error: Exception
) -> ValueError:
    """Return the ValueError for an error of torch, of Pyro or of the user's code in a run."""
    x = batch[0]
    column = name if name == "x" else f"{name} x"
    rest = "" if len(batch) == 1 else f" and {len(batch) - 1} covariates"
    return ValueError(
        f"the {_failing_program(guide, batch)} cannot run on {column} of shape "
        f"{tuple(x.shape)} and dtype {x.dtype}{rest}: {type(error).__name__}: "
        f"{first_line(error)}. {_columns_not_taken(model, guide, batch)}Correct the "
        "program, or pass data of the shape and dtype that it expects."
    )


def _is_of_library(error: Exception) -> bool:
    """Return whether code of this library raised an error, so that its message is complete."""
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    return last.tb_frame.f_globals.get("__name__", "").split(".")[0] == __name__.split(".")[0]


def _refuse_other_devices(model: Program, guide: Program, x: Tensor) -> None:
    for module in unnamed(model, guide):
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            if tensor.device != x.device:
                raise ValueError(
                    f"a {type(module).__name__} that runs in model or guide is on {tensor.device}, "
                    f"but the data are on {x.device}. It was not moved, because it could not be "
                    f"found by name: {NAME_IT}, or move it yourself."
                )


_MOST_MISSING = 8  # columns that a message suggests to add


def _columns_not_taken(model: Program, guide: Program, batch: Batch) -> str:
    """Return a message if a program does not accept one argument per column of the data."""
    count = len(batch)
    for name, program in (("model", model), ("guide", guide)):
        if not takes(program, count):
            more = range(count + 1, count + _MOST_MISSING + 1)
            needed = next((n for n in more if takes(model, n) and takes(guide, n)), None)
            if needed is not None:
                columns = "1 column" if count == 1 else f"{count} columns"
                return (
                    f"The data have {columns}, but the {name} needs more, and both programs take "
                    f"{needed}. Pass all columns as one tuple, such as (x, y) for data and labels. "
                )
            return (
                f"Both programs are called with every column of the data, but the {name} does not "
                f"take {count}. Add or remove arguments, so that both take the same columns. "
            )
    return ""


def _check_nonfinite_rows(
    model: Program, guide: Program, batches: Minibatches, *, weighs: bool
) -> None:
    """Raise ValueError if NaN or infinite data reach a density; check a stream as it is read."""
    rows = batches.nonfinite_rows()
    if rows is None:

        def check(batch: Batch, row_offset: int) -> None:
            numbers = row_offset + torch.arange(len(batch[0]))
            with evaluation_mode(model, guide):
                try:
                    _run(model, guide, batch, numbers, batches.name, weighs=weighs)
                except ValueError:
                    # NaN parameters come from a training step, not from the data.
                    if has_finite_parameters(model, guide):
                        raise

        batches.check_nonfinite = check
        return
    with torch.random.fork_rng(_devices(batches)):
        for some in rows.split(batches.batch_size) if len(rows) else ():
            batch = batches.prepare(some)
            _run(model, guide, batch, some.cpu(), batches.name, weighs=weighs)


def _devices(batches: Minibatches) -> list[torch.device]:
    return [batches.device] if batches.device.type == "cuda" else []


class _NonFiniteDensityError(ValueError):
    """A log-density that is NaN or infinite."""


def _check_trace(trace: PairTrace, x: Tensor, *, weighs: bool) -> None:
    if trace.batch_size != x.shape[0]:
        raise ValueError(
            f'the plate "data" has size {trace.batch_size} for a minibatch of {x.shape[0]} rows. '
            'Programs are called with minibatches: use `pyro.plate("data", x.shape[0])`. If the '
            'minibatch represents N rows, use `pyro.plate("data", N, subsample=x)`.'
        )
    factors = [(factor, False) for factor in (*trace.guide.values(), *trace.guide_losses)]
    factors += [(factor, True) for factor in trace.model.values()]
    excluded = trace.excluded if weighs else None
    for factor, of_model in factors:
        _check_observation(factor, x)
        may_be_zero = of_model and (factor.is_factor or factor.name in trace.latents)
        allowed = torch.isfinite(factor.log_prob)
        if weighs and may_be_zero:
            allowed = allowed | torch.isneginf(factor.log_prob)
        if excluded is not None and of_model and factor.local:
            allowed = allowed | excluded
        if not allowed.all():
            row = (~allowed).nonzero()[0, -1].item()
            remedy = "Look for values outside its support, or for a scale of zero or infinity."
            if may_be_zero:
                remedy += (
                    " There is no ELBO if the guide samples a latent outside the model's support, "
                    "or one that a factor excludes: use a distribution on that support, as the "
                    "guides of the library do."
                )
            raise _NonFiniteDensityError(
                f"site {factor.name!r} has a log-density of "
                f"{factor.log_prob.flatten()[row].item()} at row {row} of the first minibatch. "
                f"{remedy}"
            )


def _check_observation(factor: Factor, x: Tensor) -> None:
    """Raise ValueError if a whole batch shares one observation that is not a single number."""
    value, frame = factor.site["value"], data_frame(factor.site)
    if not factor.observed or frame is None or factor.is_factor or value.numel() == 1:
        return
    axis = value.dim() - len(factor.site["fn"].event_shape) + frame.dim
    if axis < 0 or value.shape[axis] != x.shape[0]:
        raise ValueError(
            f"site {factor.name!r} observes a value of shape {tuple(value.shape)} for x of shape "
            f"{tuple(x.shape)}. Expected {x.shape[0]} data points, each of event shape "
            f"{tuple(factor.site['fn'].event_shape)}."
        )
