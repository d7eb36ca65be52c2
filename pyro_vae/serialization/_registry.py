"""The only classes that a recipe may name: components of this library and layers of torch.

A name in a file is looked up here. It never causes an import.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

from torch import nn

from pyro_vae import flows, guides, likelihoods, models, nets, priors, surjections
from pyro_vae.guides import _families as families

_PACKAGES = {
    "nets": nets,
    "priors": priors,
    "likelihoods": likelihoods,
    "models": models,
    "guides": guides,
    "flows": flows,
    "surjections": surjections,
}
# Former names of classes or of their folders, which older files have.
_FORMER = {
    "layers": "surjections",
    "models.FlowModel": "surjections.FlowModel",
    "guides.FlowGuide": "surjections.FlowGuide",
}
# Modules of torch that are no layers, or whose arguments are modules or numbers of the first input.
_NO_LAYER = re.compile(
    r"Lazy.*|Transformer.*|.*Loss|.*Loss2d|.*WithLoss|.*Base|Module|Container|Sequential|"
    r"ModuleList|ModuleDict|ParameterList|ParameterDict"
)
_RECURRENT = (nn.RNN, nn.GRU, nn.LSTM)  # their signatures are (*args, **kwargs)
NOT_READABLE = "whose arguments torch does not keep"
CONTAINERS = {"torch.nn.Sequential": nn.Sequential, "torch.nn.ModuleList": nn.ModuleList}


@functools.cache
def classes() -> dict[str, type]:
    """Return the classes by their names in recipes."""
    found: dict[str, type] = {}
    for package, module in _PACKAGES.items():
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing) and issubclass(thing, nn.Module):
                found[f"{package}.{name}"] = thing
    for thing in vars(families).values():
        if (
            inspect.isclass(thing)
            and issubclass(thing, families.Family)
            and thing is not families.Family
        ):
            found[f"families.{thing.__name__}"] = thing
    return found | {f"torch.nn.{cls.__name__}": cls for cls in layers_of_torch()}


@functools.cache
def layers_of_torch() -> tuple[type[nn.Module], ...]:
    """Return the classes of torch that a recipe may name."""
    names = [name for name in nn.modules.__all__ if not _NO_LAYER.fullmatch(name)]
    return tuple(getattr(nn, name) for name in names if hasattr(nn, name))


def signature_of(make: Any) -> inspect.Signature:
    """Return the signature of a class or function in a recipe."""
    if make not in _RECURRENT:
        return inspect.signature(make)
    signature = inspect.signature(nn.RNNBase)
    kept = [each for name, each in signature.parameters.items() if name != "mode"]
    kept = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in kept]
    if make is nn.RNN:
        kept.append(inspect.Parameter("nonlinearity", inspect.Parameter.KEYWORD_ONLY))
    return signature.replace(parameters=kept)


@functools.cache
def names() -> dict[type, str]:
    """Return the names in recipes by class."""
    return {cls: name for name, cls in classes().items()}


def find(name: Any) -> type:
    """Return the class with a name.

    Raises:
        ValueError: No class has this name.
    """
    if isinstance(name, str):
        folder, _, rest = name.partition(".")
        now = _FORMER.get(name) or f"{_FORMER.get(folder, folder)}.{rest}"
        if now in classes():
            return classes()[now]
    raise ValueError(f"this library has no class named {name!r}")


def arguments_of_layer(layer: nn.Module) -> dict[str, Any] | None:
    """Return the constructor arguments of a layer of torch, read from its attributes.

    Returns:
        The arguments, or None if the class is no layer of torch, or an argument is no attribute.
    """
    cls = type(layer)
    if cls not in layers_of_torch():
        return None
    arguments = {}
    for name, parameter in signature_of(cls).parameters.items():
        if name in ("device", "dtype", "args", "kwargs") or name.startswith("_"):
            continue
        if not hasattr(layer, name):
            if parameter.default is None:  # such as deprecated names of other arguments
                continue
            return None
        value = getattr(layer, name)
        arguments[name] = value is not None and value is not False if name == "bias" else value
    if cls in _RECURRENT and not arguments["proj_size"]:
        del arguments["proj_size"]  # only an LSTM takes it
    return arguments
