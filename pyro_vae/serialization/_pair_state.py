"""The state of a pair, to be saved and to be loaded into programs built the same way."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_vae._programs.argument_shapes import ColumnSpec, known_specs, remember_specs
from pyro_vae._programs.data_plate import given_name, name_data_plate
from pyro_vae._programs.pair_state import (
    FREE_PARAM,
    constraints_of_free_params,
    digest,
    require_names,
    state,
)
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import (
    bind_names,
    free_param_names,
    param_names_used,
    parameter_store,
)
from pyro_vae._utils import transform_config
from pyro_vae._utils.code_names import package
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.modules import modules
from pyro_vae._utils.referenced_objects import VALUES, referenced_objects
from pyro_vae._utils.user_warnings import warn_user
from pyro_vae._utils.versions import versions
from pyro_vae.guides._lazy_modules import LazyModules
from pyro_vae.serialization._memory_limit import MemoryLimit
from pyro_vae.serialization._recipe import rebuild, recipe, site_from_config, site_to_config

# Classes and attributes by the names that older checkpoints have.
_FORMER = {"Later": "LazyModules"}
_FORMER_ATTRIBUTES = {
    "whole_event_dim": "input_event_dim",
    "part_event_dim": "output_event_dim",
    "rest_event_dim": "remainder_event_dim",
}


def state_of(model: Program, guide: Program) -> dict[str, Any]:
    """Return a pair's full state: its tensors, modes, heads and constraints.

    Raises:
        ValueError: A guide has loaded values that it uses only at its first call. Or a module with
            tensors runs in the pair, but no name reaches it.
        TypeError: The constraint of a ``pyro.param`` has no name.
    """
    require_names(model, guide)
    modules_of_pair = named_modules(model, guide)
    with parameter_store(model, guide):
        tensors = state(model, guide)
        constraints = constraints_of_free_params()
        met = param_names_used(model, guide)
    return {
        "tensors": tensors,
        "frozen": [
            name
            for name, tensor in tensors.items()
            if isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        ],
        "evaluating": [name for name, module in modules_of_pair if not module.training],
        "heads": _heads(owners(modules_of_pair)),
        "constraints": constraints,
        "met": met,
        "plate": given_name(model),
        "arguments": [spec.to_config() for spec in known_specs(model)],
    }


class Description:
    """The description of a pair in a checkpoint, which can rebuild it except for its tensors.

    It is made before the first run of the pair, because a run may create tensors that it does not
    depend on, such as activations that a network keeps.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
    """

    def __init__(self, model: Program, guide: Program):
        self._pair = (model, guide)
        self._parts: dict[str, Any] = {}
        self._recipe: dict[str, Any] = {}
        self._others = frozenset(_tensors_not_saved(model, guide))
        self._digests: MutableMapping[Tensor, tuple[int, int]] = WeakTensorKeyDictionary()

    def state_dict(self) -> dict[str, Any]:
        """Return the description of the pair; make a new recipe only if its parts have changed."""
        state = state_of(*self._pair)
        if (parts := parts_of(*self._pair)) != self._parts:
            self._recipe = recipe_of(*self._pair, state)
            self._parts = parts
        del state["tensors"]
        return {
            **state,
            "parts": parts,
            "digests": digests_of_others(*self._pair, self._digests),
            "recipe": self._recipe,
            "versions": versions(),
        }

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Give the pair the frozen parameters and the modes of a description.

        Raises:
            ValueError: The pair has modules of other kinds.
        """
        saved, here = content["parts"], parts_of(*self._pair)
        kinds = {name: _FORMER.get(kind, kind) for name, kind in saved["modules"].items()}
        if changed := _changed(kinds, here["modules"]):
            raise ValueError(f"the checkpoint is of another pair: {changed}")
        values = {
            name if name in here["values"] else _renamed(name): value
            for name, value in saved["values"].items()
        }
        if changed := _changed(values, here["values"]):
            warnings.warn(
                f"the pair has changed since the checkpoint: {changed}. The run resumes with the "
                "current values. If the saved ones are right, set them before you resume",
                stacklevel=2,
            )
        others = digests_of_others(*self._pair, self._digests)
        before = {name: found for name, found in others.items() if name in self._others}
        # Older checkpoints do not have them.
        warn_of_others("at the checkpoint", content.get("digests", {}), before)
        set_modes(
            state(*self._pair),
            named_modules(*self._pair),
            set(content["frozen"]),
            set(content["evaluating"]),
        )


def digests_of_others(
    model: Program, guide: Program, known: MutableMapping[Tensor, tuple[int, int]] | None = None
) -> dict[str, int]:
    """Return, by name, digests of the tensors of a pair that are neither parameters nor buffers.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        known: the version and the digest of tensors, from earlier calls.
    """
    known = WeakTensorKeyDictionary() if known is None else known
    found = {}
    for name, tensor in _tensors_not_saved(model, guide).items():
        version = -1 if tensor.is_inference() else tensor._version
        if known.get(tensor, (-1, 0))[0] != version or version == -1:
            known[tensor] = (version, int(digest(tensor)))
        found[name] = known[tensor][1]
    return found


def _tensors_not_saved(model: Program, guide: Program) -> dict[str, Tensor]:
    """Return tensors that are neither parameters nor buffers, by name.

    The attributes of torch's and Pyro's modules are left out, as these are computed again.
    """
    reached = [*referenced_objects(model=model, guide=guide)]
    modules_of_pair = dict(modules_in(reached))
    of_modules = (
        m for module in modules(model, guide) for m in (module.parameters(), module.buffers())
    )
    saved = {id(tensor) for tensors in of_modules for tensor in tensors}
    found = {}
    for name, thing in reached:
        owner, _, attribute = name.rpartition(".")
        if (
            isinstance(thing, Tensor)
            and _is_dense(thing)
            and not (thing.requires_grad or id(thing) in saved or attribute.startswith("_"))
            and package(type(modules_of_pair.get(owner))) not in ("torch", "pyro")
        ):
            found[name] = thing
    return found


def warn_of_others(where: str, saved: Mapping[str, int], here: Mapping[str, int]) -> None:
    """Warn if tensors that are neither parameters nor buffers differ from those of a saved pair.

    Args:
        where: the words for the saved pair in the message.
        saved: the result of :func:`digests_of_others` when the pair was saved.
        here: the present result.
    """
    if differing := [name for name in saved if here.get(name, saved[name]) != saved[name]]:
        warn_user(
            f"tensors have other values than {where}, which contains parameters and buffers only: "
            f"{', '.join(differing[:3])}. Their current values are used. Register tensors that "
            "change as buffers"
        )


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_quantized)


def _renamed(name: str) -> str:
    """Return the present name of a value that an older checkpoint holds."""
    owner, dot, attribute = name.rpartition(".")
    return owner + dot + _FORMER_ATTRIBUTES.get(attribute, attribute)


def _changed(saved: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Return a text about the names whose values differ, or an empty one."""
    names = [n for n in sorted(saved.keys() | here.keys()) if saved.get(n) != here.get(n)]
    told = [f"{n} was {saved.get(n, 'missing')}, now {here.get(n, 'missing')}" for n in names[:3]]
    return "; ".join(told) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


def parts_of(model: Program, guide: Program) -> dict[str, dict[str, str]]:
    """Return a pair's parts other than tensors, by name: module types, numbers and strings."""
    reached = [*referenced_objects(model=model, guide=guide)]
    kinds = {name: type(module).__qualname__ for name, module in modules_in(reached)}
    return {"modules": kinds, "values": settings_in(reached)}


def _heads(owners: list[tuple[str, nn.Module]]) -> dict[str, Any]:
    """Return the modules that guides built at their first call, by the names of the guides."""
    found = {}
    for name, owner in owners:
        if owner.built.has_pending_state:
            raise ValueError(
                f"{name} has loaded values that it uses only at its first call: call it on a "
                "minibatch, then save it"
            )
        if len(owner.built):
            with contextlib.suppress(TypeError):  # the support has no name
                described = [site_to_config(site) for site in owner.built.sites]
                found[name] = {"sites": described, "width": owner.built.width}
    return found


def recipe_of(model: Program, guide: Program, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe of the programs. Test it, since they may have changed since creation."""
    structure = recipe(model=model, guide=guide)
    reasons, pair = structure["given"], {"model": model, "guide": guide}
    for name, other in (("guide", "model"), ("model", "guide")):
        within = referenced_objects(**{name: pair[name]})
        if name in reasons and any(thing is pair[other] for _, thing in within):
            reasons.setdefault(other, f"the {name} contains that {other}")
    given = {name: pair[name] for name in reasons}
    if len(given) == 2:
        return structure
    memory = memory_of(content["tensors"])
    try:
        made = rebuild(structure, memory=memory, **given)
        make_heads(made["model"], made["guide"], content["heads"], memory)
        tensors = module_tensors(made["model"], made["guide"])
        problem = differences(tensors, content["tensors"])
    except ValueError as error:
        problem = str(error)
    for name, program in pair.items():
        if not problem and _parts(program) != _parts(made[name]):
            problem = f"the {name} has other parts"
    if not problem and settings(**made) != settings(model, guide):
        problem = "its attributes have other values"
    if not problem:
        return structure
    reason = f"it has changed since it was made: {problem}"
    return {
        "things": [],
        "roots": {name: {"given": name} for name in ("model", "guide")},
        "through": [],
        "given": {"model": reason, "guide": reason},
    }


def _parts(program: Program) -> list[tuple[str, type, str]]:
    """Return the names, classes and settings of the modules in a module, [] for other programs."""
    if not isinstance(program, nn.Module):
        return []
    found = program.named_modules(remove_duplicate=False)
    return [(name, type(module), _settings_of(module)) for name, module in found]


def _settings_of(module: nn.Module) -> str:
    if isinstance(module, nn.ParameterList | nn.ParameterDict):
        return ""  # they print the dtype and the device of their tensors, which loading restores
    return module.extra_repr()


def make_heads(model: Program, guide: Program, found: Mapping[str, Any], memory: int) -> None:
    """Make guides build the modules that they otherwise build at their first call.

    Raises:
        ValueError: The modules cannot be built, or take more bytes than ``memory``.
    """
    of_pair = owners(named_modules(model, guide))
    with torch.random.fork_rng(devices=[]), MemoryLimit(memory):
        for name, owner in of_pair:
            if name in found and not len(owner.built):
                of_model = [site_from_config(structure) for structure in found[name]["sites"]]
                width = found[name]["width"]
                if not isinstance(width, int) or width < 1 or not of_model:
                    raise ValueError(f"{name} has no head of width {width!r}")
                try:
                    owner.build(of_model, width, torch.empty(0))
                except Exception as error:
                    raise ValueError(
                        f"{name} cannot build its head: {first_line(error)}"
                    ) from error


def module_tensors(model: Program, guide: Program) -> dict[str, Tensor]:
    """Return the parameters and buffers of a pair's modules, without copies."""
    with parameter_store(model, guide):
        found = state(model, guide)
    return {name: tensor for name, tensor in found.items() if not name.startswith(FREE_PARAM)}


def settings(model: Program, guide: Program) -> dict[str, str]:
    """Return the numbers and strings that the programs hold under public names."""
    return settings_in(referenced_objects(model=model, guide=guide))


def settings_in(reached: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """Return the numbers and strings among the reached objects, by name."""
    found = {}
    for name, thing in reached:
        attribute = name.rpartition(".")[2]
        plain = isinstance(thing, VALUES) and not isinstance(thing, Tensor)
        if plain and attribute != "training" and not attribute.startswith("_"):
            found[name] = repr(thing)
    return found


def differences(live: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Return a text about how tensors differ from saved ones in name or shape, empty if not."""
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
    """Load a saved state into programs whose tensors have the saved names and shapes."""
    tensors = content["tensors"]
    frozen, evaluating = set(content["frozen"]), set(content["evaluating"])
    bare = {
        name.removeprefix(FREE_PARAM): t
        for name, t in tensors.items()
        if name.startswith(FREE_PARAM)
    }
    constraints = {
        name: transform_config.from_config(content["constraints"][FREE_PARAM + name])
        for name in bare
    }
    met = {program: frozenset(content["met"][program]) for program in ("model", "guide")}
    specs = [ColumnSpec.from_config(each) for each in content.get("arguments", ())]
    name_data_plate(content.get("plate"), model, guide)  # None in older files
    # The content is checked. No error is raised from here on, so the load is complete or not begun.
    live = module_tensors(model, guide)
    for name, tensor in live.items():
        tensor.data = tensors[name]  # keep the parameter object, with the saved dtype
    for module in modules(model, guide):
        module.to(device)
    remember_specs(model, specs)  # none in older files
    set_modes(live, named_modules(model, guide), frozen, evaluating)
    if bare:
        params = {name: tensor.to(device).requires_grad_() for name, tensor in bare.items()}
        with parameter_store(model, guide, fresh=True) as store:
            live = pyro.get_param_store()
            for name in free_param_names():
                del live[name]
            live.set_state({"params": params, "constraints": constraints})
        bind_names(model, guide, store, met)


def set_modes(
    tensors: Mapping[str, Tensor],
    named_modules: list[tuple[str, nn.Module]],
    frozen: set[str],
    evaluating: set[str],
) -> None:
    """Freeze exactly the named parameters, and set exactly the named modules to evaluation mode."""
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(name not in frozen)
    for name, module in named_modules:
        module.training = name not in evaluating


def named_modules(model: Program, guide: Program) -> list[tuple[str, nn.Module]]:
    """Return the modules of a pair with the names that reach them."""
    return modules_in(referenced_objects(model=model, guide=guide))


def modules_in(reached: Iterable[tuple[str, Any]]) -> list[tuple[str, nn.Module]]:
    """Return the modules among the reached objects, with their names."""
    return [(name, thing) for name, thing in reached if isinstance(thing, nn.Module)]


def owners(named_modules: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Return the guides that build some of their modules at their first call."""
    return [
        (n, module)
        for n, module in named_modules
        if isinstance(getattr(module, "built", None), LazyModules)
    ]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def memory_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the memory limit in bytes for programs with these tensors."""
    return 8 * sum(t.numel() * t.element_size() for t in tensors.values()) + 64 * 2**20
