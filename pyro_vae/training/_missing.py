"""Check that missing data (NaN in the data) do not reach any gradient."""

from __future__ import annotations

import pyro.infer

from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.validation import nonfinite_data
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._columns import finite_rows
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
    """Check the gradient on rows with NaN or infinite values, if the data in memory have any.

    A finite loss can have a NaN gradient. ``torch.where`` multiplies the gradient of excluded
    values by zero, and zero times NaN is NaN.

    Raises:
        ValueError: The gradient is NaN or infinite.
    """
    rows = batches.nonfinite_rows()
    if rows is None or not len(rows):
        return
    with put_back(model, guide, objective, batches), values_checked(False):
        loss, *gradients = train_step.gradient(rows[: batches.batch_size])
    if loss.isfinite() and not all_finite(gradients):
        reached = "the gradient of the loss is NaN or infinite there, although the loss is finite"
        columns = enumerate(batches.columns)
        numbers = [number for number, column in columns if not finite_rows(column).all()]
        raise nonfinite_data(batches.name, rows.cpu(), reached, numbers)
