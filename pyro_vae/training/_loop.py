"""The epochs of a fit: a run that can be stopped, resumed, and gone back to its last good step.

The steps are taken in stretches. Before each, all that it depends on is copied; after it, its
losses are read. Where one is not finite, the run goes back and takes the steps of the stretch once
more, with a look at every gradient: so a watch on all of them costs no step anything.
"""

from __future__ import annotations

import itertools
import math
import numbers
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pyro_vae._utils.distributed import (
    broadcast_from_first,
    gather_all,
    num_processes,
    rank,
    sum_over_processes,
)
from pyro_vae._utils.random import random_state, seeded, set_random_state
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._minibatches import Minibatches
from pyro_vae.serialization._contents import Description
from pyro_vae.serialization._dataframes import dataframe_to_dict, dict_to_dataframe
from pyro_vae.training._checked_step import (
    NonFiniteStepError,
    checked_step,
    first_site,
)
from pyro_vae.training._checkpoints import Checkpoint, Checkpoints
from pyro_vae.training._gradients import all_finite
from pyro_vae.training._minibatch_sizes import repeated, smaller_minibatch
from pyro_vae.training._nonfinite import NonFiniteError
from pyro_vae.training._step import TrainStep
from pyro_vae.training._validation import Validation

AfterEpoch = Callable[[int], Mapping[str, float] | None]
STEPS_OF_A_STRETCH = 200
STEPS_OF_A_STREAM = 20
STEPS_BETWEEN_QUESTIONS = 10  # of processes to each other
COLUMNS = ["epoch", "loss", "validation_loss", "learning_rate", "skipped", "seconds"]
SCHEDULED = "validation_loss_scheduled"


@dataclass
class LoopState:
    """Where a run stands: what of it is neither tensor nor random number.

    Args:
        epoch: the one at hand, from 1.
        step: how many of its steps are done.
        rows: how many data these had, and ``total``, the sum of their losses.
        skipped: how many of these steps were, and ``skipped_in_all``, how many in the run.
        seconds: how long they took.
        history: of the epochs before.
        best_loss: the lowest validation loss so far, of the epoch ``best_epoch``, and the epochs
            without a gain since then. Where a schedule has settled, of the epochs since then.
        settled: whether every schedule of the objective has reached its last value.
        validation_seed: of the noise of every validation.
    """

    validation_seed: int
    epoch: int = 1
    step: int = 0
    rows: int = 0
    total: float = 0.0
    skipped: int = 0
    skipped_in_all: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_loss: float = math.inf
    best_epoch: int = 0
    epochs_without_gain: int = 0
    settled: bool = False


class _Stopped(Exception):  # noqa: N818 - not an error
    """The loop was asked to stop, and stops at the end of a step."""


@dataclass
class TrainingLoop:
    """A fit at work.

    Args:
        trainer: what takes the steps.
        batches: the training data.
        validation: on data that are held out, or None.
        epochs: how many there shall be.
        patience: see :func:`pyro_vae.fit`.
        checkpoints: where to write them, or None.
        settings: what a checkpoint must agree with, to be gone on from.
        skip_limit: The number of steps with a NaN or an infinity that may be skipped, 0 for none.
        after_epoch: see :func:`pyro_vae.fit`.
        advance: of the progress bar.
        interrupted: whether the run shall stop.
        order: of the first pass, which has been begun.
    """

    trainer: TrainStep
    batches: Minibatches
    validation: Validation | None
    epochs: int
    patience: int | None
    checkpoints: Checkpoints | None
    settings: Mapping[str, Any]
    skip_limit: int
    after_epoch: AfterEpoch | None
    advance: Callable[..., None]
    interrupted: Callable[[], bool]
    order: list[Tensor]

    def __post_init__(self):
        seed = broadcast_from_first(torch.randint(2**62, ()))
        self.position = LoopState(validation_seed=seed.item())
        self.device = self.batches.device
        self._trained = self.trainer.train_state
        self._description = Description(*self._trained.pair)
        self._best: dict[str, Tensor] | None = None
        self._good: dict[str, Any] = {}
        self._resumed_at: Mapping[str, Tensor] | None = None
        self._shall_stop = self._shall_write = False
        self._most_rows = 0
        self._steps_per_epoch = self.batches.num_batches
        self._needs_validation = not self.batches.values_checked  # by Pyro, in the first epoch

    @property
    def history(self) -> pd.DataFrame:
        """Of the epochs that are done, each a row."""
        rows = self.position.history
        return pd.DataFrame(rows, columns=None if rows else COLUMNS)

    def go_on_from(self, checkpoint: Mapping[str, Any]) -> None:
        """Stand where a checkpoint was written; its pass over the data has been begun."""
        self.trainer.go_on_from(checkpoint["trainer"])
        self._description.go_on_from(checkpoint["pair"])
        history = dict_to_dataframe(checkpoint["history"]).to_dict("records")
        self.position = LoopState(**checkpoint["position"] | {"history": history})
        self.order = checkpoint["order"]
        self._best = checkpoint["best"]
        self._steps_per_epoch = checkpoint["steps_per_epoch"]
        self._resumed_at = self._own(checkpoint["processes"])

    @property
    def best_epoch(self) -> int:
        """The epoch, from 1, whose parameters the pair holds after :meth:`train`."""
        history = self.history.set_index("epoch")
        if self.patience is None or not len(history):
            return len(history)
        # An older checkpoint does not hold the best epoch.
        return int(self.position.best_epoch or history["validation_loss"].idxmin())

    def train(self) -> bool:
        """Run to the end of the last epoch, or until patience is out.

        Returns:
            False if the run was interrupted. The state is then that at the end of a step, and is
            written if possible.

        Raises:
            NonFiniteError: See :func:`pyro_vae.fit`. The state is that before the step.
        """
        self.advance(len(self.position.history))
        if self._resumed_at is None:
            self._trained.agree()
            self._note()  # what cannot be written, or where, is better known now
        try:
            while self.position.epoch <= self.epochs and not self._is_out_of_patience():
                self._epoch()
                self._pause()
            if self._resumed_at is None:  # else nothing was left to do
                self._note()
        except KeyboardInterrupt:
            self._go_back(self._good)
            # Other processes may be anywhere; and what was not begun is written already.
            if num_processes() == 1 and self._resumed_at is None:
                self._note()
            return False
        except _Stopped:
            self._note()
            return False
        finally:
            if self._best is not None:
                self._trained.set_values(self._best)
        return True

    def _is_out_of_patience(self) -> bool:
        return self.patience is not None and self.position.epochs_without_gain >= self.patience

    def _epoch(self) -> None:
        learning_rate = self._trained.learning_rate
        validated = self._needs_validation and self.position.epoch == 1
        with values_checked(validated):
            self._pass(validated)
        began = time.perf_counter()
        validation_loss = self._validation_loss()
        scheduled = self._scheduled_validation_loss()
        position = self.position
        loss = position.total / position.rows if position.rows else math.nan
        self.trainer.end_epoch(loss if self.validation is None else validation_loss)
        seconds = position.seconds + time.perf_counter() - began
        values = [position.epoch, loss, validation_loss, learning_rate, position.skipped, seconds]
        row = dict(zip(COLUMNS, values, strict=True)) | scheduled
        position.history.append(row | self._after_epoch())
        shown = f"loss {loss:.2f}"
        if self.validation is not None:
            shown += f", validation {validation_loss:.2f}"
        self.advance(1, shown)
        if self.patience is not None:
            was_settled = position.settled
            position.settled = was_settled or self.validation.has_settled()
            if validation_loss < position.best_loss or position.settled > was_settled:
                position.best_loss, position.best_epoch = validation_loss, position.epoch
                position.epochs_without_gain = 0
                self._best = self._trained.values()
            elif position.settled:
                position.epochs_without_gain += 1
        self._trained.agree()
        self.order = self.batches.order()
        self._steps_per_epoch = position.step
        position.epoch += 1
        position.step = position.rows = position.skipped = 0
        position.total = position.seconds = 0.0
        self._good = self._state()

    def _validation_loss(self) -> float:
        if self.validation is None:
            return math.nan
        position = self.position
        return self.validation.loss(position.epoch, position.validation_seed, self.interrupted)

    def _scheduled_validation_loss(self) -> dict[str, float]:
        """Return the validation loss at the schedules' values of now, if there are schedules."""
        if self.validation is None or not self.validation.has_schedules:
            return {}
        seed = self.position.validation_seed
        return {SCHEDULED: self.validation.loss_of_training(seed, self.interrupted)}

    def _after_epoch(self) -> dict[str, float]:
        if self.after_epoch is None:
            return {}
        with seeded(self.position.validation_seed):
            found = self.after_epoch(self.position.epoch)
        found = {} if found is None else found
        if not isinstance(found, Mapping) or not all(
            isinstance(n, str) and isinstance(v, numbers.Real) for n, v in found.items()
        ):
            raise TypeError(f"after_epoch must return numbers by name, or None; it gave {found!r}")
        if taken := found.keys() & {*COLUMNS, SCHEDULED}:
            raise ValueError(f"after_epoch must not return {sorted(taken)}: the history has these")
        return {name: float(value) for name, value in found.items()}

    def _pass(self, validated: bool) -> None:
        """Take the steps of an epoch, or those that are left of it."""
        began, start = time.perf_counter(), self.position.step
        if start == 0:
            self.trainer.recheck()
        per_epoch, epochs = self._steps_per_epoch, self.epochs - self.position.epoch + 1
        steps = None if per_epoch is None else epochs * per_epoch - start
        self.trainer.begin(steps, validated=validated)
        selections = self.batches.selections(start)
        if self._resumed_at is not None:
            set_random_state(self._resumed_at, self.device)
            self._resumed_at = None
        while self._stretch(selections, validated):
            now = time.perf_counter()
            self.position.seconds += now - began
            began = now
            self._pause()

    def _stretch(self, selections: Iterator[tuple[Tensor, ...]], validated: bool) -> int:
        """Take some steps, and see that all is finite; return how many there were."""
        self._good = self._state()
        taken: list[tuple[Tensor, ...]] = []
        losses: list[Tensor] = []
        # Minibatches of a stream are kept until it is over.
        length = STEPS_OF_A_STRETCH if self.batches.tensors is not None else STEPS_OF_A_STREAM
        for selection in itertools.islice(selections, length):
            taken.append(selection)
            self._most_rows = max(self._most_rows, len(selection[0]))
            try:
                losses.append(self.trainer.step(selection))
            except ValueError:  # by Pyro's validation, perhaps, of what is not finite
                losses.append(torch.tensor(math.nan))
                break
            except RuntimeError as error:
                self._refuse_smaller(selection, error)
                raise
            if validated and not losses[-1].isfinite():  # another process may have seen an error
                break
            if self._ends_here(len(taken)):
                break
        if not taken:
            return 0
        read = torch.stack(losses).tolist()  # nothing was read before
        if all(map(math.isfinite, read)) and all_finite(self._trained.parameters):
            for selection, loss in zip(taken, read, strict=True):
                self._count(selection, loss)
        else:
            self._go_back(self._good)
            for selection in taken:
                self._careful_step(selection)
        return len(taken)

    def _refuse_smaller(self, selection: tuple[Tensor, ...], error: Exception) -> None:
        """Tell an error that only the small number of rows can have caused, as of the last ones.

        Raises:
            ValueError: the same rows, repeated to the usual number, make no error.
        """
        size, usual = len(selection[0]), self._most_rows
        if size >= usual or num_processes() > 1:
            return
        try:
            self.trainer.run(repeated(selection, usual))
        except (ValueError, RuntimeError):
            return
        self._go_back(self._good)
        raise smaller_minibatch(error, size, usual) from error

    def _pause(self) -> None:
        """Write a checkpoint if it is due, and stop if somebody asked for it."""
        self._ends_here(0)
        self._note(if_due=True)
        if self._shall_stop:
            raise _Stopped

    def _ends_here(self, steps: int) -> bool:
        """Whether to end a stretch after so many steps: to stop, or to write a checkpoint.

        All processes do it at once; they ask each other every few steps.
        """
        if num_processes() > 1 and steps % STEPS_BETWEEN_QUESTIONS:
            return False
        due = self.checkpoints is not None and self.checkpoints.due
        self._shall_stop, self._shall_write = self.interrupted(), due and rank() == 0
        if num_processes() > 1:
            wishes = torch.tensor([self._shall_stop, self._shall_write], dtype=torch.int64)
            sum_over_processes([wishes])
            self._shall_stop, self._shall_write = wishes.bool().tolist()
        return self._shall_stop or self._shall_write

    def _count(self, selection: tuple[Tensor, ...], loss: float) -> None:
        size = selection[0].shape[0] * (num_processes() if self.batches.is_sharded else 1)
        self.position.step += 1
        self.position.rows += size
        self.position.total += loss * size

    def _careful_step(self, selection: tuple[Tensor, ...]) -> None:
        before = self._state()
        try:
            loss = checked_step(self.trainer, selection, self.device)
        except NonFiniteStepError as trouble:
            self.trainer.set_state(before["trainer"])
            if self.position.skipped_in_all >= self.skip_limit:
                raise self._told(trouble, before, selection) from None
            self.trainer.steps += 1
            self.position.step += 1
            self.position.skipped += 1
            self.position.skipped_in_all += 1
            return
        except ValueError as error:
            self._refuse_smaller(selection, error)
            raise
        self._count(selection, loss.item())

    def _told(
        self, trouble: NonFiniteStepError, before: Mapping[str, Any], selection: tuple[Tensor, ...]
    ) -> NonFiniteError:
        """Make the error, and the folder that it can be met again from."""
        self._go_back(before)
        site = first_site(self.trainer, selection).of_all(self.trainer.row_offset(selection))
        self._go_back(before)
        what = trouble.what if site.name is None else f"{trouble.what}: {site.what}"
        if self.skip_limit:
            what = f"{self.skip_limit} steps were skipped, and again {what}"
        return NonFiniteError(
            what,
            epoch=self.position.epoch,
            step=self.position.step + 1,
            site=site.name,
            parameter=trouble.parameter,
            rows=selection[0].cpu() if self.batches.tensors is not None else None,
            bad=site.bad,
            folder=self._written_down(selection),
        )

    def _written_down(self, selection: tuple[Tensor, ...]) -> Path | None:
        """Write a checkpoint just before a step, and its minibatch; return the folder."""
        try:
            content = {**self._to_write(), "minibatch": list(self.trainer.minibatch(selection))}
            if self.checkpoints is None:
                folder = Path(tempfile.mkdtemp(prefix="pyro_vae-"))
            else:
                folder = self.checkpoints.folder / "nonfinite"
            settings = Checkpoint(folder, seconds=0.0, keep=1)
            Checkpoints(settings).write(lambda: content, self.trainer.steps)
        except (OSError, TypeError, ValueError):
            return None  # the error that is to be told is another
        return folder

    def _state(self, *, to_write: bool = False) -> dict[str, Any]:
        return {
            "position": replace(self.position, history=[*self.position.history]),
            "trainer": self.trainer.state(to_write=to_write),
            "random": random_state(self.device),
            "order": self.order,
            "best": self._best,
        }

    def _to_write(self) -> dict[str, Any]:
        return {
            **self._state(to_write=True),
            "position": asdict(replace(self.position, history=[])),
            "history": dataframe_to_dict(self.history),
            "processes": self._of_processes(),
            "steps_per_epoch": self._steps_per_epoch,
            "settings": dict(self.settings),
            "pair": self._description(),
        }

    def _go_back(self, state: Mapping[str, Any]) -> None:
        if not state:
            return
        self.trainer.set_state(state["trainer"])
        self.position = replace(state["position"], history=[*state["position"].history])
        set_random_state(state["random"], self.device)
        self.order = state["order"]
        self._best = state["best"]
        if self.position.step == 0:
            self.trainer.recheck()

    def _note(self, *, if_due: bool = False) -> None:
        if self.checkpoints is not None and (self._shall_write or not if_due):
            self.checkpoints.write(self._to_write, self.trainer.steps)
            self._shall_write = False

    def _of_processes(self) -> list[dict[str, Any]]:
        """Return what each process has its own: random numbers, and running averages."""
        mine = {**random_state(self.device), **self._trained.buffers()}
        shares = gather_all([tensor.detach().cpu() for tensor in mine.values()])
        return [dict(zip(mine, share, strict=True)) for share in shares]

    def _own(self, shares: list[dict[str, Tensor]]) -> Mapping[str, Tensor] | None:
        """Take up what was this process's own, if there were as many."""
        if len(shares) != num_processes():
            warnings.warn(
                f"the checkpoint is of {len(shares)} processes, here are {num_processes()}: the "
                "run goes on with other noise",
                stacklevel=2,
            )
            return random_state(self.device)
        mine = shares[rank()]
        self._trained.set_values({name: mine[name] for name in self._trained.buffers()})
        return mine
