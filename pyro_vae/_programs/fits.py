"""The fits of this process: the store of each fitted pair, and its use by other pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from pyro_vae._programs.pair_trace import Program
from pyro_vae._utils.identity import function_of, method_of, owner_of
from pyro_vae._utils.referenced_objects import referenced_objects

Store = dict[str, dict[str, Any]]  # as in pyro.get_param_store().get_state()
ROLES = ("model", "guide")


@dataclass(frozen=True, eq=False)
class Fitted:
    """The store of a fitted pair, and the names of the parameters that each program used.

    Args:
        store: the parameters; fits of the pair change them in place.
        names: names of the parameters that ``"model"`` and ``"guide"`` used.
        digests: digests of the pair's tensors at the end of its last fit, by name.
    """

    store: Store
    names: dict[str, frozenset[str]]
    digests: dict[str, int] = field(default_factory=dict)

    def free_param_names(self, role: str) -> list[str]:
        """Return the names of a program's pyro.param values that no module holds."""
        params = self.store["params"]
        return sorted(
            name
            for name in self.names[role]
            if name in params and not isinstance(params[name], nn.Parameter)
        )


# Keys: the owner of the guide, the owner of the model, then their methods. Owners are compared by
# identity and held weakly, so a pair's store is deleted with the pair.
_fits = WeakIdKeyDictionary()


def keep(model: Program, guide: Program, fitted: Fitted) -> None:
    """Keep the fit of a pair for as long as both programs exist.

    Raises:
        TypeError: A program, or the object of its method, does not allow weak references.
    """
    try:
        by_model = _fits.setdefault(owner_of(guide), WeakIdKeyDictionary())
        by_methods = by_model.setdefault(owner_of(model), {})
    except TypeError as error:
        raise TypeError(
            f"a program's object must allow weak references, but {error}. Give its class a slot "
            "for them (dataclass(slots=True, weakref_slot=True)), or no slots"
        ) from error
    by_methods[method_of(model), method_of(guide)] = fitted


def find(model: Program, guide: Program) -> Fitted | None:
    """Return the fit of exactly this pair, or None if it was not fitted."""
    by_model = _fits.get(owner_of(guide))
    by_methods = None if by_model is None else by_model.get(owner_of(model))
    return None if by_methods is None else by_methods.get((method_of(model), method_of(guide)))


def borrowed(model: Program, guide: Program) -> Store:
    """Return the ``pyro.param`` values that the programs of an unfitted pair used in fits.

    The fits of a program are the first of these that exist:

    1. fits of the program itself,
    2. fits of the function inside its partials and handlers,
    3. fits of programs that its code refers to, such as the closure of ``lambda x: model(x)``,
    4. fits of programs whose code refers to it.

    Fits that belong to both programs have priority.

    Raises:
        ValueError: There are several such fits, with different values of one name.
    """
    found = {role: _fits_of(p, role) for role, p in zip(ROLES, (model, guide), strict=True)}
    of_both = [fitted for fitted in found["model"] if fitted in found["guide"]]
    borrowed: Store = {"params": {}, "constraints": {}}
    for role in ROLES:
        for fitted in of_both or found[role]:
            for name in fitted.free_param_names(role):
                value = fitted.store["params"][name]
                if borrowed["params"].setdefault(name, value) is not value:
                    raise _ambiguous(role, name, found[role])
                borrowed["constraints"][name] = fitted.store["constraints"][name]
    return borrowed


def _ambiguous(role: str, name: str, found: list[Fitted]) -> ValueError:
    partner = "guide" if role == "model" else "model"
    partners = {id(owner) for owner, _, fitted in _all(partner) if fitted in found}
    if len(partners) > 1:
        how = f"this {role}, or a program that it calls, was fitted with {len(partners)} {partner}s"
    elif len(found) > 1:
        how = f"this {role} calls or is called by {len(found)} programs that were fitted"
    else:
        how = "model and guide were fitted with other partners"
    return ValueError(
        f"{how}, and pyro.param values such as {name!r} may differ between those fits. Pass the "
        f"programs that were fitted, fit this pair too, or make the {role} a PyroModule that holds "
        "these values."
    )


def _fits_of(program: Program, role: str) -> list[Fitted]:
    """Return the fits of a program that have values for its role."""
    kept = [each for each in _all(role) if each[2].free_param_names(role)]
    if not kept:
        return []
    owner, method = owner_of(program), method_of(program)
    of_function = [
        (its_method, fitted)
        for its_owner, its_method, fitted in kept
        if its_owner is owner and function_of(its_method) is function_of(method)
    ]
    if found := [fitted for its_method, fitted in of_function if its_method == method]:
        return found
    if of_function:
        return [fitted for _, fitted in of_function]
    within = {id(thing) for _, thing in referenced_objects(program=program)}
    if found := [fitted for its_owner, _, fitted in kept if id(its_owner) in within]:
        return found
    return [
        fitted
        for its_owner, its_method, fitted in kept
        if any(thing is owner for _, thing in referenced_objects(program=(its_owner, its_method)))
    ]


def _all(role: str) -> Iterator[tuple[Any, Any, Fitted]]:
    """Yield the owner and the method of each fitted program of a role, and the fit."""
    index = ROLES.index(role)
    for guide_owner, by_model in _fits.items():
        for model_owner, by_methods in by_model.items():
            for methods, fitted in by_methods.items():
                yield (model_owner, guide_owner)[index], methods[index], fitted
