"""A guide's reference to its model, which does not make the model a submodule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ModelRef:
    """A reference to a program that is not a submodule and is not copied with its owner.

    Args:
        program: the model.
    """

    def __init__(self, program: Callable[..., Any]):
        self.program = program

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelRef:
        """Refer to the same program, or to its copy if the same deepcopy has already copied it."""
        return ModelRef(memo.get(id(self.program), self.program))
