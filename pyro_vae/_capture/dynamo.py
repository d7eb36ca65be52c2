"""Keep functions of ``torch.compile`` usable when their operations are recorded."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def compiled_functions_run_eagerly() -> Iterator[None]:
    """Run functions of ``torch.compile`` eagerly inside the block.

    If torch met such a function under a dispatch mode, it would never run its compiled code again.
    torch can do this since version 2.6. Nothing is compiled yet if ``torch._dynamo`` is not loaded.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)
    if set_stance is None or "torch._dynamo" not in sys.modules:
        yield
        return
    with set_stance("force_eager"):
        yield
