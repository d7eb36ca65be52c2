"""The versions of the packages that a result depends on."""

from __future__ import annotations

import datetime
import platform

import pyro
import torch

import pyro_vae


def versions() -> dict[str, str]:
    """Return the current versions of the packages and Python, and the date."""
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {
        "pyro_vae": pyro_vae.__version__,
        "torch": torch.__version__,
        "pyro-ppl": pyro.__version__,
        "python": platform.python_version(),
        "date": date,
    }
