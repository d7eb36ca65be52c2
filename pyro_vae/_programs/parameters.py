"""What the library must know of a program beyond calling it: its modules, parameters and mode.

Pyro keeps parameters by name in one global store, so that two pairs whose names agree would share
them, or leave one untrained. Here a pair has a store of its own from its first fit on, and every
function of the library that runs the pair opens that store. Pyro's own drivers (``SVI`` and the
like) go on to use the global one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import pyro
import torch
from torch import nn

from pyro_vae._programs import fits
from pyro_vae._programs.fits import Store
from pyro_vae._programs.pair_trace import PairTrace, Program
from pyro_vae._utils.checks import check_call
from pyro_vae._utils.identity import owner_of
from pyro_vae._utils.modules import before_unknown, modules

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
    check_call(parameter_store, locals())
    require_programs(model, guide)
    fitted = fits.find(model, guide)
    store = None if fitted is None else fitted.store
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
    fits.keep(model, guide, fits.Fitted(store, names))


def param_names_used(model: Program, guide: Program) -> dict[str, list[str]]:
    """Return the ``pyro.param`` values that no module holds, by the program that met them in a fit.

    Open the pair's store around it. Of a pair that was not fitted, each program may have met all.
    """
    fitted, bare = fits.find(model, guide), free_param_names()
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
        if isinstance(owner_of(program), nn.Module):
            found |= dict.fromkeys(owner_of(program).parameters())
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
    """Put the programs' modules into evaluation mode, without gradients; then back as they were.

    Modules that no name leads to follow just before they run for the first time, if that is among
    the first thousand runs of modules in the block.
    """
    flags: list[tuple[nn.Module, bool]] = []

    def evaluate(module: nn.Module) -> None:
        flags.extend((part, part.training) for part in module.modules())
        module.eval()

    found = modules(*programs)
    try:
        for module in found:
            evaluate(module)
        with torch.no_grad(), before_unknown(evaluate, *found, calls=_RUNS_LOOKED_AT):
            yield
    finally:
        for module, training in reversed(flags):  # one that two modules share stands here twice
            if type(module).train is not nn.Module.train:  # it may do more than to set the flag
                module.train(training)
        for module, training in reversed(flags):
            module.training = training


_RUNS_LOOKED_AT = 1000  # of modules: looks take a millisecond in all


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
    fitted = fits.find(model, guide)
    own = fits.borrowed(model, guide) if fitted is None else fitted.store
    of_modules = (p for module in modules(model, guide) for p in module.parameters())
    of_pyro = pyro.get_param_store().get_state() if fitted is None else {"params": {}}
    for parameter in (*of_modules, *own["params"].values(), *of_pyro["params"].values()):
        return parameter.device
    return torch.device("cpu")


def free_param_names() -> set[str]:
    """Return the names of the open store's ``pyro.param`` values, which no module holds."""
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
    """Make a store for a pair without its own.

    It holds ``pyro.param`` values alone. Modules bring their own parameters: entries that other
    modules left under the same names must not replace them.
    """
    borrowed = _bare_store()
    for kind, values in fits.borrowed(model, guide).items():
        borrowed[kind] |= values
    return borrowed
