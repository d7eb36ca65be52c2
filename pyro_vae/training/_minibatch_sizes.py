"""Check the pair on every minibatch size before the first step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import pyro.infer
import torch
from torch import Tensor

from pyro_vae._programs.evaluation import evaluation_mode
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.trial_runs import LARGEST_COPIED, ModuleState
from pyro_vae._programs.validation import PROGRAM_ERRORS
from pyro_vae._utils.distributed import num_processes
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.modules import modules
from pyro_vae._utils.random import random_state, set_random_state
from pyro_vae._utils.referenced_objects import referenced_objects
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._minibatches import Batch, Minibatches
from pyro_vae.training._losses import loss_value


def try_sizes(
    model: Program,
    guide: Program,
    objective: pyro.infer.ELBO,
    batches: Minibatches,
    first: Batch,
    *,
    training: bool,
    nonfinite_too: bool,
) -> None:
    """Compute the loss of a minibatch of each size in a pass, and restore the state.

    The running averages, the random state and the state of the objective do not change. Unknown
    sizes, such as those of a stream, are not tried.

    Args:
        model: The program of p(x, z).
        guide: The program of q(z|x).
        objective: The objective of the loss.
        batches: The data.
        first: The first minibatch of the data. All sizes use its rows.
        training: Whether to run the modules in their own mode, and not in evaluation mode.
        nonfinite_too: Whether to raise an error if the loss is NaN or infinite at a size, but
            finite at a larger one.

    Raises:
        ValueError: The programs or the objective cannot process a size.
    """
    whole, *rest = batches.sizes or [None]
    if whole != len(first[0]):
        return
    mode = contextlib.nullcontext() if training else evaluation_mode(model, guide)
    with mode, torch.no_grad(), values_checked(False):
        shares = [share for size in (whole, *rest) for share in _shares(size, batches)]
        were_finite = False
        for size in dict.fromkeys(shares):
            with put_back(model, guide, objective, batches):
                rows = repeated(first, size)
                try:
                    loss = float(loss_value(objective, model, guide, *rows))
                except (ValueError, *PROGRAM_ERRORS) as error:
                    told = f"{type(error).__name__}: {first_line(error)}"
                    raise ValueError(_message(batches, size, training, told)) from error
            is_finite = math.isfinite(loss)
            if nonfinite_too and were_finite and not is_finite:
                raise ValueError(_message(batches, size, training, f"the loss is {loss}"))
            were_finite = is_finite


def smaller_minibatch(error: Exception, size: int, usual: int) -> ValueError:
    """Return the error for a minibatch that is too small for the pair or the objective."""
    return ValueError(
        f"model, guide and objective cannot process a minibatch of {_rows(size)}, but can process "
        f"{_rows(usual)}: {type(error).__name__}: {first_line(error)}. "
        "Use minibatches of one size, such as a DataLoader with drop_last=True"
    )


def repeated(columns: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    """Return ``count`` rows that repeat the rows of the columns."""
    rows = torch.arange(count, device=columns[0].device) % len(columns[0])
    return tuple(column[rows] for column in columns)


def _shares(size: int, batches: Minibatches) -> list[int]:
    """Return the numbers of rows that processes can have of a minibatch."""
    if batches.is_sharded:
        return [size]
    each, more = divmod(size, num_processes())
    return [share for share in ([each + 1] if more else []) + [each] if share]


def _message(batches: Minibatches, size: int, training: bool, told: str) -> str:
    whole, *rest = batches.sizes
    mode = "training" if training else "evaluation"
    text = (
        f"model, guide and objective cannot process a minibatch of {_rows(size)} in {mode} mode: "
        f"{told}. The {_rows(batches.num_data)} of {batches.name} are split into minibatches of "
        f"{whole}"
    )
    text += "".join(f", the last of {left}" for left in rest)
    if num_processes() > 1 and not batches.is_sharded:
        text += f", each shared by {num_processes()} processes"
    if not rest or size in _shares(whole, batches):
        return f"{text}. Choose a larger batch_size"
    if (other := _other_size(batches.num_data, whole)) is not None:
        left = batches.num_data % other
        leaves = f"leaves {left} rows for the last" if left else "divides the number of rows"
        text += f". Choose another batch_size: {other} {leaves}"
    return f"{text}. Or drop the last minibatch by passing a torch DataLoader with drop_last=True"


def _other_size(num_data: int, size: int) -> int | None:
    """Return a smaller batch size whose last minibatch is at least half full."""
    sizes = range(size - 1, 1, -1)
    return next((s for s in sizes if num_data % s == 0 or 2 * (num_data % s) >= s), None)


def _rows(size: int) -> str:
    return f"{size} row" if size == 1 else f"{size} rows"


@contextlib.contextmanager
def put_back(
    model: Program, guide: Program, objective: pyro.infer.ELBO, batches: Minibatches
) -> Iterator[None]:
    """Restore the untrained tensors, numbers and the random state after the block."""
    noise, restore = random_state(batches.device), _copies(model, guide, objective)
    try:
        yield
    finally:
        set_random_state(noise, batches.device)
        restore()


def _copies(model: Program, guide: Program, objective: pyro.infer.ELBO) -> Callable[[], None]:
    """Copy the state that a run may change. Return a function that restores it."""
    found = {id(b): b for module in modules(model, guide) for b in module.buffers()}
    for _, thing in referenced_objects(model=model, guide=guide, objective=objective):
        if isinstance(thing, Tensor) and _may_change(thing):
            found.setdefault(id(thing), thing)
    saved = [(tensor, tensor.clone()) for tensor in found.values()]
    every = [inner for module in modules(model, guide) for inner in module.modules()]
    states = [ModuleState(module, found, LARGEST_COPIED) for module in every]
    remembered = {n: v for n, v in vars(objective).items() if isinstance(v, Tensor)}
    averages = dict(getattr(objective, "averages", {}))  # by site, created at the first run

    def restore() -> None:
        for state in states:
            state.restore()
        vars(objective).update(remembered)
        if hasattr(objective, "averages"):
            objective.averages = averages
        for tensor, value in saved:
            if not torch.equal(tensor, value):
                tensor.copy_(value)

    return restore


def _may_change(tensor: Tensor) -> bool:
    """Return whether a run may change a tensor in place. A large tensor is data."""
    fixed = tensor.requires_grad or tensor.is_inference() or tensor.layout != torch.strided
    return not fixed and tensor.numel() <= LARGEST_COPIED
