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
    """A loss, gradient or parameter of a step is NaN or infinite. The step may be incomplete.

    Args:
        what: The cause, for messages.
        parameter: The parameter with such a gradient or value, None if it is the loss.
    """

    def __init__(self, what: str, parameter: str | None):
        super().__init__(what)
        self.what, self.parameter = what, parameter


def checked_step(
    train_step: TrainStep, selection: tuple[Tensor, ...], device: torch.device
) -> Tensor:
    """Take a step and return the loss before it, if all numbers are finite.

    Args:
        train_step: Runs the step.
        selection: The rows of the minibatch.
        device: The device of the random numbers of the step.

    Raises:
        NonFiniteStepError: The loss, a gradient or a new parameter is NaN or infinite.
        ValueError: The pair cannot run on the data. If one process fails, all of them raise.
    """
    noise = random_state(device)
    try:
        loss = train_step.step(
            selection, on_gradients=functools.partial(_require_finite, train_step)
        )
    except NonFiniteStepError:
        if num_processes() > 1:  # an error in one process makes the loss NaN in all
            set_random_state(noise, device)
            _refuse(train_step, selection, train_step.error)
        raise
    except ValueError as error:  # perhaps from Pyro's validation of a NaN
        set_random_state(noise, device)
        _refuse(train_step, selection, error)
        raise NonFiniteStepError("the loss is NaN or infinite", None) from None
    if name := first_non_finite(train_step.train_state.named_parameters()):
        raise NonFiniteStepError(f"the step made parameter {name!r} NaN or infinite", name)
    return loss


def _refuse(train_step: TrainStep, selection: tuple[Tensor, ...], error: ValueError | None) -> None:
    """Raise the error of this process or of another one, unless NaN or infinity caused it."""
    stands = error is not None and not first_site(train_step, selection).has_nonfinite_numbers
    standing = torch.stack(gather(torch.tensor(stands))).nonzero()
    if stands:
        raise error
    if len(standing):
        raise ValueError(
            f"process {standing[0].item()} failed on its rows of the minibatch. See its error"
        )


def first_site(train_step: TrainStep, selection: tuple[Tensor, ...]) -> FirstNonFiniteSite:
    """Run the pair as a step does, and find the first site with a NaN or an infinity."""
    with FirstNonFiniteSite(*train_step.train_state.pair) as site, values_checked(False):
        train_step.run(selection)
    return site


def _require_finite(train_step: TrainStep, loss: Tensor) -> None:
    if not loss.isfinite():
        raise NonFiniteStepError(f"the loss is {loss.item()}", None)
    if name := first_non_finite(train_step.train_state.named_gradients()):
        raise NonFiniteStepError(f"the gradient of parameter {name!r} is NaN or infinite", name)
