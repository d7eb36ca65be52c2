"""Keep functions of ``torch.compile`` usable when their operations are recorded or tried."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def compiled_functions_run_eagerly() -> Iterator[None]:
    """Run functions of ``torch.compile`` eagerly inside the block.

    If torch met such a function under a dispatch mode, it would never run its compiled code again.
    And torch compiles a function at most eight times, by default. Checks of a pair, with other
    modes, hooks and shapes than the steps of a fit, would use up this number.

    torch can do this since version 2.6. Nothing is compiled yet if ``torch._dynamo`` is not loaded.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)
    loaded = "torch._dynamo" in sys.modules
    if set_stance is None or not loaded or torch.compiler.is_compiling():
        yield
        return
    with set_stance("force_eager"):
        yield
