"""Reproducible random numbers that do not change the process's own random state."""

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
    """Seed torch's generators inside the block, and restore them after it. None has no effect.

    Raises:
        TypeError: The seed is not an integer.
        ValueError: The seed has more than 64 bits.
    """
    if seed is None:
        yield
        return
    if not is_whole_number(seed):
        raise TypeError(f"seed must be an integer or None, got {seed!r}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError("seed must be an integer of 64 bits, got a larger one")
    with restored_generators():
        torch.manual_seed(int(seed))
        yield


@contextlib.contextmanager
def restored_generators() -> Iterator[None]:
    """Restore torch's generators to their previous state after the block."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextlib.contextmanager
def restored_generators_of_python() -> Iterator[None]:
    """Restore the generators of Python and numpy to their previous state after the block."""
    python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)  # noqa: NPY002


@contextlib.contextmanager
def separate_draws(*names: str) -> Iterator[None]:
    """Seed torch inside the block from its next random number and from names.

    The generators are restored after the block. So modules that a program creates in its first call
    depend on the seed, but do not change the call's own random numbers.
    """
    with restored_generators():
        number = torch.randint(2**62, (), device="cpu").item()
        torch.manual_seed(number ^ zlib.crc32(repr(names).encode()))
        yield


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's (CPU and device), Python's and numpy's generators."""
    _, internal, gauss = random.getstate()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.empty(0)
    return {
        "torch": torch.get_rng_state(),
        "device": on_device.to(torch.uint8),
        "python": _integers([*internal, gauss is not None, _bits(gauss or 0.0)]),
        "numpy": _integers(_of_numpy()),
    }


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore the generator states from :func:`random_state`."""
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
    """Return the state of numpy's legacy generator, or [] if it is not a Mersenne Twister."""
    state = np.random.get_state(legacy=False)  # noqa: NPY002
    if state["bit_generator"] != "MT19937":
        return []
    inner = state["state"]
    return [*inner["key"].tolist(), inner["pos"], state["has_gauss"], _bits(state["gauss"])]


def _integers(values: list[int]) -> Tensor:
    """Return a tensor of integers. From a long list, numpy makes it faster than torch."""
    return torch.from_numpy(np.array(values, dtype=np.int64))


def _bits(number: float) -> int:
    return int(np.float64(number).view(np.int64))


def _number(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))


class OwnSequence:
    """A separate random sequence of torch (CPU), Python and numpy.

    Args:
        seed: seed of the sequence.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._state: dict[str, Tensor] | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Use this sequence inside the block, continued from the end of the last block."""
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
    """Yield a function that restores the current states of torch's generators."""
    device = inputs[0].device
    state = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind() -> None:
        torch.set_rng_state(state)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)

    yield rewind


def generator_state(inputs: Sequence[Tensor]) -> Tensor:
    """Return the states of torch's generators: of the CPU, and of the inputs' device.

    A CUDA graph keeps a number that the CPU drew, so its replay leaves the CPU's generator behind.
    """
    device, states = inputs[0].device, [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def noise_from_elsewhere() -> list[list[int]]:
    """Return the states of Python's and numpy's generators."""
    state = random_state(torch.device("cpu"))
    return [state[name].tolist() for name in ("python", "numpy")]


@contextlib.contextmanager
def preserve_tensors(tensors: Sequence[Tensor]) -> Iterator[Callable[[], None]]:
    """Yield a function that restores the current values of tensors."""
    saved = [tensor.clone() for tensor in tensors]

    def restore() -> None:
        for tensor, value in zip(tensors, saved, strict=True):
            if not torch.equal(tensor, value):
                tensor.copy_(value)

    yield restore
