"""The state that training changes, and the steps that change it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_vae import programs
from pyro_vae.minibatches import Batch, Minibatches
from pyro_vae.modules import modules
from pyro_vae.sites import data_frame
from pyro_vae.traces import Program


class Trainer:
    """Parameters, optimizer and scheduler of one fit.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        objective: what to maximise.
        parameters: of both programs, trained by one optimizer.
        learning_rate: of the default optimizer, Adam.
        optimizer: makes another from the parameters.
        scheduler: makes a learning rate scheduler from the optimizer.
        clip_norm: bound on the norm of the whole gradient.

    Raises:
        ValueError: there are no parameters.
        TypeError: what ``optimizer`` makes is no torch optimizer.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        objective: pyro.infer.ELBO,
        parameters: list[Tensor],
        *,
        learning_rate: float,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None,
        scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None,
        clip_norm: float | None,
    ):
        self._pair = (model, guide)
        self._objective = objective
        self._clip_norm = clip_norm
        self._parameters = parameters
        if not self._parameters:
            raise ValueError("model and guide have no parameters that require a gradient")
        if optimizer is None:
            self._optimizer = torch.optim.Adam(self._parameters, lr=learning_rate, fused=True)
        else:
            self._optimizer = optimizer(self._parameters)
            if not isinstance(self._optimizer, torch.optim.Optimizer):
                raise TypeError(
                    "optimizer must make a torch.optim.Optimizer from the parameters, such as "
                    f"functools.partial(torch.optim.SGD, lr=0.1); it made {self._optimizer!r}"
                )
        self._scheduler = None if scheduler is None else scheduler(self._optimizer)

    @property
    def learning_rate(self) -> float:
        """Of the first group of parameters."""
        return float(self._optimizer.param_groups[0]["lr"])

    def epoch(self, batches: Minibatches) -> float:
        """Take a step for each minibatch; return the loss per datum, averaged over the data."""
        total, count = 0.0, 0
        for batch in batches:
            loss = self._optimizer.step(functools.partial(self._loss_and_gradient, batch))
            size = batch[0].shape[0]
            total, count = total + loss.detach() * size, count + size
        return float(total / count)

    def evaluate(self, batches: Minibatches) -> float:
        """Return the loss per datum, averaged over the data."""
        total, count = 0.0, 0
        with programs.evaluation_mode(*self._pair):
            for batch in batches:
                size = batch[0].shape[0]
                total, count = total + self._loss(batch) * size, count + size
        return float(total / count)

    def end_epoch(self, loss: float) -> None:
        """Step the scheduler, and take up parameters that the programs made since they began."""
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(loss)
        elif self._scheduler is not None:
            self._scheduler.step()
        known = set(map(id, self._parameters))
        registered = [p for _, p in pyro.get_param_store().named_parameters()]
        if new := [p for p in registered if p.requires_grad and id(p) not in known]:
            self._optimizer.add_param_group({"params": new})
            self._parameters += new

    def state(self) -> list[Tensor]:
        """Copy parameters and buffers."""
        return [tensor.detach().clone() for tensor in self._tensors()]

    def restore(self, state: list[Tensor]) -> None:
        """Put back what :meth:`state` copied."""
        with torch.no_grad():
            for tensor, saved in zip(self._tensors(), state, strict=False):
                tensor.copy_(saved)

    def _tensors(self) -> list[Tensor]:
        buffers = [b for module in modules(*self._pair) for b in module.buffers()]
        return [*buffers, *self._parameters]

    def _loss_and_gradient(self, batch: Batch) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(batch)
        loss.backward()
        if self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        return loss

    def _loss(self, batch: Batch) -> Tensor:
        with _DataScale() as data:
            loss = self._objective.differentiable_loss(*self._pair, *batch)
        return loss / (data.scale * batch[0].shape[0])


class _DataScale(Messenger):
    """Notes for how many data points a row stands, N/B, by which every objective scales."""

    scale = 1.0

    def _pyro_post_sample(self, msg) -> None:
        frame = data_frame(msg)
        if frame is not None and frame.full_size is not None:
            self.scale = frame.full_size / frame.size
