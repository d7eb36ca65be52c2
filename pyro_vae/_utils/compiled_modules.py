"""Run modules of ``torch.compile`` eagerly while a pair is checked."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator

import torch
from torch import nn


@contextlib.contextmanager
def compiled_modules_run_eagerly(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run the Python code of compiled modules inside the block.

    torch compiles a function at most eight times, by default, and after that runs it eagerly.
    Checks of a pair, with other modes, hooks and shapes than the steps of a fit, would use up this
    number. Functions that are not modules stay compiled, and so does ``torch.cond``.

    Args:
        modules: the modules, with their submodules.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled yet
        yield
        return
    parts = [part for module in modules for part in module.modules()]
    wrappers = [part for part in parts if isinstance(part, torch._dynamo.OptimizedModule)]
    forwards = [(part, vars(part)["forward"]) for part in wrappers]
    calls = [(part, part._compiled_call_impl) for part in parts if part._compiled_call_impl]
    try:
        for part in wrappers:
            vars(part)["forward"] = part._orig_mod.__call__
        for part, _ in calls:
            part._compiled_call_impl = None
        yield
    finally:
        for part, forward in forwards:
            vars(part)["forward"] = forward
        for part, call in calls:
            part._compiled_call_impl = call
