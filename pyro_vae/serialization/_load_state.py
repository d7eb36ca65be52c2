"""Programs filled with the state of others that were made alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae._programs import parameters as programs
from pyro_vae._programs.pair_state import (
    FREE_PARAM,
    state,
)
from pyro_vae._programs.pair_trace import Program
from pyro_vae._utils import transform_config as mappings
from pyro_vae._utils.modules import modules
from pyro_vae._utils.referenced_objects import VALUES, referenced_objects
from pyro_vae.guides._lazy_modules import LazyModules
from pyro_vae.serialization import _site_config as sites
from pyro_vae.serialization._memory_limit import MemoryLimit


def make_heads(model: Program, guide: Program, found: Mapping[str, Any], memory: int) -> None:
    """Let guides make what they made at their first call.

    Raises:
        ValueError: it cannot be made so, or takes more bytes than ``memory``.
    """
    of_pair = owners(named_modules(model, guide))
    with torch.random.fork_rng(devices=[]), MemoryLimit(memory):
        for name, owner in of_pair:
            if name in found and not len(owner.built):
                of_model = [sites.from_config(structure) for structure in found[name]["sites"]]
                width = found[name]["width"]
                if not isinstance(width, int) or width < 1 or not of_model:
                    raise ValueError(f"{name} has no head of width {width!r}")
                try:
                    owner.build(of_model, width, torch.empty(0))
                except Exception as error:
                    raise ValueError(f"{name} cannot make its head: {error}") from error


def module_tensors(model: Program, guide: Program) -> dict[str, Tensor]:
    """Return the parameters and buffers of a pair's modules, as they are."""
    with programs.parameter_store(model, guide):
        found = state(model, guide)
    return {name: tensor for name, tensor in found.items() if not name.startswith(FREE_PARAM)}


def settings(model: Program, guide: Program) -> dict[str, str]:
    """Return numbers and words that the programs hold by public names."""
    return settings_in(referenced_objects(model=model, guide=guide))


def settings_in(reached: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """Return those among all that the programs reach, by name."""
    found = {}
    for name, thing in reached:
        attribute = name.rpartition(".")[2]
        plain = isinstance(thing, VALUES) and not isinstance(thing, Tensor)
        if plain and attribute != "training" and not attribute.startswith("_"):
            found[name] = repr(thing)
    return found


def differences(live: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Tell how the tensors of programs differ from those of a file; nothing if they fit."""
    wanted = [name for name in tensors if not name.startswith(FREE_PARAM)]
    shapes = [
        f"{name} (saved {tuple(tensors[name].shape)}, here {tuple(live[name].shape)})"
        for name in wanted
        if name in live and live[name].shape != tensors[name].shape
    ]
    parts = {
        "missing here": [name for name in wanted if name not in live],
        "not saved": [name for name in live if name not in tensors],
        "of another shape": shapes,
    }
    return "; ".join(f"{what}: {_some(names)}" for what, names in parts.items() if names)


def load_state(
    model: Program, guide: Program, content: Mapping[str, Any], device: torch.device
) -> None:
    """Put a saved state into programs whose tensors have the names and shapes of those saved."""
    tensors = content["tensors"]
    frozen, evaluating = set(content["frozen"]), set(content["evaluating"])
    bare = {
        name.removeprefix(FREE_PARAM): t
        for name, t in tensors.items()
        if name.startswith(FREE_PARAM)
    }
    constraints = {
        name: mappings.from_config(content["constraints"][FREE_PARAM + name]) for name in bare
    }
    met = {program: frozenset(content["met"][program]) for program in ("model", "guide")}
    # All is read: from here on nothing is refused.
    live = module_tensors(model, guide)
    for name, tensor in live.items():
        tensor.data = tensors[name]  # the very parameters stay, with the type that was saved
    for module in modules(model, guide):
        module.to(device)
    set_modes(live, named_modules(model, guide), frozen, evaluating)
    if bare:
        params = {name: tensor.to(device).requires_grad_() for name, tensor in bare.items()}
        with programs.parameter_store(model, guide, fresh=True) as store:
            live = pyro.get_param_store()
            for name in programs.free_param_names():
                del live[name]
            live.set_state({"params": params, "constraints": constraints})
        programs.bind_names(model, guide, store, met)


def set_modes(
    tensors: Mapping[str, Tensor],
    named_modules: list[tuple[str, nn.Module]],
    frozen: set[str],
    evaluating: set[str],
) -> None:
    """Freeze parameters, and put modules into evaluation mode, by name; and no others."""
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(name not in frozen)
    for name, module in named_modules:
        module.training = name not in evaluating


def named_modules(model: Program, guide: Program) -> list[tuple[str, nn.Module]]:
    """Return the modules of a pair, by the ways that lead to them."""
    return modules_in(referenced_objects(model=model, guide=guide))


def modules_in(reached: Iterable[tuple[str, Any]]) -> list[tuple[str, nn.Module]]:
    """Return those among all that the programs reach, by name."""
    return [(name, thing) for name, thing in reached if isinstance(thing, nn.Module)]


def owners(named_modules: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Return the guides among modules that make a part of themselves at their first call."""
    return [
        (n, module)
        for n, module in named_modules
        if isinstance(getattr(module, "built", None), LazyModules)
    ]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def memory_of(tensors: Mapping[str, Tensor]) -> int:
    """Return how many bytes programs may take that have these tensors."""
    return 8 * sum(t.numel() * t.element_size() for t in tensors.values()) + 64 * 2**20
