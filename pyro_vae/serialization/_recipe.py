"""Convert programs to recipes, plain structures of names, numbers and tensors, and back.

A recipe lists objects. Each is made from the objects before it::

    {"things": [
        {"class": "priors.StandardNormal", "arguments": {"event_shape": (2,)}},
        {"class": "nets.MLP", "arguments": {"in_features": 2, "hidden": [8], ...}},
        {"class": "likelihoods.Bernoulli", "arguments": {"decoder": {"thing": 1}}},
        {"class": "models.LatentVariableModel", "arguments": {"prior": {"thing": 0}, ...}}],
     "roots": {"model": {"thing": 3}},
     "through": [],  # priors that contain the guide, which are bound at the end
     "given": {}}  # programs without a recipe, and the reasons

A recipe from a file is not trusted: its classes are looked up in the registry.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import nn
from torch.distributions.transforms import Transform

from pyro_vae._programs.latent_sites import LatentSite
from pyro_vae._utils import transform_config
from pyro_vae._utils.init_args import Described, Unknown, init_args_of, kind_of
from pyro_vae._utils.messages import first_line
from pyro_vae.priors import GuideMixturePrior
from pyro_vae.serialization import _registry as registry
from pyro_vae.serialization._memory_limit import MAX_PARTS, MemoryLimit


def recipe(**programs: Any) -> dict[str, Any]:
    """Return the recipe of programs, from which :func:`rebuild` can rebuild them.

    Shared objects are listed once. A rebuilt program has initial parameters, and a rebuilt guide
    lacks the modules that it builds at its first call. These are in the state of the programs.

    Args:
        **programs: objects of this library's classes, by name.

    Returns:
        A plain structure. Functions, objects of other classes and programs made of them have no
        recipe. They are listed under ``"given"`` with the reason, and must be passed to
        :func:`rebuild`. Other programs may contain them.

    Example:
        >>> import pyro_vae as pv
        >>> from pyro_vae.serialization._recipe import rebuild, recipe
        >>> structure = recipe(net=pv.nets.MLP(2, [3]))
        >>> structure["things"]
        [{'class': 'nets.MLP', 'arguments': {'in_features': 2, 'hidden': [3]}}]
        >>> rebuild(structure, memory=2**20)["net"]
        MLP(2, hidden=[3])
    """
    given: dict[str, str] = {}
    while (structure := _attempt(programs, given)) is None:
        pass
    return structure


def _attempt(programs: dict[str, Any], given: dict[str, str]) -> dict[str, Any] | None:
    """Return the recipe of programs, or None after adding one more to the given ones."""
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
    """One attempt at a recipe, with some programs as given ones."""

    def __init__(self, programs: dict[str, Any], given: dict[str, str]):
        self._programs, self._given = programs, given
        self._things: list[dict[str, Any]] = []
        self._numbers: dict[int, int] = {}  # by id of the modules, which the programs keep alive
        self._through: list[tuple[str, GuideMixturePrior]] = []

    def describe(self) -> dict[str, Any]:
        roots = {name: self._tell(name, name, thing) for name, thing in self._programs.items()}
        through = []
        for root, prior in self._through:  # the list may grow in this loop
            guide = self._tell(root, f"the guide of {root}'s {type(prior).__name__}", prior.guide)
            place = {"thing": self._numbers[id(prior)]}
            through.append({"prior": place, "guide": guide, "site": prior._site})
        return {"things": self._things, "roots": roots, "through": through, "given": self._given}

    def _tell(self, root: str, path: str, value: Any) -> Any:
        """Return the entry of the recipe for an argument."""
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
                return {"site": site_to_config(value)}
            except TypeError as error:
                raise _CannotTellError(root, f"{path} is {value.name}: {error}") from error
        if type(value) is functools.partial:
            return {
                "partial": self._tell(root, path, value.func),
                "args": self._tell(root, path, value.args),
                "keywords": self._tell_all(root, path, value.keywords),
            }
        if isinstance(value, type) and value in registry.names():
            return {"class": registry.names()[value]}
        if isinstance(value, nn.Module):
            return {"thing": self._number(root, path, value)}
        kind = value.kind if isinstance(value, Unknown) else kind_of(value)
        raise _CannotTellError(root, f"{path} is {kind}, which is code of your own")

    def _tell_all(self, root: str, path: str, values: dict[Any, Any]) -> dict[Any, Any]:
        return {key: self._tell(root, f"{path}.{key}", value) for key, value in values.items()}

    def _number(self, root: str, path: str, module: nn.Module) -> int:
        """Return the number of a module in the list, and add the module if it is new."""
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
        for name, cls in registry.CONTAINERS.items():
            if type(module) is cls:
                return {"class": name, "children": self._tell_all(root, path, module._modules)}
        arguments = registry.arguments_of_layer(module)
        if arguments is None:
            arguments = init_args_of(module)
        name = registry.names().get(type(module))
        if name is None or arguments is None:
            of_torch = type(module).__module__.split(".")[0] == "torch"
            whose = registry.NOT_READABLE if of_torch else "a class of your own"
            raise _CannotTellError(root, f"{path} is {kind_of(module)}, {whose}")
        return {"class": name, "arguments": self._tell_all(root, path, arguments)}


def rebuild(structure: dict[str, Any], *, memory: int, **given: Any) -> dict[str, Any]:
    """Rebuild programs from a recipe.

    Args:
        structure: a recipe from :func:`recipe`.
        memory: memory limit in bytes.
        **given: programs to use instead of those of the recipe, by name. Programs without a recipe
            are required.

    Returns:
        The programs by name, with initial parameters. The random state is unchanged.

    Raises:
        ValueError: The structure is not a recipe, or is from another version of the library. Or it
            takes too much memory. Or a required program is missing.

    Example:
        See :func:`recipe`.
    """
    try:
        with torch.random.fork_rng(devices=[]), MemoryLimit(memory):
            return _Builder(structure, given).build()
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"this is not a recipe: {error!r}") from error


class _Builder:
    def __init__(self, structure: dict[str, Any], given: dict[str, Any]):
        self._structure, self._given = structure, given
        self._made: dict[int, Any] = {}
        if len(structure["things"]) > MAX_PARTS:
            raise ValueError(f"it would take more than {MAX_PARTS} modules and parameters")

    def build(self) -> dict[str, Any]:
        roots = self._structure["roots"]
        programs = {
            name: self._given[name] if name in self._given else self._make(value)
            for name, value in roots.items()
        }
        # A given program replaces the program of the recipe everywhere.
        for entry in self._structure["through"]:
            if isinstance(prior := self._made.get(entry["prior"]["thing"]), GuideMixturePrior):
                guide = next((programs[n] for n, v in roots.items() if v == entry["guide"]), None)
                guide = self._make(entry["guide"]) if guide is None else guide
                if isinstance(guide, nn.Module) and any(each is prior for each in guide.modules()):
                    raise ValueError("a prior is a mixture of a guide that contains the prior")
                prior.bind_guide(guide, site=entry["site"])
        return programs

    def _make(self, value: Any, before: int | None = None) -> Any:
        """Return the object of a recipe's value.

        Args:
            value: value of an argument.
            before: number of the object that has the argument. Only objects before it are allowed,
                so the recursion ends.
        """
        if isinstance(value, list | tuple):
            return type(value)(self._make(each, before) for each in value)
        if not isinstance(value, dict):
            return value
        if value.keys() == {"given"}:
            return self._of_user(value["given"])
        if value.keys() == {"class"}:
            return registry.find(value["class"])
        if value.keys() == {"mapping"}:
            return transform_config.from_config(value["mapping"])
        if value.keys() == {"site"}:
            return site_from_config(value["site"])
        if value.keys() == {"dictionary"}:
            return {key: self._make(each, before) for key, each in value["dictionary"].items()}
        if value.keys() == {"partial", "args", "keywords"}:
            keywords = {key: self._make(v, before) for key, v in value["keywords"].items()}
            args = self._make(value["args"], before)
            return functools.partial(self._make(value["partial"], before), *args, **keywords)
        number = value["thing"]
        if not 0 <= number < (len(self._structure["things"]) if before is None else before):
            raise ValueError(f"an object is made from number {number}, which is not before it")
        if number not in self._made:
            self._made[number] = self._thing(number)
        return self._made[number]

    def _of_user(self, name: str) -> Any:
        if name not in self._given:
            reason = self._structure["given"][name]
            raise ValueError(f"the {name} must be given, because {reason}")
        return self._given[name]

    def _thing(self, number: int) -> nn.Module:
        for name, root in self._structure["roots"].items():
            if root == {"thing": number} and name in self._given:
                return self._given[name]
        thing = self._structure["things"][number]
        if thing["class"] in registry.CONTAINERS:
            return self._container(thing, number)
        cls = registry.find(thing["class"])
        arguments = {name: self._make(v, number) for name, v in thing["arguments"].items()}
        make = getattr(cls, "of_arguments", cls)
        signature = registry.signature_of(make)
        if unknown := arguments.keys() - signature.parameters.keys():
            raise ValueError(f"{thing['class']} has no argument {sorted(unknown)[0]!r}")
        bound = inspect.BoundArguments(signature, _in_order(arguments, signature))
        try:
            return make(*bound.args, **bound.kwargs)
        except Exception as error:
            raise ValueError(f"{thing['class']} cannot be made: {first_line(error)}") from error

    def _container(self, thing: dict[str, Any], number: int) -> nn.Module:
        module = registry.CONTAINERS[thing["class"]]()
        for name, child in thing["children"].items():
            module.add_module(name, self._make(child, number))
        return module


def _in_order(arguments: dict[str, Any], signature: inspect.Signature) -> dict[str, Any]:
    return {name: arguments[name] for name in signature.parameters if name in arguments}


_TYPES = {
    "name": str,
    "plates": tuple,
    "batch_shape": tuple,
    "event_shape": tuple,
    "bijection": list,
    "masked": bool,
    "nesting": int,
}


def site_to_config(site: LatentSite) -> dict[str, Any]:
    """Return the structure of a site.

    Raises:
        TypeError: The support of the site has no name.
    """
    return {
        "name": site.name,
        "plates": tuple(tuple(frame) for frame in site.plates),
        "batch_shape": tuple(site.batch_shape),
        "event_shape": tuple(site.event_shape),
        "bijection": transform_config.to_config(site.bijection),
        "masked": site.masked,
        "nesting": site.nesting,
    }


def site_from_config(structure: Any) -> LatentSite:
    """Return the site of a structure.

    Raises:
        ValueError: The structure is not that of a latent site.
    """
    if not isinstance(structure, dict) or structure.keys() != _TYPES.keys():
        raise ValueError(f"a latent site must have the keys {[*_TYPES]}")
    bijection = transform_config.from_config(structure["bijection"])
    wrong = [name for name, kind in _TYPES.items() if not isinstance(structure[name], kind)]
    if wrong or not isinstance(bijection, Transform):
        raise ValueError(f"this is not a latent site: {structure}")
    try:
        plates = tuple(CondIndepStackFrame(*frame) for frame in structure["plates"])
        shapes = {name: torch.Size(structure[name]) for name in ("batch_shape", "event_shape")}
    except TypeError as error:
        raise ValueError(
            f"a latent site has invalid plates or shapes: {first_line(error)}"
        ) from error
    return LatentSite(**{**structure, **shapes, "plates": plates, "bijection": bijection})
