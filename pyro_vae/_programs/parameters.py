"""Find the modules and parameters of a program, and give each fitted pair its own store.

Pyro keeps parameters by name in one global store. Two pairs with equal names would share their
parameters, or leave one pair's untrained. Here each pair gets its own store at its first fit, and
every function of the library that runs the pair opens that store. Pyro's own drivers, such as
``SVI``, still use the global store.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import pyro
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pyro_vae._programs import fits
from pyro_vae._programs.fits import Store
from pyro_vae._programs.pair_trace import PairTrace, Program
from pyro_vae._utils.checks import check_call
from pyro_vae._utils.identity import is_blocked, owner_of
from pyro_vae._utils.modules import modules
from pyro_vae._utils.referenced_objects import referenced_objects
from pyro_vae._utils.user_warnings import warn_user

_open_stores: list[Store] = []


@contextlib.contextmanager
def parameter_store(model: Program, guide: Program, *, fresh: bool = False) -> Iterator[Store]:
    """Open the parameter store of a pair instead of Pyro's global one.

    A fitted pair has its own store. For any other pair, the store has the pair's module
    parameters and the ``pyro.param`` values of the global store. It also has those that one of
    its programs used in a fit with another partner. New entries are lost when the block ends.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        fresh: for a pair without a store, open a new one that :func:`bind` can assign to it. It
            starts with copies of the global store's values, so that the fit continues from a pair
            trained by Pyro's ``SVI``.

    Yields:
        The store; it gets the new values when the block ends.

    Raises:
        ValueError: The pair was not fitted, but one of its programs was fitted with several
            partners, and used different ``pyro.param`` values with each.

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
    check_call(parameter_store, locals())
    require_programs(model, guide)
    fitted = fits.find(model, guide)
    store = None if fitted is None else fitted.store
    if store is None:
        store = _copied_store() if fresh else _borrowed_store(model, guide)
    elif _open_stores and _open_stores[-1] is store:
        store.update(pyro.get_param_store().get_state())  # the outer block has not ended
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
    """Assign a store to a pair, for as long as the programs exist.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        store: the store that :func:`parameter_store` yielded.
        trace: a run of the pair, from which the names of each program's parameters are read.
    """
    met = {program: trace.parameter_names(program) for program in ("model", "guide")}
    bind_names(model, guide, store, met)


def bind_names(
    model: Program, guide: Program, store: Store, met: Mapping[str, Iterable[str]]
) -> None:
    """Assign a store to a pair, like :func:`bind`, from known names instead of a run.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        store: the store that :func:`parameter_store` yielded.
        met: names of the parameters that the ``"model"`` and the ``"guide"`` use.
    """
    names = {program: frozenset(met[program]) for program in ("model", "guide")}
    fits.keep(model, guide, fits.Fitted(store, names))


def param_names_used(model: Program, guide: Program) -> dict[str, list[str]]:
    """Return, by program, the names of the ``pyro.param`` values that it used in a fit.

    Values that belong to a module are left out. Open the pair's store around the call. For a pair
    that was not fitted, all values are returned for both programs.
    """
    fitted, bare = fits.find(model, guide), free_param_names()
    return {
        program: sorted(bare if fitted is None else bare & fitted.names[program])
        for program in ("model", "guide")
    }


def parameters_of(
    model: Program, guide: Program, trace: PairTrace
) -> dict[str, list[torch.Tensor]]:
    """Return trainable tensors by program: those used in a run, and those of its own modules.

    Both programs may hold a parameter (methods of one module, a guide that keeps its model). It
    then belongs to the programs whose densities or samples depend on it.

    Returns:
        For ``"model"`` and for ``"guide"``; a parameter that both use is in both lists.
    """
    by_program = {}
    for name, program in (("model", model), ("guide", guide)):
        found = dict.fromkeys(trace.parameters(name))
        own = _of_owner(program)
        if is_blocked(program):  # leave out parameters that the run made and the block hides
            hidden = _ids_in_store()
            own = [p for p in own if id(p) not in hidden]
        found |= dict.fromkeys(own)
        by_program[name] = [p for p in found if p.requires_grad]
    ids = set(map(id, by_program["guide"]))
    if both := [p for p in by_program["model"] if id(p) in ids]:
        used = trace.depends_on(both)
        # If neither program depends on it in this run, another branch may use it: keep it in both.
        whose = zip(both, used["model"], used["guide"], strict=True)
        elsewhere: dict[str, set[int]] = {"model": set(), "guide": set()}
        for parameter, of_model, of_guide in whose:
            if of_model != of_guide:
                elsewhere["guide" if of_model else "model"].add(id(parameter))
        by_program = {
            name: [p for p in found if id(p) not in elsewhere[name]]
            for name, found in by_program.items()
        }
    return by_program


def warn_of_untrained(
    model: Program, guide: Program, trace: PairTrace, trained: Iterable[torch.Tensor]
) -> None:
    """Warn if the densities of a run depend on parameters that a fit does not train.

    Such parameters belong to modules that the programs use through a function, without
    ``pyro.module``. Parameters that a handler hides are left out.
    """
    known = {id(p) for p in (*trained, *_of_owner(model), *_of_owner(guide))} | _ids_in_store()
    free = {
        id(thing): (name, thing)
        for name, thing in reversed([*referenced_objects(model=model, guide=guide)])
        if isinstance(thing, torch.Tensor)
        and thing.is_leaf
        and thing.requires_grad
        and id(thing) not in known
    }
    if not free:
        return
    names, tensors = map(list, zip(*free.values(), strict=True))
    used = map(any, zip(*trace.depends_on(tensors).values(), strict=True))
    if found := sorted(name for name, is_used in zip(names, used, strict=True) if is_used):
        names = f"{found[0]!r}" + (f" and {len(found) - 1} more" if len(found) > 1 else "")
        warn_user(
            f"the densities depend on the parameter {names}, which the fit does not train, because "
            "no program registers it. Pass the module itself instead of a function that calls it, "
            "or call pyro.module(name, module) in the program. If it should not be trained, call "
            "requires_grad_(False) on it"
        )


def has_finite_parameters(model: Program, guide: Program) -> bool:
    """Return whether all parameters of a pair in the open store are finite."""
    found = [p for module in modules(model, guide) for p in module.parameters()]
    found += [p for _, p in pyro.get_param_store().named_parameters()]
    return all(bool(parameter.isfinite().all()) for parameter in found)


def require_trainable_tensors(model: Program, guide: Program) -> None:
    """Raise ValueError if a parameter or buffer cannot have a gradient.

    Raises:
        ValueError: A tensor of a module was made under ``torch.inference_mode``, or belongs to a
            lazy layer of torch that was never called.
    """
    for role, program in (("model", model), ("guide", guide)):
        for module in modules(program):
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                if is_lazy(tensor):
                    raise ValueError(
                        f"{name!r} of the {role} has no values yet, because its layer is lazy. "
                        "Call the layer once on data of the right shape, or use a layer with a "
                        "given size"
                    )
                if tensor.is_inference():
                    raise ValueError(
                        f"{name!r} of the {role} was made under torch.inference_mode(), where "
                        "tensors cannot have a gradient. Make model and guide outside of that "
                        "block. If they make parameters at their first call, also call them there "
                        "once"
                    )


def require_programs(model: Program, guide: Program) -> None:
    """Raise TypeError if the model or the guide is not callable.

    Raises:
        TypeError: The model or the guide is not callable.
    """
    for name, program in (("model", model), ("guide", guide)):
        if not callable(program):
            raise TypeError(
                f"{name} must be a Pyro program that is called with a minibatch; got {program!r}"
            )


def device_of(model: Program, guide: Program) -> torch.device:
    """Return the device of a pair's parameters, or the CPU for a pair without parameters."""
    require_programs(model, guide)
    fitted = fits.find(model, guide)
    own = fits.borrowed(model, guide) if fitted is None else fitted.store
    of_modules = (p for module in modules(model, guide) for p in module.parameters())
    of_pyro = pyro.get_param_store().get_state()["params"] if fitted is None else {}
    for parameter in (*of_modules, *own["params"].values(), *of_pyro.values()):
        return parameter.device
    return torch.device("cpu")


def _of_owner(program: Program) -> list[nn.Parameter]:
    owner = owner_of(program)
    return [*owner.parameters()] if isinstance(owner, nn.Module) else []


def _ids_in_store() -> set[int]:
    return {id(parameter) for _, parameter in pyro.get_param_store().named_parameters()}


def free_param_names() -> set[str]:
    """Return the names of the ``pyro.param`` values in the open store that no module holds."""
    named = pyro.get_param_store().named_parameters()
    return {name for name, p in named if not isinstance(p, nn.Parameter)}


def _bare_store() -> Store:
    names = free_param_names()
    state = pyro.get_param_store().get_state()
    return {kind: {name: values[name] for name in names} for kind, values in state.items()}


def _copied_store() -> Store:
    store = _bare_store()
    copies = {n: p.detach().clone().requires_grad_() for n, p in store["params"].items()}
    return {**store, "params": copies}


def _borrowed_store(model: Program, guide: Program) -> Store:
    """Return a store for a pair without its own.

    It holds only ``pyro.param`` values. Modules bring their own parameters, which must not be
    replaced by entries of other modules under the same names.
    """
    borrowed = _bare_store()
    for kind, values in fits.borrowed(model, guide).items():
        borrowed[kind] |= values
    return borrowed
