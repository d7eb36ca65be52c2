"""Import optional packages, which extras of the library install."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: Name of the module, as in ``import``.
        extra: Name of the extra that installs the package.
        purpose: The part of the library that needs it, the first words of the message.

    Raises:
        ImportError: The package, or one of its dependencies, is not installed.

    Example:
        >>> require("matplotlib.figure", "report", "A plot").Figure(figsize=(2, 1))
        <Figure size 200x100 with 0 Axes>
        >>> require("no_such_package", "report", "A plot")
        Traceback (most recent call last):
        ImportError: A plot needs no_such_package, which is not installed. Install it with
            pip install 'pyro_vae[report]'.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{purpose} needs {error.name or module}, which is not installed. Install it with "
            f"pip install 'pyro_vae[{extra}]'.",
            name=error.name,
        ) from error
