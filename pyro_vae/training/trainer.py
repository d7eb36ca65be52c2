"""The state that training changes, and the steps that change it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_vae import programs
from pyro_vae.capture import Capture, Captured
from pyro_vae.minibatches import Batch, Minibatches
from pyro_vae.modules import modules
from pyro_vae.sites import data_frame
from pyro_vae.traces import Program
from pyro_vae.training.adam import Adam

BOTH = "model and guide"


class Trainer:
    """Parameters, optimizer and scheduler of one fit, and its step, captured or not.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        objective: what to maximise.
        batches: the training data.
        parameters: of ``"model"`` and of ``"guide"``, trained by one optimizer.
        learning_rate: of the default optimizer, Adam; or one for each of the two.
        optimizer: makes another from the parameters.
        scheduler: makes a learning rate scheduler from the optimizer.
        clip_norm: bound on the norm of the whole gradient.
        alternation: whose parameters each step moves, over and over.
        capture: whether to capture the step.

    Raises:
        ValueError: there are no parameters.
        TypeError: what ``optimizer`` makes is no torch optimizer.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        objective: pyro.infer.ELBO,
        batches: Minibatches,
        parameters: dict[str, list[Tensor]],
        *,
        learning_rate: float | Mapping[str, float] = 1e-3,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
        clip_norm: float | None = None,
        alternation: Sequence[str] = (BOTH,),
        capture: Capture = "auto",
    ):
        self._pair = (model, guide)
        self._objective = objective
        self._batches = batches
        self._clip_norm = clip_norm
        self._parameters = list(dict.fromkeys(itertools.chain(*parameters.values())))
        if not self._parameters:
            raise ValueError("model and guide have no parameters that require a gradient")
        self._turns = _turns(parameters, alternation)
        self._in_turns = len(set(alternation)) > 1
        if optimizer is None:
            rate = learning_rate["model"] if isinstance(learning_rate, Mapping) else learning_rate
            self._optimizer = Adam(_groups(parameters, learning_rate), lr=rate)
        else:
            self._optimizer = optimizer(self._parameters)
            if not isinstance(self._optimizer, torch.optim.Optimizer):
                raise TypeError(
                    "optimizer must make a torch.optim.Optimizer from the parameters, such as "
                    f"functools.partial(torch.optim.SGD, lr=0.1); it made {self._optimizer!r}"
                )
        self._scheduler = None if scheduler is None else scheduler(self._optimizer)
        self._steps_per_epoch = batches.num_batches
        self._advance = getattr(objective, "advance", lambda: None)  # Pyro's own count nothing
        self._capture = capture
        self._gradient = self._capturable_gradient()

    @property
    def learning_rate(self) -> float:
        """Of the first group of parameters."""
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def execution(self) -> str:
        """How the steps run now; see :class:`pyro_vae.capture.Captured`."""
        return self._gradient.execution

    def epoch(self, epochs_left: int = 1, *, validated: bool = False) -> float:
        """Take a step for each minibatch; return the loss per datum, averaged over the data.

        Args:
            epochs_left: this one and those to come.
            validated: whether Pyro validates values, which only Python can.
        """
        self._gradient.recheck()
        self._gradient.calls_left = self._steps_per_epoch and self._steps_per_epoch * epochs_left
        gradient = self._loss_and_gradients if validated else self._gradient
        losses, sizes = [], []
        for selection in self._batches.selections():
            held = next(self._turns)
            closure = functools.partial(self._closure, gradient, selection, held)
            loss = self._optimizer.step(closure)
            self._advance()
            sizes.append(selection[0].shape[0])
            losses.append(loss.detach() * sizes[-1])  # nothing is read before the epoch's end
        self._steps_per_epoch = len(sizes)
        return (torch.stack(losses).sum() / sum(sizes)).item()

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
            self._gradient = self._capturable_gradient()

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

    def _closure(self, gradient: Callable, selection: tuple[Tensor, ...], held: set[int]) -> Tensor:
        """Leave the gradients where the optimizer looks for them; return the loss.

        Args:
            gradient: of a selection.
            selection: of the data.
            held: ids of the parameters that shall stay where they are.
        """
        for parameter in self._parameters:
            parameter.grad = None  # its memory, still in the cache, serves the next gradient
        loss, *gradients = gradient(*selection)
        if self._in_turns:
            moving = [id(parameter) not in held for parameter in self._parameters]
            gradients = [g if m else None for g, m in zip(gradients, moving, strict=True)]
            if self._clip_norm is not None:
                gradients = _clipped(gradients, self._clip_norm)
        for parameter, value in zip(self._parameters, gradients, strict=True):
            parameter.grad = value
        return loss

    def _loss_and_gradients(self, *selection: Tensor) -> list[Tensor | None]:
        """The whole step but the optimizer's part: of tensors alone, so that it can be captured."""
        with torch.enable_grad():
            loss = self._loss(self._batches.prepare(*selection))
            gradients = _gradients(loss, self._parameters)
        if self._clip_norm is not None and not self._in_turns:
            gradients = _clipped(gradients, self._clip_norm)
        return [loss.detach(), *gradients]

    def _loss(self, batch: Batch) -> Tensor:
        with _DataScale() as data:
            loss = self._objective.differentiable_loss(*self._pair, *batch)
        return loss / (data.scale * batch[0].shape[0])

    def _capturable_gradient(self) -> Captured:
        model, guide = self._pair
        objective, transform = self._objective, self._batches.transform
        watch = {"model": model, "guide": guide, "objective": objective, "transform": transform}
        return Captured(
            self._loss_and_gradients,
            watch=watch,
            name="the step of this fit",
            capture=self._capture,
        )


def _groups(
    parameters: dict[str, list[Tensor]], learning_rate: float | Mapping[str, float]
) -> list[dict[str, Any]]:
    """Make the optimizer's groups: one, or one for each program; what both use is the model's."""
    if not isinstance(learning_rate, Mapping):
        both = dict.fromkeys(itertools.chain(*parameters.values()))
        return [{"params": list(both), "lr": learning_rate}]
    shared = set(map(id, parameters["model"]))
    groups = {**parameters, "guide": [p for p in parameters["guide"] if id(p) not in shared]}
    return [{"params": found, "lr": learning_rate[name]} for name, found in groups.items() if found]


def _turns(parameters: dict[str, list[Tensor]], alternation: Sequence[str]) -> Iterator[set[int]]:
    """Yield, step by step and for ever, which parameters do not move."""
    ids = {name: set(map(id, found)) for name, found in parameters.items()}
    held = {
        BOTH: set(),
        "model": ids["guide"] - ids["model"],
        "guide": ids["model"] - ids["guide"],
    }
    return itertools.cycle([held[name] for name in alternation])


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Differentiate, as ``backward`` does: frozen parameters have None, the others their layout."""
    trained = [p for p in parameters if p.requires_grad]
    found = iter(torch.autograd.grad(loss, trained, allow_unused=True))
    gradients = [next(found) if p.requires_grad else None for p in parameters]
    return [
        None if g is None else _laid_out_like(p, g)
        for g, p in zip(gradients, parameters, strict=True)
    ]


def _laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Fused optimizers take it for granted that the two lie alike in memory."""
    if gradient.layout != torch.strided or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _clipped(gradients: Sequence[Tensor | None], bound: float) -> list[Tensor | None]:
    """Scale the whole gradient to a norm of at most ``bound`` (Pascanu et al. 2013, alg. 1)."""
    norms = [torch.linalg.vector_norm(g) for g in gradients if g is not None]
    scale = (bound / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
    return [None if g is None else g * scale for g in gradients]


class _DataScale(Messenger):
    """Notes for how many data points a row stands, N/B, by which every objective scales."""

    scale = 1.0

    def _pyro_post_sample(self, msg) -> None:
        frame = data_frame(msg)
        if frame is not None and frame.full_size is not None:
            self.scale = frame.full_size / frame.size
