"""The validation loss and the ELBO after each epoch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import pyro.infer

from pyro_vae._utils.distributed import rank
from pyro_vae._utils.random import seeded
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._minibatches import Minibatches
from pyro_vae.objectives import Objective
from pyro_vae.training._nonfinite import FirstNonFiniteSite, shown_rows
from pyro_vae.training._step import TrainStep


class Validation:
    """Compute validation losses that can be compared between epochs.

    The noise is the same each time. The bound is also the same in the whole run. It is the
    objective with each of its schedules at its last value. The ELBO of the same runs can also be
    compared between objectives.

    Args:
        train_step: Runs the pair.
        objective: The objective of the fit.
        data: The validation data.

    Raises:
        ValueError: A schedule of the objective has no last value.
    """

    def __init__(self, train_step: TrainStep, objective: pyro.infer.ELBO, data: Minibatches):
        self._train_step = train_step
        self._objective = objective
        self._data = data
        self._needs_validation = not data.values_checked  # by Pyro, the first time
        self.has_schedules = isinstance(objective, Objective) and objective.has_schedules
        self._at_last_values()

    def loss_and_elbo(
        self, epoch: int, seed: int, interrupted: Callable[[], bool]
    ) -> tuple[float, float]:
        """Return the loss and the ELBO per data point, with each schedule at its last value.

        Args:
            epoch: The finished epoch, from 1.
            seed: The seed of the noise.
            interrupted: Returns whether to stop.

        Raises:
            FloatingPointError: The loss is NaN or infinite. The message names the site and the
                rows.
            ValueError: The pair cannot run on the data.
            KeyboardInterrupt: The validation was interrupted.
        """
        refused, elbo = None, math.nan
        with values_checked(self._needs_validation and epoch == 1), self._noise(seed):
            try:
                loss, elbo = self._train_step.evaluate(
                    self._data, interrupted, self._at_last_values()
                )
            except ValueError as error:  # perhaps from Pyro's validation of a NaN
                loss, refused = math.nan, error
        if math.isfinite(loss):
            return loss, elbo
        with self._noise(seed):
            site, row_offset = self._first_site()
        if refused is not None and not site.has_nonfinite_numbers:
            raise refused
        what = "" if site.name is None else f": {site.what}"
        if site.bad is not None:
            what += f" at rows {shown_rows(site.bad + row_offset)} of the validation data"
        raise FloatingPointError(
            f"the validation loss is {loss} in epoch {epoch}{what}. Lower the learning rate, set "
            "clip_norm, or look for a scale that falls to zero."
        )

    def has_settled(self) -> bool:
        """Return whether all schedules of the objective have reached their last values."""
        return not self.has_schedules or self._objective.has_settled()

    def loss_of_training(self, seed: int, interrupted: Callable[[], bool]) -> float:
        """Return the loss per data point, with the schedules at their current values.

        Args:
            seed: The seed of the noise.
            interrupted: Returns whether to stop.
        """
        with values_checked(False), self._noise(seed):
            return self._train_step.evaluate(self._data, interrupted)[0]

    def _at_last_values(self) -> pyro.infer.ELBO:
        objective = self._objective
        return objective.with_last_values() if isinstance(objective, Objective) else objective

    @contextlib.contextmanager
    def _noise(self, seed: int) -> Iterator[None]:
        self._data.manual_seed(seed)
        with seeded(seed + rank()):
            yield

    def _first_site(self) -> tuple[FirstNonFiniteSite, int]:
        """Find the first NaN or infinite site, and count the rows before its minibatch."""
        row_offset = 0
        with FirstNonFiniteSite(*self._train_step.train_state.pair) as site, values_checked(False):
            for batch in self._data:
                with contextlib.suppress(ValueError):  # raised before
                    self._train_step.run_held_out(batch)
                if site.name is not None:
                    break
                row_offset += len(batch[0])
        return site, row_offset
