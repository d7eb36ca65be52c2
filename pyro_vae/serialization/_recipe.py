"""Programs into recipes: plain structures of names, numbers and tensors.

A recipe lists things, each made of those before it::

    {"things": [
        {"class": "priors.StandardNormal", "arguments": {"event_shape": (2,)}},
        {"class": "nets.MLP", "arguments": {"in_features": 2, "hidden": [8], ...}},
        {"class": "likelihoods.Bernoulli", "arguments": {"decoder": {"thing": 1}}},
        {"class": "models.LatentVariableModel", "arguments": {"prior": {"thing": 0}, ...}}],
     "roots": {"model": {"thing": 3}},
     "through": [],  # priors that the guide is a part of, when all is made
     "given": {}}  # programs that cannot be told, and why
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import torch
from torch import nn

from pyro_vae._programs.latent_sites import LatentSite
from pyro_vae._utils.init_args import Described, Unknown, init_args_of, kind_of
from pyro_vae.priors import GuideMixturePrior
from pyro_vae.serialization import _registry as vocabulary
from pyro_vae.serialization import _site_config as sites


def recipe(**programs: Any) -> dict[str, Any]:
    """Tell how programs were made, so that :func:`rebuild` can make them again.

    What they share is told once. Made so are a guide without what it makes at its first call, and
    parameters as they begin: the rest is in the state of the programs.

    Args:
        **programs: objects of this library's classes, by name.

    Returns:
        A plain structure. A program that cannot be told, being a function or an object of another
        class or made of such, stands under ``"given"`` with the reason, and :func:`rebuild` must
        be given it; others may be made of it.

    Example:
        >>> import pyro_vae as pv
        >>> from pyro_vae.serialization._recipe import recipe
        >>> from pyro_vae.serialization._rebuild import rebuild
        >>> structure = recipe(net=pv.nets.MLP(2, [3]))
        >>> structure["things"]
        [{'class': 'nets.MLP', 'arguments': {'in_features': 2, 'hidden': [3]}}]
        >>> rebuild(structure, memory=2**20)["net"]
        MLP(
          (0): Linear(in_features=2, out_features=3, bias=True)
          (1): Tanh()
        )
    """
    given: dict[str, str] = {}
    while (structure := _attempt(programs, given)) is None:
        pass
    return structure


def _attempt(programs: dict[str, Any], given: dict[str, str]) -> dict[str, Any] | None:
    """Describe programs, or take one more as given."""
    try:
        return _Describer(programs, given).describe()
    except _CannotTellError as error:
        given[error.root] = str(error)
        return None


class _CannotTellError(TypeError):
    def __init__(self, root: str, message: str):
        super().__init__(message)
        self.root = root


class _Describer:
    """One attempt, with some of the programs taken as given."""

    def __init__(self, programs: dict[str, Any], given: dict[str, str]):
        self._programs, self._given = programs, given
        self._things: list[dict[str, Any]] = []
        self._numbers: dict[int, int] = {}  # of modules, by id: the programs keep them alive
        self._through: list[tuple[str, GuideMixturePrior]] = []

    def describe(self) -> dict[str, Any]:
        roots = {name: self._tell(name, name, thing) for name, thing in self._programs.items()}
        through = []
        for root, prior in self._through:  # it may grow
            guide = self._tell(root, f"the guide of {root}'s {type(prior).__name__}", prior.guide)
            place = {"thing": self._numbers[id(prior)]}
            through.append({"prior": place, "guide": guide, "site": prior._site})
        return {"things": self._things, "roots": roots, "through": through, "given": self._given}

    def _tell(self, root: str, path: str, value: Any) -> Any:
        """Return what stands for an argument in the recipe."""
        for name in self._given:
            program = self._programs[name]
            if value is program or (inspect.ismethod(value) and value == program):
                return {"given": name}
        if value is None or isinstance(value, str | bool | int | float | torch.Tensor):
            return value
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, list | tuple):
            each = [self._tell(root, f"{path}[{n}]", part) for n, part in enumerate(value)]
            return each if isinstance(value, list) else tuple(each)
        if isinstance(value, dict):
            return {"dictionary": self._tell_all(root, path, value)}
        if isinstance(value, Described):
            return {"mapping": value.structure}
        if isinstance(value, LatentSite):
            try:
                return {"site": sites.to_config(value)}
            except TypeError as error:
                raise _CannotTellError(root, f"{path} is {value.name}: {error}") from error
        if type(value) is functools.partial:
            return {
                "partial": self._tell(root, path, value.func),
                "args": self._tell(root, path, value.args),
                "keywords": self._tell_all(root, path, value.keywords),
            }
        if isinstance(value, type) and value in vocabulary.names():
            return {"class": vocabulary.names()[value]}
        if isinstance(value, nn.Module):
            return {"thing": self._number(root, path, value)}
        kind = value.kind if isinstance(value, Unknown) else kind_of(value)
        raise _CannotTellError(root, f"{path} is {kind}, of which only you know the code")

    def _tell_all(self, root: str, path: str, values: dict[Any, Any]) -> dict[Any, Any]:
        return {key: self._tell(root, f"{path}.{key}", value) for key, value in values.items()}

    def _number(self, root: str, path: str, module: nn.Module) -> int:
        """Return the number of a module among the things; describe it if it has none."""
        if id(module) not in self._numbers:
            thing = self._describe_module(root, path, module)
            self._numbers[id(module)] = len(self._things)
            self._things.append(thing)
            if isinstance(module, GuideMixturePrior) and module.guide is not None:
                self._through.append((root, module))
        return self._numbers[id(module)]

    def _describe_module(self, root: str, path: str, module: nn.Module) -> dict[str, Any]:
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise _CannotTellError(root, f"{path} has hooks, or a forward of its own")
        for name, cls in vocabulary.CONTAINERS.items():
            if type(module) is cls:
                return {"class": name, "children": self._tell_all(root, path, module._modules)}
        arguments = vocabulary.arguments_of_layer(module)
        if arguments is None:
            arguments = init_args_of(module)
        name = vocabulary.names().get(type(module))
        if name is None or arguments is None:
            raise _CannotTellError(root, f"{path} is {kind_of(module)}, a class of your own")
        return {"class": name, "arguments": self._tell_all(root, path, arguments)}
