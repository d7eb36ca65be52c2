"""Recipes into programs, with no trust in where a recipe comes from."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn

from pyro_vae._utils import transform_config as mappings
from pyro_vae.priors import GuideMixturePrior
from pyro_vae.serialization import _registry as vocabulary
from pyro_vae.serialization import _site_config as sites
from pyro_vae.serialization._memory_limit import MAX_PARTS, MemoryLimit


def rebuild(structure: dict[str, Any], *, memory: int, **given: Any) -> dict[str, Any]:
    """Make programs again.

    Args:
        structure: what :func:`recipe` gave.
        memory: how many bytes they may take.
        **given: programs to take instead of those of the recipe, by name: those that it cannot
            tell, and any others.

    Returns:
        The programs by name, with parameters as they begin. No random number is used up.

    Raises:
        ValueError: the structure is no recipe, or of another version of the library; it takes too
            much memory; a program is missing that must be given.

    Example:
        See :func:`recipe`.
    """
    try:
        with torch.random.fork_rng(devices=[]), MemoryLimit(memory):
            return _Builder(structure, given).build()
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"this is no recipe: {error!r}") from error


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
        # A program that is given takes the place of what the recipe says, wherever it stands.
        for entry in self._structure["through"]:
            if isinstance(prior := self._made.get(entry["prior"]["thing"]), GuideMixturePrior):
                guide = next((programs[n] for n, v in roots.items() if v == entry["guide"]), None)
                guide = self._make(entry["guide"]) if guide is None else guide
                if isinstance(guide, nn.Module) and any(each is prior for each in guide.modules()):
                    raise ValueError("a prior is a mixture of what it is itself a part of")
                prior.bind_guide(guide, site=entry["site"])
        return programs

    def _make(self, value: Any, before: int | None = None) -> Any:
        """Return what a value of the recipe stands for.

        Args:
            value: of a thing's argument.
            before: the thing's number; it is made of things before it, so that there is an end.
        """
        if isinstance(value, list | tuple):
            return type(value)(self._make(each, before) for each in value)
        if not isinstance(value, dict):
            return value
        if value.keys() == {"given"}:
            return self._of_user(value["given"])
        if value.keys() == {"class"}:
            return vocabulary.find(value["class"])
        if value.keys() == {"mapping"}:
            return mappings.from_config(value["mapping"])
        if value.keys() == {"site"}:
            return sites.from_config(value["site"])
        if value.keys() == {"dictionary"}:
            return {key: self._make(each, before) for key, each in value["dictionary"].items()}
        if value.keys() == {"partial", "args", "keywords"}:
            keywords = {key: self._make(v, before) for key, v in value["keywords"].items()}
            args = self._make(value["args"], before)
            return functools.partial(self._make(value["partial"], before), *args, **keywords)
        number = value["thing"]
        if not 0 <= number < (len(self._structure["things"]) if before is None else before):
            raise ValueError(f"a thing is made of number {number}, which does not come before it")
        if number not in self._made:
            self._made[number] = self._thing(number)
        return self._made[number]

    def _of_user(self, name: str) -> Any:
        if name not in self._given:
            reason = self._structure["given"][name]
            raise ValueError(f"the {name} must be given, for {reason}")
        return self._given[name]

    def _thing(self, number: int) -> nn.Module:
        for name, root in self._structure["roots"].items():
            if root == {"thing": number} and name in self._given:
                return self._given[name]
        thing = self._structure["things"][number]
        if thing["class"] in vocabulary.CONTAINERS:
            return self._container(thing, number)
        cls = vocabulary.find(thing["class"])
        arguments = {name: self._make(v, number) for name, v in thing["arguments"].items()}
        make = getattr(cls, "of_arguments", cls)
        signature = inspect.signature(make)
        if unknown := arguments.keys() - signature.parameters.keys():
            raise ValueError(f"{thing['class']} takes no argument {sorted(unknown)[0]!r}")
        bound = inspect.BoundArguments(signature, _in_order(arguments, signature))
        try:
            return make(*bound.args, **bound.kwargs)
        except Exception as error:
            raise ValueError(f"no {thing['class']} can be made so: {error}") from error

    def _container(self, thing: dict[str, Any], number: int) -> nn.Module:
        module = vocabulary.CONTAINERS[thing["class"]]()
        for name, child in thing["children"].items():
            module.add_module(name, self._make(child, number))
        return module


def _in_order(arguments: dict[str, Any], signature: inspect.Signature) -> dict[str, Any]:
    return {name: arguments[name] for name in signature.parameters if name in arguments}
