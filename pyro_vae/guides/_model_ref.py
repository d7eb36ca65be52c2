"""A guide's hold on the model it was made for, which is not a part of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ModelRef:
    """A program that is neither a submodule nor copied with what holds it.

    Args:
        program: the model.
    """

    def __init__(self, program: Callable[..., Any]):
        self.program = program

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelRef:
        """Hold the same program; or its copy, if both are copied at once, the program first."""
        return ModelRef(memo.get(id(self.program), self.program))
