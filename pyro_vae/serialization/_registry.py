"""The only classes that a recipe may name: components of this library and layers of torch.

A name in a file is looked up here. It never causes an import.
"""

from __future__ import annotations

import functools
import inspect
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
# Layers of torch whose attributes are their constructor arguments.
_TORCH = (
    nn.AdaptiveAvgPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.Bilinear,
    nn.CELU, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
    nn.ConvTranspose3d, nn.Dropout, nn.Dropout2d, nn.ELU, nn.Embedding, nn.Flatten, nn.GELU,
    nn.GLU, nn.GroupNorm, nn.Hardtanh, nn.Identity, nn.LayerNorm, nn.LeakyReLU, nn.Linear,
    nn.LogSigmoid, nn.LogSoftmax, nn.MaxPool1d, nn.MaxPool2d, nn.Mish, nn.PixelShuffle, nn.ReLU,
    nn.ReLU6, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softmax, nn.Softplus, nn.Softsign, nn.Tanh,
    nn.Tanhshrink, nn.Unflatten, nn.Upsample,
)  # fmt: skip
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
    return found | {f"torch.nn.{cls.__name__}": cls for cls in _TORCH}


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
    """Return the constructor arguments of a torch layer, or None if it is not a known layer."""
    if type(layer) not in _TORCH:
        return None
    arguments = {}
    for name in inspect.signature(type(layer).__init__).parameters:
        if name in ("self", "device", "dtype", "args", "kwargs") or name.startswith("_"):
            continue
        value = getattr(layer, name, None)
        arguments[name] = value is not None if name == "bias" else value
    return arguments
