"""Run programs on trial, without an effect on their modules, parameters or random numbers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Container, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.params.param_store import ParamStoreDict
from torch import Tensor, nn

from pyro_vae._utils.code_names import MACHINERY, package
from pyro_vae._utils.compiled_modules import compiled_modules_run_eagerly
from pyro_vae._utils.modules import before_unknown, modules
from pyro_vae._utils.random import restored_generators, restored_generators_of_python

# A lack of memory says nothing of a program, so no trial run may be judged by it.
OUT_OF_MEMORY = (MemoryError, torch.cuda.OutOfMemoryError)
_NUMBERS = (bool, int, float, str, type(None))
# Elements of a tensor that is not a buffer. A larger one is data, which a step does not change.
LARGEST_COPIED = 2**22
_OF_MODULES = frozenset(vars(nn.Module()))  # such as the dictionary of parameters
# The modules that are found in the outermost trial run, None outside of it.
_modules: ContextVar[list[nn.Module] | None] = ContextVar("modules", default=None)


@contextlib.contextmanager
def trial_run(*programs: Callable[..., Any]) -> Iterator[None]:
    """Restore after the block all state that a run of programs may change.

    This is the state of the generators of torch, Python and numpy, the buffers, tensors, numbers
    and modes of modules, and the names in Pyro's parameter store. Gradients are off in the block.
    Handlers outside of the block do not see its sites. If the block raises an error, modules also
    get all of their attributes back, because a run that failed may leave some of them half changed.

    Args:
        *programs: the programs that run in the block. Their modules are searched by name, which
            takes milliseconds. Other modules are found when they run. A block inside another one
            uses the modules of the outer one.
    """
    states: list[ModuleState] = []
    outer = _modules.get()
    found = [] if outer is None else outer
    token = None if outer is not None else _modules.set(found)

    def remember(module: nn.Module) -> None:
        found.append(module)
        states.extend(ModuleState(part) for part in module.modules())

    with contextlib.ExitStack() as stack:
        if outer is None:
            stack.callback(_modules.reset, token)
            for module in modules(*programs):
                remember(module)
            stack.enter_context(before_unknown(remember, *found))
            stack.enter_context(compiled_modules_run_eagerly(found))
        else:
            for module in outer:
                states.extend(ModuleState(part) for part in module.modules())
        try:
            with (
                restored_generators(),
                restored_generators_of_python(),
                torch.no_grad(),
                poutine.block(),
                kept_parameter_names(),
            ):
                yield
        except BaseException:
            for state in reversed(states):
                state.roll_back()
            raise
        finally:
            for state in reversed(states):
                state.restore()


@contextlib.contextmanager
def kept_parameter_names() -> Iterator[None]:
    """Remove the names that runs in the block add to Pyro's parameter store."""
    store = pyro.get_param_store()
    names = set(store.keys())
    try:
        yield
    finally:
        _keep_names(store, names)


def _keep_names(store: ParamStoreDict, names: set[str]) -> None:
    """Remove all other names from a store.

    Pyro's own ``del store[name]`` fails for a parameter that the run gave a second name, as a guide
    has inside of a prior.
    """
    if store.keys() == names:
        return
    kept = {
        kind: {name: value for name, value in values.items() if name in names}
        for kind, values in store.get_state().items()
    }
    for name in store:
        store[name]  # restores the reference param.unconstrained, which get_state removes
    store.clear()
    store.set_state(kept)


class ModuleState:
    """The buffers, tensors, numbers and mode of one module without its submodules.

    Lists, dictionaries and sets of tensors and numbers are part of it, too.

    Args:
        module: the module.
        copied: ids of tensors whose values the caller restores.
        largest: number of elements above which a tensor that is not a buffer counts as data, whose
            values do not change.
    """

    def __init__(self, module: nn.Module, copied: Container[int] = (), largest: float = math.inf):
        self._module = module
        self._attributes = dict(vars(module))
        self._contents = {
            name: (value, value.copy())
            for name, value in self._attributes.items()
            if isinstance(value, dict | list | set)
        }
        self._buffers = dict(module.named_buffers(recurse=False))
        self._values = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, Tensor) or type(value) in _NUMBERS
        }
        of_libraries = package(type(module)) in MACHINERY
        self._collections = [
            (container, content)
            for name, (container, content) in self._contents.items()
            if not (name in _OF_MODULES or (of_libraries and name.startswith("_")))
            and _is_collection(content)
        ]
        inside = [t for _, each in self._collections for t in _elements(each)]
        others = [t for t in (*self._values.values(), *inside) if isinstance(t, Tensor)]
        tensors = (*self._buffers.values(), *(t for t in others if t.numel() <= largest))
        self._copies = [
            (t, t.detach().clone())
            for t in tensors
            if isinstance(t, Tensor)
            and not isinstance(t, nn.parameter.UninitializedTensorMixin | nn.Parameter)
            and id(t) not in copied
        ]

    def roll_back(self) -> None:
        """Give the module its attributes, and dictionaries, lists and sets their contents."""
        if isinstance(self._module, torch.jit.ScriptModule):
            return
        vars(self._module).clear()
        vars(self._module).update(self._attributes)
        for container, content in self._contents.values():
            _fill(container, content)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the module its values from the time of creation."""
        for tensor, copy in self._copies:
            if not _are_equal(tensor, copy):
                tensor.copy_(copy)
        if isinstance(self._module, torch.jit.ScriptModule):
            return
        for name, value in self._values.items():
            if vars(self._module).get(name) is not value:
                vars(self._module)[name] = value
        for name, buffer in self._buffers.items():
            if self._module._buffers.get(name) is not buffer:
                self._module._buffers[name] = buffer
        for container, content in self._collections:
            if _is_collection(container):
                _fill(container, content)


def _is_collection(container: Any) -> bool:
    """Return whether a list, dictionary or set holds only tensors and numbers."""
    return all(isinstance(e, Tensor) or type(e) in _NUMBERS for e in _elements(container))


def _elements(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _fill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


def _are_equal(tensor: Tensor, copy: Tensor) -> bool:
    """Return whether two tensors are equal; NaN values at the same places are equal."""
    if tensor.shape != copy.shape:
        return False
    return bool(((tensor == copy) | ((tensor != tensor) & (copy != copy))).all())
