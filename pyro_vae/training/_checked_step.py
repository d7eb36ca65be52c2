"""A step that checks its loss, each gradient and each new parameter for NaN and infinity."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pyro_vae._utils.distributed import gather, num_processes
from pyro_vae._utils.random import random_state, set_random_state
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.training._nonfinite import FirstNonFiniteSite, first_non_finite
from pyro_vae.training._step import TrainStep


class NonFiniteStepError(Exception):
    """A step has met a NaN or an infinity, and may be half done.

    Args:
        what: what is not finite.
        parameter: whose gradient or value it is, None if it is the loss.
    """

    def __init__(self, what: str, parameter: str | None):
        super().__init__(what)
        self.what, self.parameter = what, parameter


def checked_step(
    train_step: TrainStep, selection: tuple[Tensor, ...], device: torch.device
) -> Tensor:
    """Take a step, and return the loss before it.

    Args:
        train_step: takes the step.
        selection: of the data.
        device: whose random numbers the step draws.

    Raises:
        NonFiniteStepError: something is not finite.
        ValueError: the pair cannot take the data; in all processes, if it is so in one.
    """
    noise = random_state(device)
    try:
        loss = train_step.step(
            selection, on_gradients=functools.partial(_require_finite, train_step)
        )
    except NonFiniteStepError:
        if num_processes() > 1:  # an error of one came to all as a loss that is NaN
            set_random_state(noise, device)
            _refuse(train_step, selection, train_step.error)
        raise
    except ValueError as error:  # perhaps by Pyro's validation, of what is not finite
        set_random_state(noise, device)
        _refuse(train_step, selection, error)
        raise NonFiniteStepError("the loss is not finite", None) from None
    if name := first_non_finite(train_step.train_state.named_parameters()):
        raise NonFiniteStepError(f"the step made parameter {name!r} not finite", name)
    return loss


def _refuse(train_step: TrainStep, selection: tuple[Tensor, ...], error: ValueError | None) -> None:
    """Raise an error of this process or of another, unless it is of what is not finite."""
    stands = error is not None and not first_site(train_step, selection).has_nonfinite_numbers
    standing = torch.stack(gather(torch.tensor(stands))).nonzero()
    if stands:
        raise error
    if len(standing):
        raise ValueError(
            f"process {standing[0].item()} cannot take its rows of the minibatch: see its error"
        )


def first_site(train_step: TrainStep, selection: tuple[Tensor, ...]) -> FirstNonFiniteSite:
    """Run the pair as a step would, to find the first site that is not finite."""
    with FirstNonFiniteSite() as site, values_checked(False):
        train_step.run(selection)
    return site


def _require_finite(train_step: TrainStep, loss: Tensor) -> None:
    if not loss.isfinite():
        raise NonFiniteStepError(f"the loss is {loss.item()}", None)
    if name := first_non_finite(train_step.train_state.named_gradients()):
        raise NonFiniteStepError(f"the gradient of parameter {name!r} is not finite", name)
