"""The state that a fit changes: how to copy, restore and share it between processes."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_vae._programs.pair_state import FREE_PARAM, constraints_of_free_params, make_free_params
from pyro_vae._programs.pair_state import state as tensors_of_pair
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import free_param_names
from pyro_vae._programs.trial_runs import LARGEST_COPIED, ModuleState
from pyro_vae._utils.code_names import package
from pyro_vae._utils.distributed import broadcast_from_first, num_processes
from pyro_vae._utils.identity import is_blocked
from pyro_vae._utils.modules import modules
from pyro_vae._utils.referenced_objects import VALUES, referenced_objects
from pyro_vae.training._adam import Adam


class TrainState:
    """The state of the pair, objective, optimizer and scheduler, which steps change.

    Args:
        model: The program of p(x, z).
        guide: The program of q(z|x).
        objective: The objective to maximize. It may have counters and running averages.
        transform: The transform of the minibatches. Its modules may have buffers.
        parameters: The parameters of ``"model"`` and of ``"guide"``. One optimizer trains both.
        learning_rate: The learning rate of the default optimizer, Adam, or one for each program.
        optimizer: Makes another optimizer from the parameters.
        scheduler: Makes a learning rate scheduler from the optimizer.

    Attributes:
        pair: The two programs.
        objective: The objective of the fit.
        parameters: All trained parameters. Parameters that the programs create later are appended.
        parameters_of: The parameters of ``"model"`` and of ``"guide"``, as passed.
        has_user_code: Whether the user chose the optimizer or a scheduler, which may run any code.

    Raises:
        ValueError: There are no parameters. Or ``scheduler`` needs a learning rate, and the
            optimizer has none.
        TypeError: ``optimizer`` or ``scheduler`` does not return one of torch's.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        objective: pyro.infer.ELBO,
        transform: Callable[[Tensor], Tensor] | None,
        parameters: Mapping[str, list[Tensor]],
        *,
        learning_rate: float | Mapping[str, float] | None = 1e-3,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    ):
        self.pair = (model, guide)
        self.objective = objective
        self._transform = transform
        self.parameters_of = parameters
        self.parameters = list(dict.fromkeys(itertools.chain(*parameters.values())))
        if not self.parameters:
            raise ValueError(
                "model and guide have no parameters that require a gradient. Add one to train"
            )
        if optimizer is None:
            rate = learning_rate["model"] if isinstance(learning_rate, Mapping) else learning_rate
            self.optimizer = Adam(_groups(parameters, learning_rate), lr=rate)
        else:
            self.optimizer = _made(optimizer, self.parameters)
        self._scheduler = _made_scheduler(scheduler, self.optimizer)
        self.has_user_code = optimizer is not None or scheduler is not None
        self._named = self._named_tensors()
        self._modules = self._modules_with_state()
        self._frozen = [p for p in self._named.values() if _is_frozen(p)]
        self._hidden = self._untrained_in_store() if any(map(is_blocked, self.pair)) else []

    @property
    def learning_rate(self) -> float:
        """The learning rate of the first parameter group, NaN if the group has no ``"lr"``."""
        return float(self.optimizer.param_groups[0].get("lr", math.nan))

    def named_parameters(self) -> dict[str, Tensor]:
        """Return the trained parameters, by name."""
        trained = set(map(id, self.parameters))
        return {name: tensor for name, tensor in self._named.items() if id(tensor) in trained}

    def named_gradients(self) -> dict[str, Tensor | None]:
        """Return the gradients of the last step, by name."""
        return {name: parameter.grad for name, parameter in self.named_parameters().items()}

    def buffers(self) -> dict[str, Tensor]:
        """Return the tensors that are not trained, by name. They may differ between processes."""
        trained = set(map(id, self.parameters))
        return {name: tensor for name, tensor in self._named.items() if id(tensor) not in trained}

    def broadcast_state(self) -> None:
        """Copy the parameters, buffers and objective's tensors of the first process to all."""
        if num_processes() > 1:
            for tensor in (*self._named.values(), *self._tensors_of_objective().values()):
                broadcast_from_first(tensor)

    def end_epoch(self, loss: float) -> None:
        """Step the scheduler."""
        if isinstance(self._scheduler, ReduceLROnPlateau):
            if math.isfinite(loss):  # NaN if every step was skipped
                self._scheduler.step(loss)
        elif self._scheduler is not None:
            self._scheduler.step()
        self._named = self._named_tensors()

    def train_new_parameters(self) -> bool:
        """Train parameters that the programs have created, or that were thawed, since the start.

        Returns:
            Whether there were such parameters.
        """
        known = set(map(id, (*self.parameters, *self._hidden)))
        thawed = [p for p in self._frozen if p.requires_grad]
        found = dict.fromkeys((*self._untrained_in_store(), *thawed))
        if new := [p for p in found if id(p) not in known]:
            self._train_too(new)
            self._named = self._named_tensors()
            self._modules = self._modules_with_state()
        return bool(new)

    def snapshot_tensors(self) -> dict[str, Tensor]:
        """Return copies of the parameters and buffers, by name."""
        return {name: tensor.detach().clone() for name, tensor in self._named.items()}

    def restore_tensors(self, values: Mapping[str, Tensor]) -> None:
        """Restore parameters and buffers from :meth:`snapshot_tensors`."""
        with torch.no_grad():
            for name, value in values.items():
                self._named[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Copy the state for a checkpoint, to be loaded by :meth:`load_state_dict`.

        Raises:
            ValueError: The optimizer has parameters that are not in the pair.
        """
        self._named = self._named_tensors()
        names = {id(tensor): name for name, tensor in self._named.items()}
        groups = self.optimizer.param_groups
        if any(id(p) not in names for group in groups for p in group["params"]):
            raise ValueError(
                "the optimizer has parameters that are not in model and guide, and a checkpoint "
                "cannot include them. Make the optimizer from the passed parameters alone"
            )
        state = self.snapshot()
        del state["modules"]
        return state | {
            "kinds": self._kinds(),
            "groups": [[names[id(p)] for p in group["params"]] for group in groups],
            "constraints": constraints_of_free_params(),
        }

    def snapshot(self) -> dict[str, Any]:
        """Copy the state for :meth:`restore` in this process."""
        if free_param_names() != self._free_param_names():
            self._named = self._named_tensors()
        return {
            "tensors": self.snapshot_tensors(),
            "objective": {n: t.clone() for n, t in self._tensors_of_objective().items()},
            "optimizer": _copied(self.optimizer.state_dict()),
            "scheduler": None if self._scheduler is None else _copied(self._scheduler.state_dict()),
            "modules": self._states_of_modules(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a copy from :meth:`snapshot`."""
        self._forget_later_parameters(state)
        self.restore_tensors(state["tensors"])
        for each in state.get("modules", []):  # a checkpoint does not have them
            each.restore()
        with torch.no_grad():
            for name, tensor in self._tensors_of_objective().items():
                tensor.copy_(state["objective"][name])
        self.optimizer.load_state_dict(_copied(state["optimizer"]))
        self._undo_casts(state["optimizer"]["state"])
        if self._scheduler is not None:
            live = self._scheduler.state_dict()
            self._scheduler.load_state_dict(_like(live, _copied(state["scheduler"])))

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Load the result of :meth:`state_dict`, before the first step.

        Returns:
            Whether the state has parameters that the programs have not created yet.

        Raises:
            ValueError: The state belongs to another pair, objective, optimizer or scheduler.
        """
        make_free_params(state["constraints"], state["tensors"])
        self._named = self._named_tensors()
        _require_same("tensors of the pair", _shapes(state["tensors"]), _shapes(self._named))
        of_objective = _shapes(self._tensors_of_objective())
        _require_same("tensors of the objective", _shapes(state["objective"]), of_objective)
        names = {id(tensor): name for name, tensor in self._named.items()}
        groups = [[names[id(p)] for p in g["params"]] for g in self.optimizer.param_groups]
        later = state["groups"][len(groups) :]
        for group in later:
            self._train_too([self._named[name] for name in group])
        _require_same("groups of parameters", state["groups"], groups + later)
        _require_same("optimizer and scheduler", state["kinds"], self._kinds())
        self.restore(state)
        return bool(later)

    def _undo_casts(self, saved: Mapping[int, Mapping[str, Any]]) -> None:
        """Restore the dtypes of the optimizer's state. Torch casts it to the parameters' dtypes.

        Torch casts the number of steps only where the optimizer needs another dtype.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for number, values in saved.items():
            live = self.optimizer.state[parameters[number]]
            for name, value in values.items():
                is_cast = isinstance(value, Tensor) and live[name].dtype != value.dtype
                if is_cast and name != "step":
                    live[name] = value.clone().to(live[name].device)

    def _forget_later_parameters(self, state: Mapping[str, Any]) -> None:
        """Remove parameters that are newer than the state. The programs will create them again."""
        store = pyro.get_param_store()
        for name in free_param_names():
            if FREE_PARAM + name not in state["tensors"]:
                del store[name]
        self._named = {name: self._named[name] for name in state["tensors"]}
        for group in self.optimizer.param_groups[len(state["optimizer"]["param_groups"]) :]:
            for parameter in group["params"]:
                self.optimizer.state.pop(parameter, None)
                self.parameters[:] = [p for p in self.parameters if p is not parameter]
        del self.optimizer.param_groups[len(state["optimizer"]["param_groups"]) :]

    def _free_param_names(self) -> set[str]:
        return {
            name.removeprefix(FREE_PARAM) for name in self._named if name.startswith(FREE_PARAM)
        }

    def _kinds(self) -> list[str]:
        defaults = self.optimizer.defaults.items()
        plain = {name: value for name, value in defaults if isinstance(value, VALUES)}
        return [
            f"{type(self.optimizer).__qualname__} of {plain}",
            type(self._scheduler).__qualname__,
        ]

    def _train_too(self, parameters: list[Tensor]) -> None:
        self.optimizer.add_param_group({"params": parameters})
        self.parameters += parameters  # in place, because other objects hold this list

    def _named_tensors(self) -> dict[str, Tensor]:
        named = tensors_of_pair(*self.pair)
        known = set(map(id, named.values()))
        unnamed = [
            p for p in self.parameters if id(p) not in known
        ]  # not among the pair's named tensors
        return named | {f"parameter {i}": p for i, p in enumerate(unnamed)}

    def _untrained_in_store(self) -> list[Tensor]:
        known = set(map(id, self.parameters))
        registered = [p for _, p in pyro.get_param_store().named_parameters()]
        return [p for p in registered if p.requires_grad and id(p) not in known]

    def _modules_with_state(self) -> list[nn.Module]:
        """Return the modules that a step may change. Those of torch have parameters and buffers."""
        parts = [part for module in modules(*self.pair) for part in module.modules()]
        return [part for part in parts if part._buffers or package(type(part)) != "torch"]

    def _states_of_modules(self) -> list[ModuleState]:
        copied = set(map(id, self._named.values()))
        return [ModuleState(part, copied, LARGEST_COPIED) for part in self._modules]

    def _tensors_of_objective(self) -> dict[str, Tensor]:
        """Return the tensors of the objective and the transform that are not in the pair."""
        of_pair = set(map(id, self._named.values()))
        found = [
            pair
            for pair in referenced_objects(objective=self.objective)
            if isinstance(pair[1], Tensor)
        ]
        for number, module in enumerate(modules(self._transform)):
            found += [(f"transform {number}.{n}", t) for n, t in module.state_dict().items()]
        return {name: tensor for name, tensor in found if id(tensor) not in of_pair}


def _is_frozen(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _groups(
    parameters: dict[str, list[Tensor]], learning_rate: float | Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return the optimizer's groups. With two rates, shared parameters are the model's."""
    if not isinstance(learning_rate, Mapping):
        both = dict.fromkeys(itertools.chain(*parameters.values()))
        return [{"params": list(both), "lr": learning_rate}]
    shared = set(map(id, parameters["model"]))
    groups = {**parameters, "guide": [p for p in parameters["guide"] if id(p) not in shared]}
    return [{"params": found, "lr": learning_rate[name]} for name, found in groups.items() if found]


def _made(
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer], parameters: list[Tensor]
) -> torch.optim.Optimizer:
    what = (
        "optimizer must make a torch.optim.Optimizer from the parameters, such as "
        "functools.partial(torch.optim.SGD, lr=0.1)"
    )
    if isinstance(optimizer, PyroOptim) or _makes_pyro_optimizers(optimizer):
        raise TypeError(
            f"{what}. Got {optimizer!r}, which is for Pyro's SVI. Pass torch's optimizer instead, "
            "and a learning rate scheduler as scheduler="
        )
    if not callable(optimizer):
        raise TypeError(f"{what}, got {optimizer!r}")
    made = optimizer(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"{what}. It made {made!r}")
    return made


def _makes_pyro_optimizers(optimizer: Any) -> bool:
    """Return whether ``optimizer`` is a function of Pyro, such as ``pyro.optim.Adam``."""
    module = getattr(optimizer, "__module__", None) or ""
    return inspect.isfunction(optimizer) and module.startswith("pyro.optim")


def _made_scheduler(
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None,
    optimizer: torch.optim.Optimizer,
) -> LRScheduler | None:
    if scheduler is None:
        return None
    what = (
        "scheduler must make a learning rate scheduler of torch from the optimizer, such as "
        "functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)"
    )
    if not callable(scheduler) or isinstance(scheduler, PyroOptim):
        raise TypeError(f"{what}, got {scheduler!r}")
    try:
        made = scheduler(optimizer)
    except KeyError as error:
        if "lr" in optimizer.param_groups[0]:
            raise
        raise ValueError(
            f"scheduler cannot be made, because the groups of {type(optimizer).__name__} have no "
            f"learning rate 'lr', only {sorted(optimizer.param_groups[0])}. Leave scheduler out, "
            "or pass another optimizer"
        ) from error
    if not callable(getattr(made, "step", None)) or not hasattr(made, "state_dict"):
        raise TypeError(f"{what}. It made {made!r}")
    return made


def _copied(state: Any) -> Any:
    """Copy the tensors of a nested structure."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        found = copy.copy(state)  # keeps its type, such as Counter
        for key, value in state.items():
            found[key] = _copied(value)
        return found
    if isinstance(state, list | tuple):
        return type(state)(_copied(value) for value in state)
    return state


def _like(live: Any, state: Any) -> Any:
    """Convert the dictionaries of a loaded state to the types of the live state."""
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
        f"the checkpoint belongs to another run. Its {what} are {saved}, but here they are {here}. "
        "Pass the pair, objective and optimizer of that run"
    )
