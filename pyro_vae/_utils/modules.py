"""Find the torch modules that a program uses.

Evaluation mode, devices and running averages belong to modules, but Pyro does not list the modules
that a plain function runs. So search for them wherever the function's code can reach them by name.
Modules that no name reaches are found when they run.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_of_torch
from torch.utils.weak import WeakIdKeyDictionary

from pyro_vae._utils.identity import owner_of
from pyro_vae._utils.referenced_objects import referenced_objects

NAME_IT = (
    "make the program's code refer to it by a closure, a global, a default argument, an attribute "
    "or a container"
)
# By the owners of guide and model: modules that ran in the pair and that no name reaches. All
# references are weak.
_met = WeakIdKeyDictionary()


def modules(*programs: Any) -> list[nn.Module]:
    """Return the modules among the programs, and those that they hold or refer to by name.

    Modules that :func:`remember_unnamed` found in the programs come last.

    Args:
        *programs: callables.
    """
    found = _named(*programs)
    return [*found, *_outside(found, _met_in(programs))]


def unnamed(*programs: Any) -> list[nn.Module]:
    """Return the modules of :func:`modules` that no name reaches."""
    met = _met_in(programs)
    return _outside(_named(*programs), met) if met else []


@contextlib.contextmanager
def before_unknown(
    act: Callable[[nn.Module], None], *known: nn.Module, calls: int | None = None
) -> Iterator[None]:
    """Call a function once with each unknown module that is about to run.

    Modules in other threads are ignored.

    Args:
        act: the function.
        *known: known modules. Their submodules are known, too.
        calls: number of module calls to check, or None for all. A check takes a microsecond.
    """
    seen = {id(part): part for module in known for part in module.modules()}
    thread, count = threading.get_ident(), 0

    def look(module: nn.Module, _: Any) -> None:
        nonlocal count
        # While a module is compiled, the compiler must not trace this hook.
        if torch.compiler.is_compiling() or threading.get_ident() != thread:
            return
        count += 1
        if count == calls:
            remove()
        if id(module) not in seen:
            seen.update((id(part), part) for part in module.modules())
            act(module)

    # torch's own function gives each hook a new number, and compiled modules are compiled again for
    # each of them.
    hooks: dict[Any, Any] = module_of_torch._global_forward_pre_hooks
    keys = (f"pyro_vae {number}" for number in itertools.count())
    key = next(key for key in keys if key not in hooks)

    def remove() -> None:  # without a reference to look, so that both are freed at once
        hooks.pop(key, None)

    hooks[key] = look
    try:
        yield
    finally:
        if hooks.get(key) is look:
            remove()


@contextlib.contextmanager
def remember_unnamed(model: Any, guide: Any) -> Iterator[None]:
    """Make :func:`modules` also return the modules that run in the block and that no name reaches.

    Args:
        model: a callable.
        guide: another callable. The block must run only these two.
    """
    ran: list[nn.Module] = []
    try:
        with before_unknown(ran.append, *modules(model, guide)):
            yield
    finally:
        if found := _outside(_named(model, guide), ran):  # the run may have created and named some
            with contextlib.suppress(TypeError):  # an owner that allows no weak references
                by_model = _met.setdefault(owner_of(guide), WeakIdKeyDictionary())
                met = by_model.setdefault(owner_of(model), WeakIdKeyDictionary())
                met.update((module, True) for module in found)


def _named(*programs: Any) -> list[nn.Module]:
    roots = {f"program {number}": program for number, program in enumerate(programs)}
    return outermost(thing for _, thing in referenced_objects(**roots))


def outermost(things: Iterable[Any]) -> list[nn.Module]:
    """Return the modules among some objects that are not part of another one of them."""
    found = [thing for thing in things if isinstance(thing, nn.Module)]
    inner = {id(child) for module in found for child in module.modules() if child is not module}
    return [module for module in found if id(module) not in inner]


def _outside(named: list[nn.Module], others: list[nn.Module]) -> list[nn.Module]:
    """Return the other modules that are not part of a named module."""
    known = {id(part) for module in named for part in module.modules()}
    return [module for module in others if id(module) not in known]


def _met_in(programs: tuple[Any, ...]) -> list[nn.Module]:
    """Return the remembered modules of all pairs whose guide and model are both given."""
    owners = {id(owner): owner for owner in map(owner_of, programs)}
    return [
        module
        for guide, by_model in _met.items()
        for model, met in by_model.items()
        if id(guide) in owners and id(model) in owners
        for module in met
    ]
