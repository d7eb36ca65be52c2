"""The contract for programs, checked once on a first minibatch before anything is computed.

What Pyro and torch would say somewhere inside a run is said here in terms of the pair and its
data: which argument or site, what was expected, what came.
"""

from __future__ import annotations

import functools
import inspect
import itertools

import torch
from torch import Tensor

from pyro_vae._programs import parameters as programs
from pyro_vae._programs.minibatch_supports import check_supports
from pyro_vae._programs.pair_trace import Factor, PairTrace, Program
from pyro_vae._programs.positions import check_positions
from pyro_vae._programs.sites import data_frame
from pyro_vae._utils.checks import ShapeError
from pyro_vae._utils.modules import NAME_IT, remember_unnamed, unnamed
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._minibatches import Batch, Minibatches, finite_rows

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
    model: Program,
    guide: Program,
    batch: Batch,
    batches: Minibatches | None = None,
    *,
    weighs: bool = False,
    name: str = "data",
) -> PairTrace:
    """Run a pair once, with validation on, and refuse what breaks the contract.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        batch: x ``(B, *event)`` and any covariates.
        batches: the data that the batch is the first minibatch of. Rows with NaN or infinite
            values are run too, those of a stream as they come; and every value of a column in
            memory is checked against the support of the site that observes it.
            ``batches.values_checked`` tells whether this was a check of all that is observed.
        weighs: whether draws of the guide may have a density of zero under the model.
        name: the batch, as messages name it where there are no ``batches``.

    Returns:
        The run.

    Raises:
        ValueError: the pair cannot run on the batch; a site is missing, or stands in no plate
            ``"data"``, or in one of another size; a value is outside a site's support; NaN or
            infinite values of the data reach a density; a parameter belongs to a position in the
            minibatch.
    """
    name = name if batches is None else batches.name
    rows = torch.arange(len(batch[0]))
    trace = _run(model, guide, batch, rows, name, weighs=weighs)
    if batches is not None:
        if batches.num_data is not None:
            check_positions(model, guide, batch, trace, batches.num_data)
        _check_nonfinite_rows(model, guide, batches, weighs=weighs)
        run = functools.partial(_run_on_numbers, model, guide, name=name, weighs=weighs)
        batches.values_checked = check_supports(run, trace, batch, batches)
    return trace


def reason(error: Exception) -> str:
    """Return what an error says, without the shapes of all sites that Pyro puts behind it."""
    return str(error).split("Trace Shapes:")[0].strip()


def _run(
    model: Program, guide: Program, batch: Batch, rows: Tensor, name: str, *, weighs: bool
) -> PairTrace:
    """Run a pair on rows of the data.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        batch: the rows, and covariates.
        rows: their numbers.
        name: what messages call the data.
        weighs: see :func:`check_pair`.
    """
    try:
        return _run_on_numbers(model, guide, batch, name, weighs=weighs)
    except ValueError as error:
        if all(finite_rows(column).all() for column in batch):
            raise
        if not isinstance(error, _NonFiniteDensityError):  # it may have an error of its own
            _run_on_numbers(model, guide, tuple(map(_with_zeros, batch)), name, weighs=weighs)
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
    with torch.no_grad(), values_checked(False):
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


def _run_on_numbers(
    model: Program, guide: Program, batch: Batch, name: str = "data", *, weighs: bool
) -> PairTrace:
    x = batch[0]
    try:
        with torch.no_grad(), values_checked(True), remember_unnamed(model, guide):
            trace = PairTrace(model, guide, batch)
    except PROGRAM_ERRORS as error:
        _refuse_other_devices(model, guide, x)
        column = name if name == "x" else f"{name} x"
        rest = "" if len(batch) == 1 else f" and {len(batch) - 1} covariates"
        raise ValueError(
            f"model and guide could not run on {column} of shape {tuple(x.shape)} and dtype "
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
    _check_trace(trace, x, weighs=weighs)
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


def _check_nonfinite_rows(
    model: Program, guide: Program, batches: Minibatches, *, weighs: bool
) -> None:
    """Refuse NaN and infinite values that reach a density; of a stream, as they come."""
    rows = batches.nonfinite_rows()
    if rows is None:

        def check(batch: Batch, row_offset: int) -> None:
            numbers = row_offset + torch.arange(len(batch[0]))
            with programs.evaluation_mode(model, guide):
                try:
                    _run(model, guide, batch, numbers, batches.name, weighs=weighs)
                except ValueError:
                    if programs.has_finite_parameters(model, guide):  # else a step was to blame
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
            "Programs here are called with minibatches: use "
            '`pyro.plate("data", x.shape[0])`, or `pyro.plate("data", N, subsample=x)` where the '
            "minibatch stands for N rows."
        )
    for factor in (*trace.guide.values(), *trace.guide_losses, *trace.model.values()):
        _check_observation(factor, x)
        allowed = torch.isfinite(factor.log_prob)
        if weighs and factor.name in trace.latents:
            allowed = allowed | torch.isneginf(factor.log_prob)
        if not allowed.all():
            row = (~allowed).nonzero()[0, -1].item()
            remedy = "Look for values outside its support, or a scale of zero or infinity."
            if factor.name in trace.latents:
                remedy += (
                    " A guide that draws a latent outside the support of the model has no ELBO: "
                    "take a distribution on that support, as the guides of the library do."
                )
            raise _NonFiniteDensityError(
                f"site {factor.name!r} has a log-density of "
                f"{factor.log_prob.flatten()[row].item()} at row {row} of the first minibatch. "
                f"{remedy}"
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
