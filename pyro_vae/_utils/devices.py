"""The device that a user names."""

from __future__ import annotations

import os

import torch

from pyro_vae._utils.distributed import num_processes
from pyro_vae._utils.messages import first_line


def torch_device(device: str | torch.device) -> torch.device:
    """Return the device of a fit. ``"auto"`` is CUDA if torch can use it, else the CPU.

    Raises:
        ValueError: torch cannot use the device.
    """
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        here = int(os.environ.get("LOCAL_RANK", "0"))  # set by torchrun, one GPU per process
        return torch.device("cuda", here) if num_processes() > 1 else torch.device("cuda")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:  # torch does not have this device
        raise ValueError(
            f'device {device!r} cannot be used here: {first_line(error)}. Pass "auto" or a device '
            "of torch"
        ) from error
    return torch.device(device)
