"""The versions of the packages that a result depends on."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform


def versions() -> dict[str, str]:
    """Return the current versions of the packages and Python, and the date."""
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    found = {package: _version(package) for package in ("pyro_vae", "torch", "pyro-ppl")}
    return {**found, "python": platform.python_version(), "date": date}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # not installed, but run from source
        return "unknown"
