"""A call as if it had not been: generators and tensors put back to where they were."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pyro_vae._utils.random import random_state


@contextlib.contextmanager
def same_noise(inputs: Sequence[Tensor]) -> Iterator[Callable[[], None]]:
    """Yield what puts torch's generators back to where they are now."""
    device = inputs[0].device
    state = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind() -> None:
        torch.set_rng_state(state)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)

    yield rewind


def generator_state(inputs: Sequence[Tensor]) -> Tensor:
    """Return where torch's generator of the inputs' device stands."""
    device = inputs[0].device
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def noise_from_elsewhere() -> list[list[int]]:
    """Return where the generators of Python and numpy stand."""
    state = random_state(torch.device("cpu"))
    return [state[name].tolist() for name in ("python", "numpy")]


@contextlib.contextmanager
def kept(tensors: Sequence[Tensor]) -> Iterator[Callable[[], None]]:
    """Yield what gives tensors the values back that they have now."""
    saved = [tensor.clone() for tensor in tensors]

    def restore() -> None:
        for tensor, value in zip(tensors, saved, strict=True):
            if not torch.equal(tensor, value):
                tensor.copy_(value)

    yield restore
