"""A guide's reference to its model, which does not make the model a submodule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ModelRef:
    """A reference to a program that is not a submodule and is not copied with its owner.

    Args:
        program: the model.
    """

    # referenced_objects does not search slots of the library, so it does not find the copies.
    __slots__ = ("__dict__", "_copies")

    def __init__(self, program: Callable[..., Any]):
        self.__dict__["program"] = program
        self._copies: dict[int, Any] | None = None

    @property
    def program(self) -> Callable[..., Any]:
        """The model. For a copied guide, its copy if one ``deepcopy`` copied both."""
        if self._copies is not None:
            original = self.__dict__["program"]
            self.__dict__["program"] = self._copies.get(id(original), original)
            self._copies = None
        return self.__dict__["program"]

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelRef:
        """Return a reference that looks for a copy of the program at its first use.

        The deepcopy may copy the program after this reference.
        """
        copied = ModelRef(self.program)
        copied._copies = memo
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"program": self.program}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ModelRef.__init__(self, state["program"])
