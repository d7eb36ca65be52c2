"""Missing data, NaN in the data, seen to have no part in any gradient."""

from __future__ import annotations

import pyro.infer

from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.validation import nonfinite_data
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._minibatches import Minibatches
from pyro_vae.training._gradients import all_finite
from pyro_vae.training._minibatch_sizes import put_back
from pyro_vae.training._step import TrainStep


def check_gradient_of_missing(
    train_step: TrainStep,
    model: Program,
    guide: Program,
    objective: pyro.infer.ELBO,
    batches: Minibatches,
) -> None:
    """Take the gradient on rows with NaN or infinite values, where the data in memory have some.

    A loss can be finite where its gradient is not: ``torch.where`` multiplies the gradient of what
    it left out by zero, and NaN stays NaN.

    Raises:
        ValueError: the gradient is not finite.
    """
    rows = batches.nonfinite_rows()
    if rows is None or not len(rows):
        return
    with put_back(model, guide, objective, batches), values_checked(False):
        loss, *gradients = train_step.gradient(rows[: batches.batch_size])
    if loss.isfinite() and not all_finite(gradients):
        reached = "the gradient of the loss is not finite there, though the loss is"
        raise nonfinite_data(batches.name, rows.cpu(), reached)
