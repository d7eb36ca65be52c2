"""Find the torch modules that a program uses, wherever it keeps them.

Evaluation mode, devices and running averages belong to modules, and Pyro does not say which
modules a plain function runs: so they are looked for where its code can reach them by name.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from pyro_vae.reach import reach


def modules(*programs: Any) -> list[nn.Module]:
    """Return the modules that programs are, are methods of, hold, or refer to by name.

    Args:
        *programs: callables.
    """
    roots = {f"program {number}": program for number, program in enumerate(programs)}
    found = [thing for _, thing in reach(**roots) if isinstance(thing, nn.Module)]
    inner = {id(child) for module in found for child in module.modules() if child is not module}
    return [module for module in found if id(module) not in inner]
