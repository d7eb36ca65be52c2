"""Repeatable random numbers that leave the process's own sequence as it was."""

from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pyro_vae._utils.checks import is_whole_number


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed torch's generators inside the block; restore them after it. None changes nothing.

    Raises:
        TypeError: the seed is no whole number.
        ValueError: it has more than 64 bits.
    """
    if seed is None:
        yield
        return
    if not is_whole_number(seed):
        raise TypeError(f"seed must be a whole number or None, got {seed!r}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError("seed must be a number of 64 bits")
    with restored_generators():
        torch.manual_seed(int(seed))
        yield


@contextlib.contextmanager
def restored_generators() -> Iterator[None]:
    """Restore torch's generators after the block, so that they draw the same numbers again."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextlib.contextmanager
def separate_draws(*names: str) -> Iterator[None]:
    """Draw inside the block from a seed that depends on torch's next number and on names.

    The generators are restored after the block. So modules that a program makes at its first call
    follow the seed, and do not change the numbers that the call itself draws.
    """
    with restored_generators():
        number = torch.randint(2**62, (), device="cpu").item()
        torch.manual_seed(number ^ zlib.crc32(repr(names).encode()))
        yield


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return where the generators stand: torch's, on the CPU and the device, Python's, numpy's."""
    _, internal, gauss = random.getstate()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.empty(0)
    return {
        "torch": torch.get_rng_state(),
        "device": on_device.to(torch.uint8),
        "python": torch.tensor([*internal, gauss is not None, _bits(gauss or 0.0)]),
        "numpy": torch.tensor(_of_numpy()),
    }


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the generators back to where they stood at :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["device"], device)
    *internal, has_gauss, gauss = state["python"].tolist()
    random.setstate((random.getstate()[0], tuple(internal), _number(gauss) if has_gauss else None))
    if len(of_numpy := state["numpy"].tolist()):
        *keys, position, has_gauss, gauss = of_numpy
        keys = np.array(keys, dtype=np.uint32)
        np.random.set_state(("MT19937", keys, position, has_gauss, _number(gauss)))  # noqa: NPY002


def _of_numpy() -> list[int]:
    """Return where numpy's old generator stands; nothing, if somebody has put another there."""
    state = np.random.get_state(legacy=False)  # noqa: NPY002
    if state["bit_generator"] != "MT19937":
        return []
    inner = state["state"]
    return [*inner["key"].tolist(), inner["pos"], state["has_gauss"], _bits(state["gauss"])]


def _bits(number: float) -> int:
    return int(np.float64(number).view(np.int64))


def _number(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))


class OwnSequence:
    """Random numbers apart from the process's own: torch's on the CPU, Python's, numpy's.

    Args:
        seed: what they begin from.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._state: dict[str, Tensor] | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Draw from this sequence inside the block, where the last block left it."""
        cpu = torch.device("cpu")
        outside = random_state(cpu)
        if self._state is None:
            torch.default_generator.manual_seed(self._seed)
            random.seed(self._seed)
            np.random.seed(self._seed % 2**32)  # noqa: NPY002
        else:
            set_random_state(self._state, cpu)
        try:
            yield
        finally:
            self._state = random_state(cpu)
            set_random_state(outside, cpu)


@contextlib.contextmanager
def preserve_rng_state(inputs: Sequence[Tensor]) -> Iterator[Callable[[], None]]:
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
def preserve_tensors(tensors: Sequence[Tensor]) -> Iterator[Callable[[], None]]:
    """Yield what gives tensors the values back that they have now."""
    saved = [tensor.clone() for tensor in tensors]

    def restore() -> None:
        for tensor, value in zip(tensors, saved, strict=True):
            if not torch.equal(tensor, value):
                tensor.copy_(value)

    yield restore
