"""What is written of a pair, besides its notes."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from pyro_vae._programs import parameters as programs
from pyro_vae._programs.pair_state import constraints_of_free_params, require_names, state
from pyro_vae._programs.pair_trace import Program
from pyro_vae._utils.referenced_objects import referenced_objects
from pyro_vae.serialization import _load_state as filling
from pyro_vae.serialization import _site_config as sites
from pyro_vae.serialization._rebuild import rebuild
from pyro_vae.serialization._recipe import recipe

_FORMER = {"Later": "LazyModules"}  # classes by the names that older checkpoints have


def state_of(model: Program, guide: Program) -> dict[str, Any]:
    """Return all of a pair's state: its tensors, and what else is needed to use them.

    Raises:
        ValueError: a guide has loaded values that wait for its first call.
        ValueError: a module with tensors runs in the pair, and no name leads to it.
        TypeError: a ``pyro.param`` has a constraint without a name.
    """
    require_names(model, guide)
    named_modules = filling.named_modules(model, guide)
    with programs.parameter_store(model, guide):
        tensors = state(model, guide)
        constraints = constraints_of_free_params()
        met = programs.param_names_used(model, guide)
    return {
        "tensors": tensors,
        "frozen": [
            name
            for name, tensor in tensors.items()
            if isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        ],
        "evaluating": [name for name, module in named_modules if not module.training],
        "heads": _heads(filling.owners(named_modules)),
        "constraints": constraints,
        "met": met,
    }


class Description:
    """What a checkpoint says of the pair beside its tensors, from which it can be made again.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
    """

    def __init__(self, model: Program, guide: Program):
        self._pair = (model, guide)
        self._parts: dict[str, Any] = {}
        self._recipe: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the description of the pair; make a new recipe only if its parts have changed."""
        state = state_of(*self._pair)
        if (parts := parts_of(*self._pair)) != self._parts:
            self._recipe = recipe_of(*self._pair, state)
            self._parts = parts
        del state["tensors"]
        return {**state, "parts": parts, "recipe": self._recipe, "versions": versions()}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Give the pair the frozen parameters and the modes of a description.

        Raises:
            ValueError: The pair has modules of other kinds.
        """
        saved, here = content["parts"], parts_of(*self._pair)
        kinds = {name: _FORMER.get(kind, kind) for name, kind in saved["modules"].items()}
        if changed := _changed(kinds, here["modules"]):
            raise ValueError(f"the checkpoint is of another pair: {changed}")
        if changed := _changed(saved["values"], here["values"]):
            warnings.warn(
                f"the pair is not as it was when the checkpoint was written: {changed}. The run "
                "goes on with what is here: if that was changed on the way, change it first",
                stacklevel=2,
            )
        filling.set_modes(
            state(*self._pair),
            filling.named_modules(*self._pair),
            set(content["frozen"]),
            set(content["evaluating"]),
        )


def _changed(saved: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Tell which named things are others, or nothing."""
    names = [n for n in sorted(saved.keys() | here.keys()) if saved.get(n) != here.get(n)]
    told = [
        f"{n} was {saved.get(n, 'not there')}, here {here.get(n, 'is none')}" for n in names[:3]
    ]
    return "; ".join(told) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


def parts_of(model: Program, guide: Program) -> dict[str, dict[str, str]]:
    """Return what a pair has besides tensors: kinds of modules, numbers and words, by name."""
    reached = [*referenced_objects(model=model, guide=guide)]
    kinds = {name: type(module).__qualname__ for name, module in filling.modules_in(reached)}
    return {"modules": kinds, "values": filling.settings_in(reached)}


def _heads(owners: list[tuple[str, nn.Module]]) -> dict[str, Any]:
    """Return what guides made at their first call, by the names of the guides."""
    found = {}
    for name, owner in owners:
        if owner.built.has_pending_state:
            raise ValueError(
                f"{name} has loaded values that wait for its first call: call it on a minibatch, "
                "then save it"
            )
        if len(owner.built):
            with contextlib.suppress(TypeError):  # a support without a name: call it before loading
                described = [sites.to_config(site) for site in owner.built.sites]
                found[name] = {"sites": described, "width": owner.built.width}
    return found


def recipe_of(model: Program, guide: Program, content: Mapping[str, Any]) -> dict[str, Any]:
    """Tell how the programs are made; try it, since they may have been changed after that."""
    structure = recipe(model=model, guide=guide)
    reasons, pair = structure["given"], {"model": model, "guide": guide}
    for name, other in (("guide", "model"), ("model", "guide")):
        within = referenced_objects(**{name: pair[name]})
        if name in reasons and any(thing is pair[other] for _, thing in within):
            reasons.setdefault(other, f"the {name} has that {other} within")
    given = {name: pair[name] for name in reasons}
    if len(given) == 2:
        return structure
    memory = filling.memory_of(content["tensors"])
    try:
        made = rebuild(structure, memory=memory, **given)
        filling.make_heads(made["model"], made["guide"], content["heads"], memory)
        tensors = filling.module_tensors(made["model"], made["guide"])
        problem = filling.differences(tensors, content["tensors"])
    except ValueError as error:
        problem = str(error)
    for name, program in pair.items():
        if not problem and isinstance(program, nn.Module) and repr(program) != repr(made[name]):
            problem = f"the {name} has other parts"
    if not problem and filling.settings(**made) != filling.settings(model, guide):
        problem = "its attributes have other values"
    if not problem:
        return structure
    reason = f"it is not as it was made: {problem}"
    return {
        "things": [],
        "roots": {name: {"given": name} for name in ("model", "guide")},
        "through": [],
        "given": {"model": reason, "guide": reason},
    }


def versions() -> dict[str, str]:
    """Return the versions of what writes, and the date."""
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    found = {package: _version(package) for package in ("pyro_vae", "torch", "pyro-ppl")}
    return {**found, "python": platform.python_version(), "date": date}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from its source
        return "unknown"
