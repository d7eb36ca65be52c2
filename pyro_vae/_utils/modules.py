"""Find the torch modules that a program uses, wherever it keeps them.

Evaluation mode, devices and running averages belong to modules, and Pyro does not say which
modules a plain function runs: so they are looked for where its code can reach them by name. Those
that no name leads to are met when they run.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from pyro_vae._utils.identity import owner_of
from pyro_vae._utils.referenced_objects import referenced_objects

NAME_IT = (
    "let the program's code name it, by a closure, a global, a default argument, an attribute or a "
    "container"
)
# By the owners of guide and model: modules that ran in the pair, and that no name leads to. All
# are held weakly.
_met = WeakIdKeyDictionary()


def modules(*programs: Any) -> list[nn.Module]:
    """Return the modules that programs are, are methods of, hold, or refer to by name.

    Modules that :func:`remember_unnamed` met in the programs come last.

    Args:
        *programs: callables.
    """
    found = _named(*programs)
    return [*found, *_outside(found, _met_in(programs))]


def unnamed(*programs: Any) -> list[nn.Module]:
    """Return those of :func:`modules` that no name leads to."""
    met = _met_in(programs)
    return _outside(_named(*programs), met) if met else []


@contextlib.contextmanager
def before_unknown(
    act: Callable[[nn.Module], None], *known: nn.Module, calls: int | None = None
) -> Iterator[None]:
    """Call a function with each module that is about to run and is unknown, each once.

    Modules in other threads are left alone.

    Args:
        act: the function.
        *known: modules, which with all parts of theirs are known.
        calls: how many runs of modules are looked at; None for all. A look takes a microsecond.
    """
    seen = {id(part): part for module in known for part in module.modules()}
    thread, count = threading.get_ident(), 0

    def look(module: nn.Module, _: Any) -> None:
        nonlocal count
        # The compiler of a module that runs writes down what it does, which this is no part of.
        if torch.compiler.is_compiling() or threading.get_ident() != thread:
            return
        count += 1
        if count == calls:
            handle.remove()
        if id(module) not in seen:
            seen.update((id(part), part) for part in module.modules())
            act(module)

    handle = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def remember_unnamed(model: Any, guide: Any) -> Iterator[None]:
    """Let :func:`modules` return the modules, too, that run in the block and that no name leads to.

    Args:
        model: a callable.
        guide: another; the block must run these two and nothing else.
    """
    ran: list[nn.Module] = []
    try:
        with before_unknown(ran.append, *modules(model, guide)):
            yield
    finally:
        if found := _outside(_named(model, guide), ran):  # the run may have made some, and named it
            with contextlib.suppress(TypeError):  # an owner that allows no weak references
                by_model = _met.setdefault(owner_of(guide), WeakIdKeyDictionary())
                met = by_model.setdefault(owner_of(model), WeakIdKeyDictionary())
                met.update((module, True) for module in found)


def _named(*programs: Any) -> list[nn.Module]:
    roots = {f"program {number}": program for number, program in enumerate(programs)}
    found = [thing for _, thing in referenced_objects(**roots) if isinstance(thing, nn.Module)]
    inner = {id(child) for module in found for child in module.modules() if child is not module}
    return [module for module in found if id(module) not in inner]


def _outside(named: list[nn.Module], others: list[nn.Module]) -> list[nn.Module]:
    """Return those of the others that are no parts of what is named."""
    known = {id(part) for module in named for part in module.modules()}
    return [module for module in others if id(module) not in known]


def _met_in(programs: tuple[Any, ...]) -> list[nn.Module]:
    """Return what was met in pairs of which both programs are among these."""
    owners = {id(owner): owner for owner in map(owner_of, programs)}
    return [
        module
        for guide, by_model in _met.items()
        for model, met in by_model.items()
        if id(guide) in owners and id(model) in owners
        for module in met
    ]
