"""What the library must know of a program beyond calling it: its modules, parameters and mode.

Pyro keeps parameters by name in one global store, so that two pairs whose names agree would share
them, or leave one untrained. Here a pair has a store of its own from its first fit on, and every
function of the library that runs the pair opens that store. Pyro's own drivers (``SVI`` and the
like) go on to use the global one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from pyro_vae.modules import modules
from pyro_vae.traces import PairTrace, Program

Store = dict[str, dict[str, Any]]  # as in pyro.get_param_store().get_state()


@dataclass(frozen=True)
class _Fitted:
    """The store of a fitted pair, and which program met which parameters."""

    store: Store
    names: dict[str, frozenset[str]]  # of "model" and of "guide"

    def bare_names(self, program: str) -> list[str]:
        """Names of the program's pyro.param values, which no module holds."""
        params = self.store["params"]
        return sorted(
            name
            for name in self.names[program]
            if name in params and not isinstance(params[name], nn.Parameter)
        )


# By the owners of the guide and of the model, then by their methods. By identity, and weak: a
# pair's store ends with the pair.
_stores = WeakIdKeyDictionary()
_open_stores: list[Store] = []


@contextlib.contextmanager
def parameter_store(model: Program, guide: Program, *, fresh: bool = False) -> Iterator[Store]:
    """Open the parameter store of a pair, in place of Pyro's global one.

    A pair that was fitted has its own store. Another pair sees its modules' own parameters, the
    ``pyro.param`` values that one of its programs reached in a fit with another partner, and
    those of the global store; nothing that it registers outlasts the block.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        fresh: if the pair has no store, open a new one, to :func:`bind` it: with copies of what
            the global store holds, so that a pair trained by Pyro's ``SVI`` goes on from there.

    Yields:
        The store, brought up to date when the block ends.

    Raises:
        ValueError: the pair was not fitted, but one of its programs was with several partners,
            and reached other ``pyro.param`` values with each.

    Example:
        >>> import pyro, torch, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x, 1.0))
        >>> fit = pv.fit(model, guide, torch.full((10,), 3.0), batch_size=10, epochs=2,
        ...              learning_rate=0.1, progress=False)
        >>> with pv.parameter_store(model, guide):
        ...     print(f"{pyro.param('loc').item():.1f}")
        0.2
        >>> "loc" in pyro.get_param_store()
        False
    """
    require_programs(model, guide)
    store = _find(model, guide)
    if store is None:
        store = _copied_store() if fresh else _borrowed_store(model, guide)
    elif _open_stores and _open_stores[-1] is store:
        yield store
        return
    _open_stores.append(store)
    try:
        with pyro.get_param_store().scope(store):
            try:
                yield store
            finally:
                store.update(pyro.get_param_store().get_state())
    finally:
        _open_stores.pop()


def bind(model: Program, guide: Program, store: Store, trace: PairTrace) -> None:
    """Make a store the pair's own, for as long as the programs live.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        store: as :func:`parameter_store` yielded it.
        trace: a run of the pair, which tells whose each parameter is.
    """
    met = {program: trace.parameter_names(program) for program in ("model", "guide")}
    bind_names(model, guide, store, met)


def bind_names(
    model: Program, guide: Program, store: Store, met: Mapping[str, Iterable[str]]
) -> None:
    """Make a store the pair's own, as :func:`bind` does, where it is known without a run.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        store: as :func:`parameter_store` yielded it.
        met: names of the parameters that ``"model"`` and ``"guide"`` meet.
    """
    names = {program: frozenset(met[program]) for program in ("model", "guide")}
    try:
        by_model = _stores.setdefault(_owner(guide), WeakIdKeyDictionary())
        fitted = by_model.setdefault(_owner(model), {})
    except TypeError as error:
        raise TypeError(
            f"a program's object must allow weak references, but {error}: give its class a slot "
            "for them (dataclass(slots=True, weakref_slot=True)), or no slots"
        ) from error
    fitted[_methods(model, guide)] = _Fitted(store, names)


def names_met(model: Program, guide: Program) -> dict[str, list[str]]:
    """Return the ``pyro.param`` values that no module holds, by the program that met them in a fit.

    Open the pair's store around it. Of a pair that was not fitted, each program may have met all.
    """
    fitted, bare = _fitted(model, guide), bare_parameter_names()
    return {
        program: sorted(bare if fitted is None else bare & fitted.names[program])
        for program in ("model", "guide")
    }


def parameters(model: Program, guide: Program, trace: PairTrace) -> dict[str, list[torch.Tensor]]:
    """Return trainable tensors by program: those that a run met, and those of its own modules.

    Where both hold a parameter (methods of one module, a guide that keeps its model), what each
    depends on tells whose it is.

    Returns:
        Of ``"model"`` and of ``"guide"``; one that both use stands in both.
    """
    by_program = {}
    for name, program in (("model", model), ("guide", guide)):
        found = dict.fromkeys(trace.parameters(name))
        if isinstance(_owner(program), nn.Module):
            found |= dict.fromkeys(_owner(program).parameters())
        by_program[name] = [p for p in found if p.requires_grad]
    ids = set(map(id, by_program["guide"]))
    if both := [p for p in by_program["model"] if id(p) in ids]:
        used = trace.depends_on(both)
        # One that neither depends on in this run may be a branch's: it stays with both.
        whose = zip(both, used["model"], used["guide"], strict=True)
        elsewhere = {"model": set(), "guide": set()}
        for parameter, of_model, of_guide in whose:
            if of_model != of_guide:
                elsewhere["guide" if of_model else "model"].add(id(parameter))
        by_program = {
            name: [p for p in found if id(p) not in elsewhere[name]]
            for name, found in by_program.items()
        }
    return by_program


@contextlib.contextmanager
def evaluation_mode(*programs: Program) -> Iterator[None]:
    """Put the programs' modules into evaluation mode, without gradients; then back as they were."""
    flags = [(m, m.training) for root in modules(*programs) for m in root.modules()]
    try:
        for module, _ in flags:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def has_finite_parameters(model: Program, guide: Program) -> bool:
    """Tell whether no parameter of a pair is NaN or infinite, in the open store."""
    found = [p for module in modules(model, guide) for p in module.parameters()]
    found += [p for _, p in pyro.get_param_store().named_parameters()]
    return all(bool(parameter.isfinite().all()) for parameter in found)


def require_trainable_tensors(model: Program, guide: Program) -> None:
    """Refuse parameters and buffers made under ``torch.inference_mode``, which have no gradient.

    Raises:
        ValueError: a tensor of a module is one of these; the message names it.
    """
    for role, program in (("model", model), ("guide", guide)):
        for module in modules(program):
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                if tensor.is_inference():
                    raise ValueError(
                        f"{name!r} of the {role} was made under torch.inference_mode(), where "
                        "tensors can never take part in a gradient. Make model and guide outside "
                        "of that block, and call them there once if they make parameters at their "
                        "first call"
                    )


def require_programs(model: Program, guide: Program) -> None:
    """Refuse what cannot be called.

    Raises:
        TypeError: model or guide is no callable.
    """
    for name, program in (("model", model), ("guide", guide)):
        if not callable(program):
            raise TypeError(
                f"{name} must be a Pyro program, called with a minibatch; got {program!r}"
            )


def device_of(model: Program, guide: Program) -> torch.device:
    """Return the device of a pair's parameters: the CPU if it has none."""
    require_programs(model, guide)
    store = _find(model, guide) or pyro.get_param_store().get_state()
    of_modules = (p for module in modules(model, guide) for p in module.parameters())
    for parameter in (*of_modules, *store["params"].values()):
        return parameter.device
    return torch.device("cpu")


def _core(program: Program) -> Program:
    """The function or method inside partials and Pyro's handlers."""
    while isinstance(program, functools.partial):
        program = program.func if _handler(program) is None else program.args[-1]
    return program


def _handler(program: functools.partial) -> Messenger | None:
    """The handler, if this is one applied to a function: a partial of poutine's of the two."""
    return next((a for a in program.args if isinstance(a, Messenger)), None)


def _owner(program: Program) -> Any:
    """The object that a program lives as long as: itself, or a method's instance."""
    core = _core(program)
    return getattr(core, "__self__", core)


def _method(program: Program) -> Any:
    """What tells apart the programs of one owner: two partials with equal arguments are one."""
    method = getattr(_core(program), "__func__", None)
    if not isinstance(program, functools.partial):
        return method
    if (handler := _handler(program)) is not None:
        return method, handler  # not the function: the key must not keep its owner alive
    arguments = (program.args, frozenset(program.keywords.items()))
    try:
        hash(arguments)
    except TypeError:
        arguments = id(program)
    return method, arguments


def _methods(model: Program, guide: Program) -> tuple:
    return _method(model), _method(guide)


def _find(model: Program, guide: Program) -> Store | None:
    fitted = _fitted(model, guide)
    return None if fitted is None else fitted.store


def _fitted(model: Program, guide: Program) -> _Fitted | None:
    by_model = _stores.get(_owner(guide))
    by_methods = None if by_model is None else by_model.get(_owner(model))
    return None if by_methods is None else by_methods.get(_methods(model, guide))


def bare_parameter_names() -> set[str]:
    """Return the names of the open store's ``pyro.param`` values, which no module holds."""
    named = pyro.get_param_store().named_parameters()
    return {name for name, p in named if not isinstance(p, nn.Parameter)}


def _bare_store() -> Store:
    names = bare_parameter_names()
    state = pyro.get_param_store().get_state()
    return {kind: {name: values[name] for name in names} for kind, values in state.items()}


def _copied_store() -> Store:
    store = _bare_store()
    copies = {n: p.detach().clone().requires_grad_() for n, p in store["params"].items()}
    return {**store, "params": copies}


def _borrowed_store(model: Program, guide: Program) -> Store:
    """Make a store for a pair without its own.

    It holds ``pyro.param`` values alone. Modules bring their own parameters: entries that other
    modules left under the same names must not replace them.
    """
    borrowed = _bare_store()
    for role, partner, program in (("model", "guide", model), ("guide", "model", guide)):
        fits = [fitted for fitted in _fits(program, role) if fitted.bare_names(role)]
        if len(fits) > 1:
            raise ValueError(
                f"this {role} was fitted with {len(fits)} {partner}s, and pyro.param values such "
                f"as {fits[0].bare_names(role)[0]!r} may differ between those fits: which are "
                f"meant? Fit this pair too, or make the {role} a PyroModule that holds them."
            )
        for fitted in fits:
            for name in fitted.bare_names(role):
                for kind, values in fitted.store.items():
                    borrowed[kind][name] = values[name]
    return borrowed


def _fits(program: Program, role: str) -> list[_Fitted]:
    """Return the fits of a program, as the model or as the guide.

    If there are none of itself, those of its core: of the function inside its partials and
    handlers, or of any wrapped around it.
    """
    index = 0 if role == "model" else 1
    of_core = [
        (methods[index], fitted)
        for guide_owner, by_model in _stores.items()
        for model_owner, by_methods in by_model.items()
        for methods, fitted in by_methods.items()
        if (model_owner, guide_owner)[index] is _owner(program)
        and _function(methods[index]) is _function(_method(program))
    ]
    own = [fitted for method, fitted in of_core if method == _method(program)]
    return own or [fitted for _, fitted in of_core]


def _function(method: Any) -> Any:
    return method[0] if isinstance(method, tuple) else method
