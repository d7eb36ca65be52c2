"""Run a network of the user and check that it returns one tensor."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class NetworkError(TypeError):
    """An encoder or decoder that does not take its inputs, or does not return one tensor."""


def output_of(name: str, network: Callable[..., Any], *inputs: Any, use: str) -> Tensor:
    """Return a network's output for some inputs.

    Args:
        name: name of the network in messages, such as ``"encoder"``.
        network: any function or module.
        *inputs: x or z, then the covariates.
        use: how to make one tensor of several, as the end of a message.

    Raises:
        NetworkError: The output is not a tensor, or the network takes fewer inputs.
    """
    try:
        output = network(*inputs)
    except TypeError as error:
        if len(inputs) > 1 and not _takes(network, inputs):
            raise NetworkError(_too_many(name, network, inputs)) from error
        raise
    if not isinstance(output, Tensor):
        raise NetworkError(f"the {name} must return one tensor, got {_kind(output)}. {use}")
    return output


def _takes(network: Callable[..., Any], inputs: tuple[Any, ...]) -> bool:
    function = network.forward if isinstance(network, nn.Module) else network
    try:
        inspect.signature(function).bind(*inputs)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return True
    return True


def _too_many(name: str, network: Callable[..., Any], inputs: tuple[Any, ...]) -> str:
    first = "z" if name == "decoder" else "x"
    kind = type(network).__name__ if isinstance(network, nn.Module) else "function"
    count = "1 covariate" if len(inputs) == 2 else f"{len(inputs) - 1} covariates"
    return (
        f"the {name} must take {first} and {count}, because it gets every column of the data "
        f"after x, but this {kind} does not take {len(inputs)} inputs. nets.Joined(network) "
        f"concatenates them. To use {first} alone, wrap the network in a module with "
        f"`def forward(self, {first}, *covariates): return self.network({first})`"
    )


def _kind(output: Any) -> str:
    if isinstance(output, dict):
        return f"a {type(output).__name__} with the keys {[*output]}"
    if isinstance(output, tuple | list):
        parts = ", ".join(type(part).__name__ for part in output)
        return f"a {type(output).__name__} ({parts})"
    return type(output).__name__
