"""The state that training changes, and the steps that change it."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from pyro_vae.processes import broadcast_from_first, num_processes, rank, sum_over_processes
from pyro_vae.reach import reach
from pyro_vae.sites import data_frame
from pyro_vae.state import constraints_of_bare_parameters, make_bare_parameters
from pyro_vae.state import state as tensors_of_pair
from pyro_vae.traces import Program
from pyro_vae.training.adam import Adam
from pyro_vae.training.sharing import SharedGradient, share_of

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
        self._alternation = _held_in_turns(parameters, alternation)
        self._in_turns = len(set(alternation)) > 1
        self._shared = None
        if num_processes() > 1:
            self._shared = SharedGradient(self._parameters, is_share=batches.is_share)
        # The norm is that of what moves, of the whole minibatch.
        self._clips_within = self._shared is None and not self._in_turns
        if optimizer is None:
            rate = learning_rate["model"] if isinstance(learning_rate, Mapping) else learning_rate
            self._optimizer = Adam(_groups(parameters, learning_rate), lr=rate)
        else:
            if not callable(optimizer):
                raise TypeError(f"optimizer must make one from the parameters, got {optimizer!r}")
            self._optimizer = optimizer(self._parameters)
            if not isinstance(self._optimizer, torch.optim.Optimizer):
                raise TypeError(
                    "optimizer must make a torch.optim.Optimizer from the parameters, such as "
                    f"functools.partial(torch.optim.SGD, lr=0.1); it made {self._optimizer!r}"
                )
        if scheduler is not None and not callable(scheduler):
            raise TypeError(f"scheduler must make one from the optimizer, got {scheduler!r}")
        self._scheduler = None if scheduler is None else scheduler(self._optimizer)
        self.steps = 0
        self._advance = getattr(objective, "advance", lambda: None)  # Pyro's own count nothing
        self._capture = capture
        self._gradient = self._capturable_gradient()
        self._named = self._named_tensors()

    @property
    def learning_rate(self) -> float:
        """Of the first group of parameters."""
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def execution(self) -> str:
        """How the steps run now; see :class:`pyro_vae.capture.Captured`."""
        return self._gradient.execution

    @property
    def parameters(self) -> dict[str, Tensor]:
        """What is trained, by name."""
        trained = set(map(id, self._parameters))
        return {name: tensor for name, tensor in self._named.items() if id(tensor) in trained}

    @property
    def gradients(self) -> dict[str, Tensor | None]:
        """The gradients of the last step, by name."""
        return {name: parameter.grad for name, parameter in self.parameters.items()}

    def begin(self, steps: int | None, *, validated: bool = False) -> None:
        """Get ready for steps of one epoch.

        Args:
            steps: how many are to come until the end of the fit, None if that is not known.
            validated: whether Pyro validates values in these, which only Python can.
        """
        self._gradient.calls_left = steps
        self._step_gradient = self._loss_and_gradients if validated else self._gradient

    def recheck(self) -> None:
        """Have the next step look whether a capture still stands for the programs."""
        self._gradient.recheck()

    def step(
        self, selection: tuple[Tensor, ...], look: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """Take a step; return the loss per datum before it, on its device.

        Args:
            selection: of the data.
            look: called with the loss when the gradients are there, and nothing has moved yet.
        """
        held = self._alternation[self.steps % len(self._alternation)]
        loss = self._optimizer.step(functools.partial(self._closure, selection, held, look))
        self._advance()
        self.steps += 1
        return loss.detach()

    def evaluate(self, batches: Minibatches, interrupted: Callable[[], bool]) -> float:
        """Return the loss per datum, averaged over the data.

        Raises:
            KeyboardInterrupt: it was interrupted.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=batches.device)
        with programs.evaluation_mode(*self._pair):
            for batch in batches:
                mine = batch if batches.is_share else share_of(batch)
                if size := len(mine[0]):
                    sums += torch.stack([self._loss(mine) * size, torch.full_like(sums[0], size)])
                if interrupted():
                    raise KeyboardInterrupt
        sum_over_processes([sums])
        total, count = sums.tolist()
        return total / count

    def minibatch(self, selection: tuple[Tensor, ...]) -> Batch:
        """Return a minibatch as a step would see it."""
        return self._batches.prepare(*selection)

    @torch.no_grad()
    def run(self, selection: tuple[Tensor, ...]) -> None:
        """Run the pair as a step does, through Python, for handlers that look on."""
        mine = selection if self._batches.is_share else share_of(selection)
        if len(mine[0]):
            self._loss(self.minibatch(mine))

    def rows_before(self, selection: tuple[Tensor, ...]) -> int:
        """Return how many rows of a minibatch are those of processes before this one."""
        if self._batches.is_share:
            return 0
        shares = selection[0].tensor_split(num_processes())
        return sum(len(share) for share in shares[: rank()])

    @property
    def error(self) -> ValueError | None:
        """Of the last step, in one process of several: the others saw a loss that is NaN."""
        return None if self._shared is None else self._shared.error

    def agree(self) -> None:
        """Have all processes hold what the first one does: parameters, buffers, the objective's."""
        if self._shared is not None:
            for tensor in (*self._named.values(), *self._tensors_of_objective().values()):
                broadcast_from_first(tensor)

    def buffers(self) -> dict[str, Tensor]:
        """Return what is not trained, as it is: each process has its own running averages."""
        trained = set(map(id, self._parameters))
        return {name: tensor for name, tensor in self._named.items() if id(tensor) not in trained}

    def end_epoch(self, loss: float) -> None:
        """Step the scheduler, and take up parameters that the programs made since they began."""
        if isinstance(self._scheduler, ReduceLROnPlateau):
            if math.isfinite(loss):  # NaN, where every step was skipped
                self._scheduler.step(loss)
        elif self._scheduler is not None:
            self._scheduler.step()
        known = set(map(id, self._parameters))
        registered = [p for _, p in pyro.get_param_store().named_parameters()]
        if new := [p for p in registered if p.requires_grad and id(p) not in known]:
            self._train_too(new)
        self._named = self._named_tensors()

    def values(self) -> dict[str, Tensor]:
        """Copy parameters and buffers, by name."""
        return {name: tensor.detach().clone() for name, tensor in self._named.items()}

    def set_values(self, values: Mapping[str, Tensor]) -> None:
        """Give parameters and buffers the values that :meth:`values` copied."""
        with torch.no_grad():
            for name, value in values.items():
                self._named[name].copy_(value)

    def state(self, *, to_write: bool = False) -> dict[str, Any]:
        """Copy all that the next step depends on, but random numbers.

        Args:
            to_write: for another process: with what this one has without a copy.
        """
        if to_write:
            self._named = self._named_tensors()
        state = {
            "steps": self.steps,
            "tensors": self.values(),
            "objective": {n: t.clone() for n, t in self._tensors_of_objective().items()},
            "optimizer": _copied(self._optimizer.state_dict()),
            "scheduler": None if self._scheduler is None else _copied(self._scheduler.state_dict()),
        }
        if to_write:
            names = {id(tensor): name for name, tensor in self._named.items()}
            groups = self._optimizer.param_groups
            if any(id(p) not in names for group in groups for p in group["params"]):
                raise ValueError("the optimizer has parameters that are not the pair's")
            state["kinds"] = self._kinds()
            state["groups"] = [[names[id(p)] for p in group["params"]] for group in groups]
            state["constraints"] = constraints_of_bare_parameters()
            state["capture"] = self._gradient.state()
        return state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state` copied, in this process."""
        self.steps = state["steps"]
        self.set_values(state["tensors"])
        with torch.no_grad():
            for name, tensor in self._tensors_of_objective().items():
                tensor.copy_(state["objective"][name])
        self._optimizer.load_state_dict(_copied(state["optimizer"]))
        self._undo_casts(state["optimizer"]["state"])
        if self._scheduler is not None:
            live = self._scheduler.state_dict()
            self._scheduler.load_state_dict(_like(live, _copied(state["scheduler"])))

    def go_on_from(self, state: Mapping[str, Any]) -> None:
        """Put in place what :meth:`state` gave to write, in a run that has not begun.

        Raises:
            ValueError: it is that of another pair, objective, optimizer or scheduler.
        """
        make_bare_parameters(state["constraints"], state["tensors"])
        self._named = self._named_tensors()
        _require_same("tensors of the pair", _shapes(state["tensors"]), _shapes(self._named))
        of_objective = _shapes(self._tensors_of_objective())
        _require_same("tensors of the objective", _shapes(state["objective"]), of_objective)
        names = {id(tensor): name for name, tensor in self._named.items()}
        groups = [[names[id(p)] for p in g["params"]] for g in self._optimizer.param_groups]
        later = state["groups"][len(groups) :]
        for group in later:
            self._train_too([self._named[name] for name in group])
        _require_same("groups of parameters", state["groups"], groups + later)
        _require_same("optimizer and scheduler", state["kinds"], self._kinds())
        self.set_state(state)
        self._gradient.go_on_from(state["capture"])

    def _undo_casts(self, saved: Mapping[int, Mapping[str, Any]]) -> None:
        """Give the optimizer's state the types that it had: torch makes them the parameters'."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for number, values in saved.items():
            live = self._optimizer.state[parameters[number]]
            for name, value in values.items():
                if isinstance(value, Tensor) and live[name].dtype != value.dtype:
                    live[name] = value.clone().to(live[name].device)

    def _kinds(self) -> list[str]:
        return [type(each).__qualname__ for each in (self._optimizer, self._scheduler)]

    def _train_too(self, parameters: list[Tensor]) -> None:
        self._optimizer.add_param_group({"params": parameters})
        self._parameters += parameters  # in place: others hold this list
        self._gradient = self._capturable_gradient()

    def _named_tensors(self) -> dict[str, Tensor]:
        named = tensors_of_pair(*self._pair)
        known = set(map(id, named.values()))
        unnamed = [p for p in self._parameters if id(p) not in known]  # reached by no name
        return named | {f"parameter {i}": p for i, p in enumerate(unnamed)}

    def _tensors_of_objective(self) -> dict[str, Tensor]:
        """What it counts or remembers, and modules of the transform; they may have met the pair."""
        of_pair = set(map(id, self._named.values()))
        found = [pair for pair in reach(objective=self._objective) if isinstance(pair[1], Tensor)]
        for number, module in enumerate(modules(self._batches.transform)):
            found += [(f"transform {number}.{n}", t) for n, t in module.state_dict().items()]
        return {name: tensor for name, tensor in found if id(tensor) not in of_pair}

    def _closure(
        self,
        selection: tuple[Tensor, ...],
        held: set[int],
        look: Callable[[Tensor], None] | None,
    ) -> Tensor:
        """Leave the gradients where the optimizer looks for them; return the loss.

        Args:
            selection: of the data.
            held: ids of the parameters that shall stay where they are.
            look: see :meth:`step`.
        """
        for parameter in self._parameters:
            parameter.grad = None  # its memory, still in the cache, serves the next gradient
        if self._shared is None:
            loss, *gradients = self._step_gradient(*selection)
        else:
            loss, *gradients = self._shared(self._step_gradient, selection)
        if self._in_turns:
            moving = [id(parameter) not in held for parameter in self._parameters]
            gradients = [g if m else None for g, m in zip(gradients, moving, strict=True)]
        if self._clip_norm is not None and not self._clips_within:
            gradients = _clipped(gradients, self._clip_norm)
        for parameter, value in zip(self._parameters, gradients, strict=True):
            parameter.grad = value
        if look is not None:
            look(loss)
        return loss

    def _loss_and_gradients(self, *selection: Tensor) -> list[Tensor | None]:
        """The whole step but the optimizer's part: of tensors alone, so that it can be captured."""
        with torch.enable_grad():
            loss = self._loss(self._batches.prepare(*selection))
            gradients = _gradients(loss, self._parameters)
        if self._clip_norm is not None and self._clips_within:
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


def _held_in_turns(
    parameters: dict[str, list[Tensor]], alternation: Sequence[str]
) -> list[set[int]]:
    """Return, for each step of one cycle, which parameters do not move."""
    ids = {name: set(map(id, found)) for name, found in parameters.items()}
    held = {
        BOTH: set(),
        "model": ids["guide"] - ids["model"],
        "guide": ids["model"] - ids["guide"],
    }
    return [held[name] for name in alternation]


def _copied(state: Any) -> Any:
    """Copy the tensors of a nested structure."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        found = copy.copy(state)  # of its own type: a Counter, say
        for key, value in state.items():
            found[key] = _copied(value)
        return found
    if isinstance(state, list | tuple):
        return type(state)(_copied(value) for value in state)
    return state


def _like(live: Any, state: Any) -> Any:
    """Give dictionaries that were read the types of those that are there."""
    if isinstance(live, list) and isinstance(state, list) and len(live) == len(state):
        return [_like(mine, its) for mine, its in zip(live, state, strict=True)]
    if not isinstance(live, dict) or not isinstance(state, dict):
        return state
    state = {key: _like(live.get(key), value) for key, value in state.items()}
    return state if type(live) is dict else type(live)(state)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _require_same(what: str, saved: Any, here: Any) -> None:
    if saved == here:
        return
    if isinstance(saved, dict):
        names = sorted(saved.keys() | here.keys())
        name = next(name for name in names if saved.get(name) != here.get(name))
        saved, here = ({name: each[name]} if name in each else "none" for each in (saved, here))
    raise ValueError(
        f"the checkpoint is of another run: its {what} are {saved}, here they are {here}. Pass the "
        "pair, objective and optimizer that it was written with"
    )


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
