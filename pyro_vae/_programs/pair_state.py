"""The tensors of a pair, with names that are the same in another process."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae._programs import fits
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import free_param_names
from pyro_vae._utils import transform_config
from pyro_vae._utils.modules import NAME_IT, outermost, unnamed
from pyro_vae._utils.numerics import real_parts
from pyro_vae._utils.referenced_objects import referenced_objects

UNNAMED = "unnamed module"
FREE_PARAM = "param."  # prefix of the names of pyro.param values


def state(model: Program, guide: Program) -> dict[str, Tensor]:
    """Return the parameters and buffers of a pair by name, without copying them.

    The name of a module's tensor is the path to it, such as ``model.likelihood.net.0.weight``. A
    tensor that both programs hold has the shortest such name. A ``pyro.param`` value that no
    module holds is unconstrained; its name starts with ``param.``. Modules that cannot be found
    by name are numbered: ``unnamed module 1.weight``. Open the pair's
    :func:`pyro_vae.parameter_store` around the call, because it holds the ``pyro.param`` values.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [], 4)),
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(4, [8]))
        >>> sorted(name for name in state(model, guide) if name.startswith("guide"))
        ['guide.encoder.0.bias', 'guide.encoder.0.weight']
    """
    referenced = list(referenced_objects(model=model, guide=guide))
    without_name = unnamed(model, guide)
    of_modules = {
        id(tensor)
        for module in (*outermost(thing for _, thing in referenced), *without_name)
        for tensor in itertools.chain(module.parameters(), module.buffers())
    }
    found: dict[str, Tensor] = {}
    for name, thing in referenced:
        if id(thing) in of_modules:
            of_modules.remove(id(thing))
            found[_unused(name, found)] = thing
    for number, module in enumerate(without_name, 1):
        for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
            found[f"{UNNAMED} {number}.{name}"] = tensor
    named = dict(pyro.get_param_store().named_parameters())
    found |= {FREE_PARAM + name: named[name] for name in sorted(free_param_names())}
    return found


def digests(model: Program, guide: Program) -> dict[str, int]:
    """Return, by name, a number for each tensor of a pair that changes with the tensor's values.

    The number does not depend on the dtype or on the device, if the values are the same. Open the
    pair's store around the call.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
    """
    found = state(model, guide)
    sums = [digest(tensor).cpu() for tensor in found.values()]
    return dict(zip(found, torch.stack(sums).tolist() if sums else [], strict=True))


def changed(model: Program, guide: Program, before: Mapping[str, int]) -> list[str]:
    """Return the names of the tensors whose values have changed since the digests were computed.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        before: the result of :func:`digests`.
    """
    now = digests(model, guide) if before else {}
    return [name for name, digest in before.items() if now.get(name) != digest]


def digest(tensor: Tensor) -> Tensor:
    """Sum the bits of all entries modulo 2^64, each times a different odd number; dense only."""
    tensor = real_parts(tensor)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, part in enumerate(tensor.detach().flatten().split(_ENTRIES_AT_ONCE)):
        real = part.is_floating_point()
        bits = part.double().view(torch.int64) if real else part.long()
        first = 2 * number * _ENTRIES_AT_ONCE + 1
        odd = torch.arange(first, first + 2 * len(part), 2, device=tensor.device)
        total += ((bits ^ (bits >> 32)) * (odd * _ODD)).sum()
    return total


_ENTRIES_AT_ONCE = 1 << 20
_ODD = 0x1E3779B97F4A7C15


def require_names(model: Program, guide: Program) -> None:
    """Raise ValueError if a tensor of a pair cannot be found by name.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).

    Raises:
        ValueError: A module with tensors ran in the pair, but cannot be found by name.
    """
    for module in unnamed(model, guide):
        if any(True for _ in itertools.chain(module.parameters(), module.buffers())):
            raise ValueError(
                f"a {type(module).__name__} with parameters or buffers runs in model or guide, but "
                "could not be found by name, so its tensors have no name on disk. To save it, "
                f"{NAME_IT}."
            )


def require_parameters(model: Program, guide: Program) -> None:
    """Raise ValueError if a module that the programs make at each run has fitted parameters.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).

    Raises:
        ValueError: A fitted parameter belongs to a module that cannot be found by name.
    """
    fitted = fits.find(model, guide)
    if fitted is None:
        return
    named = set(map(id, state(model, guide).values()))
    for name in sorted(frozenset.union(*fitted.names.values())):
        parameter = fitted.store["params"].get(name)
        if isinstance(parameter, nn.Parameter) and id(parameter) not in named:
            raise ValueError(
                f"parameter {name!r} was fitted, but its module cannot be found by name, so "
                "the parameter would not be saved. Make its module once, before the fit, and "
                f"{NAME_IT}."
            )


def _unused(name: str, names: dict[str, Tensor]) -> str:
    """Append a number to a name that is in use, because tensors can share a path."""
    candidates = itertools.chain([name], (f"{name}#{number}" for number in itertools.count(2)))
    return next(candidate for candidate in candidates if candidate not in names)


def constraints_of_free_params() -> dict[str, Any]:
    """Return the constraints of ``pyro.param`` values that no module holds, by name.

    Raises:
        TypeError: A constraint of this kind cannot be saved.
    """
    constraints = pyro.get_param_store().get_state()["constraints"]
    names = free_param_names()
    return {
        FREE_PARAM + name: transform_config.to_config(constraints[name]) for name in sorted(names)
    }


def make_free_params(constraints: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
    """Register values in the open store that the programs have not requested yet.

    Args:
        constraints: the result of :func:`constraints_of_free_params`.
        values: unconstrained values by the same names.
    """
    store = pyro.get_param_store()
    names = sorted(constraints.keys() - {FREE_PARAM + known for known in store.keys()})  # noqa: SIM118
    bare = [name.removeprefix(FREE_PARAM) for name in names]
    made = [values[name].detach().clone().requires_grad_() for name in names]
    bounds = [transform_config.from_config(constraints[name]) for name in names]
    store.set_state(
        {
            "params": dict(zip(bare, made, strict=True)),
            "constraints": dict(zip(bare, bounds, strict=True)),
        }
    )
