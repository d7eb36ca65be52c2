"""The steps of a fit, eager or captured."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae._capture import Capture, Captured
from pyro_vae._capture.cuda import has_graphs
from pyro_vae._programs.data_plate import DataScale
from pyro_vae._programs.evaluation import evaluation_mode
from pyro_vae._utils.distributed import num_processes, rank, sum_over_processes
from pyro_vae.datasets._minibatches import Batch, Minibatches
from pyro_vae.training._adam import Adam
from pyro_vae.training._gradients import all_finite, clipped, gradients_of, hides_gradients
from pyro_vae.training._losses import differentiable_loss, loss_and_elbo, loss_value
from pyro_vae.training._minibatch_sizes import repeated, smaller_minibatch
from pyro_vae.training._sharing import SharedGradient, local_rows
from pyro_vae.training._train_state import TrainState
from pyro_vae.training._whole_step import WholeStep

BOTH = "model and guide"
STEPS_BETWEEN_COMPARISONS = 100


class TrainStep:
    """Run the steps of one fit.

    Args:
        train_state: The pair, the objective and the optimizer, which the steps change.
        batches: The training data.
        clip_norm: The bound on the norm of the whole gradient.
        alternation: The program or both programs that each step of a cycle trains.
        capture: See :func:`pyro_vae.fit`.
    """

    def __init__(
        self,
        train_state: TrainState,
        batches: Minibatches,
        *,
        clip_norm: float | None = None,
        alternation: Sequence[str] = (BOTH,),
        capture: Capture = "auto",
    ):
        self._pair, self._objective = train_state.pair, train_state.objective
        self._batches = batches
        self._clip_norm = clip_norm
        self.train_state = train_state
        self._alternation = _held_in_turns(train_state.parameters_of, alternation)
        self._in_turns = len(set(alternation)) > 1
        self._shared = None
        if num_processes() > 1:
            self._shared = SharedGradient(train_state.parameters, is_sharded=batches.is_sharded)
        # The norm is that of the trained parameters' gradient on the whole minibatch.
        self._clips_within = self._shared is None and not self._in_turns
        self._hides_gradients = hides_gradients(train_state.optimizer)
        self.steps = 0
        self._compared_at = 0  # the number of steps before the last comparison
        # Pyro's own objectives do not count steps.
        self._advance = getattr(self._objective, "advance", lambda: None)
        self._capture = capture
        self._trained: list[bool] = []  # whether each parameter is, since the capture began
        self._new_capture()
        self._validated = False

    @property
    def execution(self) -> str:
        """The way the steps run now; see :class:`pyro_vae._capture.Captured`."""
        found = self._captured.execution
        if self._whole is not None and self._whole.is_used and found.startswith("captured"):
            found += ", with the optimizer"
        return found

    def release(self) -> None:
        """Release the capture and its memory on a GPU. Steps are not possible afterwards.

        References in a circle would keep the memory until the next garbage collection.
        """
        self._captured.release()
        self._whole = None

    def begin(self, steps: int | None, *, validated: bool = False) -> None:
        """Prepare for the steps of one epoch.

        Args:
            steps: The number of steps until the end of the fit, None if it is unknown.
            validated: Whether Pyro validates values in this epoch. Such steps run in Python.
        """
        self._captured.calls_left = steps
        self._validated = validated

    def recheck(self, *, after_user_code: bool) -> None:
        """Check at the start of an epoch that the capture is still valid for the programs.

        The next step may also compare the capture with an eager step, which takes as long as ten
        captured steps of a small network. Without code of the user between the steps, at least 100
        steps lie between two comparisons.

        Args:
            after_user_code: Whether code of the user ran since the last step, which may have
                changed objects that no name refers to.
        """
        if self.train_state.train_new_parameters() or self._trained != self._now_trained():
            self._new_capture()  # parameters were frozen or thawed
        since = self.steps - self._compared_at
        compare = after_user_code or since >= STEPS_BETWEEN_COMPARISONS
        if compare:
            self._compared_at = self.steps
        self._captured.recheck(compare=compare)

    def step(
        self, selection: tuple[Tensor, ...], on_gradients: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """Take a step. Return the loss per data point before it, on its device.

        Args:
            selection: The rows of the minibatch.
            on_gradients: Called with the loss after the gradients are computed, before the update.

        Raises:
            TypeError: The ``step`` of the optimizer does not return the loss of its closure.
        """
        held = self._alternation[self.steps % len(self._alternation)]
        optimizer = self.train_state.optimizer
        loss = optimizer.step(functools.partial(self._closure, selection, held, on_gradients))
        if loss is None:
            raise TypeError(
                f"{type(optimizer).__name__}.step must return the loss of its closure, as torch's "
                "optimizers do. It returned None"
            )
        self._advance()
        self.steps += 1
        return loss.detach()

    def evaluate(
        self,
        batches: Minibatches,
        interrupted: Callable[[], bool],
        objective: pyro.infer.ELBO | None = None,
    ) -> tuple[float, float]:
        """Return the loss and the ELBO per data point, averaged over the data.

        Args:
            batches: The data.
            interrupted: Returns whether to stop.
            objective: The objective of the loss. The default is the objective of the fit.

        Raises:
            KeyboardInterrupt: The evaluation was interrupted.
            ValueError: The pair cannot run on the data, in this process or in another one.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=batches.device)  # loss, ELBO, rows
        refused, size, most = None, 0, 0
        try:
            with evaluation_mode(*self._pair):
                for batch in batches:
                    mine = batch if batches.is_sharded else local_rows(batch)
                    most = max(most, size)
                    if size := len(mine[0]):
                        values = self._loss_and_elbo(mine, objective)
                        sums += size * torch.stack([*values, torch.ones_like(sums[0])])
                    if interrupted():
                        raise KeyboardInterrupt
        except ValueError as error:
            refused = error
            if size < most and self._takes(repeated(mine, most), objective):
                refused = smaller_minibatch(error, size, most)
        refusals = torch.tensor([refused is not None], dtype=torch.int64)
        sum_over_processes([sums, refusals])
        if refused is not None:
            raise refused
        if refusals.item():
            raise ValueError("another process failed on its validation data. See its error")
        loss, elbo, count = sums.tolist()
        return loss / count, elbo / count

    def gradient(self, *selection: Tensor) -> list[Tensor | None]:
        """Return the loss per data point and the gradients of a minibatch, without a step."""
        return self._loss_and_gradients(*self._batches.read(*selection))

    def _captured_gradient(self, *selection: Tensor) -> list[Tensor | None]:
        loss, *gradients = self._captured(*self._batches.read(*selection))
        # The next replay of a CUDA graph overwrites the outputs. The gradients are used before.
        return [loss.clone(), *gradients]

    def minibatch(self, selection: tuple[Tensor, ...]) -> Batch:
        """Return the minibatch of a step, on the device and transformed."""
        return self._batches.prepare(*selection)

    @torch.no_grad()
    def run(self, selection: tuple[Tensor, ...]) -> None:
        """Run the pair in Python as a step does, so that active Pyro handlers see its sites."""
        mine = selection if self._batches.is_sharded else local_rows(selection)
        if len(mine[0]):
            self._value(self.minibatch(mine))

    @torch.no_grad()
    def run_held_out(self, batch: Batch) -> None:
        """Run the pair in Python on validation data, so that active Pyro handlers see its sites."""
        with evaluation_mode(*self._pair):
            self._value(batch)

    def row_offset(self, selection: tuple[Tensor, ...]) -> int:
        """Return the number of rows of a minibatch in processes of lower rank."""
        if self._batches.is_sharded:
            return 0
        shares = selection[0].tensor_split(num_processes())
        return sum(len(share) for share in shares[: rank()])

    @property
    def error(self) -> ValueError | None:
        """The error of this process in the last step. Other processes got a loss of NaN."""
        return None if self._shared is None else self._shared.error

    def end_epoch(self, loss: float) -> None:
        """Step the scheduler. Train new parameters too, and then capture the step again."""
        self.train_state.end_epoch(loss)
        if self.train_state.train_new_parameters():
            self._new_capture()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, without random numbers."""
        state = {"steps": self.steps, **self.train_state.state_dict()}
        return state | {
            "compared_at": self._compared_at,
            "trained": self._trained,
            "capture": self._captured.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of :meth:`state_dict`, before the first step.

        Raises:
            ValueError: The state belongs to another pair, objective, optimizer or scheduler.
        """
        if self.train_state.load_state_dict(state):
            self._new_capture()
        self.steps = state["steps"]
        self._compared_at = state.get("compared_at", 0)  # older checkpoints have neither
        self._trained = state.get("trained", self._trained)
        self._captured.load_state_dict(state["capture"])

    def snapshot(self) -> dict[str, Any]:
        """Copy the state that the next step depends on, without random numbers."""
        state = {"steps": self.steps, **self.train_state.snapshot()}
        return state | {
            "compared_at": self._compared_at,
            "gradient": (self._captured, self._whole, self._trained),
            "capture": self._captured.snapshot(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a copy from :meth:`snapshot`."""
        self.steps, self._compared_at = state["steps"], state["compared_at"]
        self.train_state.restore(state)
        self._captured, self._whole, self._trained = state["gradient"]
        self._captured.restore(state["capture"])

    def _closure(
        self,
        selection: tuple[Tensor, ...],
        held: set[int],
        on_gradients: Callable[[Tensor], None] | None,
    ) -> Tensor:
        """Set the gradient of each parameter and return the loss.

        Args:
            selection: The rows of the minibatch.
            held: The ids of the parameters that this step does not train.
            on_gradients: See :meth:`step`.
        """
        for parameter in self.train_state.parameters:
            parameter.grad = None  # the next gradient reuses its memory from torch's cache
        if self._whole is not None and on_gradients is None and not self._validated:
            loss = self._whole(*self._batches.read(*selection))
            if loss is not None:
                return loss  # without gradients, the optimizer changes nothing
        gradient = self.gradient if self._validated else self._captured_gradient
        if self._shared is None:
            loss, *gradients = gradient(*selection)
        else:
            loss, *gradients = self._shared(gradient, selection)
        if self._in_turns:
            moving = [id(parameter) not in held for parameter in self.train_state.parameters]
            gradients = [g if m else None for g, m in zip(gradients, moving, strict=True)]
        if self._clip_norm is not None and not self._clips_within:
            gradients = clipped(gradients, self._clip_norm)
        for parameter, value in zip(self.train_state.parameters, gradients, strict=True):
            parameter.grad = value
        if on_gradients is not None:
            on_gradients(loss)
        elif self._hides_gradients:  # the loss is read in any case
            loss = loss.where(all_finite(gradients).to(loss.device), math.nan)
        return loss

    def _loss_and_gradients(self, *inputs: Tensor) -> list[Tensor | None]:
        """Compute the loss and the gradients. All results are tensors, so it can be captured."""
        with torch.enable_grad():
            loss = self._loss(self._batches.assemble(*inputs))
            gradients = gradients_of(loss, self.train_state.parameters)
        if self._clip_norm is not None and self._clips_within:
            gradients = clipped(gradients, self._clip_norm)
        return [loss.detach(), *gradients]

    def _loss(self, batch: Batch) -> Tensor:
        with DataScale(*self._pair) as data:
            loss = differentiable_loss(self._objective, *self._pair, *batch)
        return loss / (data.scale * batch[0].shape[0])

    def _takes(self, batch: Batch, objective: pyro.infer.ELBO | None) -> bool:
        with evaluation_mode(*self._pair):
            try:
                self._value(batch, objective)
            except ValueError:
                return False
        return True

    def _value(self, batch: Batch, objective: pyro.infer.ELBO | None = None) -> Tensor:
        with DataScale(*self._pair) as data:
            loss = loss_value(objective or self._objective, *self._pair, *batch)
        return _float64(loss, batch) / (data.scale * batch[0].shape[0])

    def _loss_and_elbo(
        self, batch: Batch, objective: pyro.infer.ELBO | None = None
    ) -> tuple[Tensor, Tensor]:
        with DataScale(*self._pair) as data:
            loss, elbo = loss_and_elbo(objective or self._objective, *self._pair, *batch)
        loss = _float64(loss, batch) / (data.scale * batch[0].shape[0])
        return loss, _float64(elbo, batch)

    def _new_capture(self) -> None:
        model, guide = self._pair
        objective, transform = self._objective, self._batches.transform
        watch = {"model": model, "guide": guide, "objective": objective, "transform": transform}
        self._captured = Captured(
            self._loss_and_gradients,
            watch=watch,
            name="the step of this fit",
            capture=self._capture,
        )
        self._whole = self._new_whole_step()
        self._trained = self._now_trained()

    def _now_trained(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self.train_state.parameters]

    def _new_whole_step(self) -> WholeStep | None:
        optimizer, parameters = self.train_state.optimizer, self.train_state.parameters
        if not has_graphs(self._batches.device) or type(optimizer) is not Adam:
            return None
        if self._shared is not None or self._in_turns:
            return None  # the gradients change between the two parts
        return WholeStep(self._captured, optimizer, parameters)


def _float64(value: Tensor | float, batch: Batch) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=batch[0].device)


def _held_in_turns(
    parameters: dict[str, list[Tensor]], alternation: Sequence[str]
) -> list[set[int]]:
    """Return the ids of the parameters that each step of one cycle does not train."""
    ids = {name: set(map(id, found)) for name, found in parameters.items()}
    held = {
        BOTH: set(),
        "model": ids["guide"] - ids["model"],
        "guide": ids["model"] - ids["guide"],
    }
    return [held[name] for name in alternation]
