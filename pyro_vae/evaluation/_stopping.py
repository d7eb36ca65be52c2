"""The state of an interrupted estimate, from which another call resumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_vae._utils.interrupts import Interrupted


@dataclass(frozen=True)
class PartialState:
    """The work of an interrupted call, which another call does not repeat.

    Args:
        who: the name of the function.
        num_done: how many data points are done.
        seed: of the draws. If the caller gave none, it is the seed that was drawn.
        settings: arguments that must be the same in the call that resumes, by name.
        parts: the tensors of each part of the data that is done.
    """

    who: str
    num_done: int
    seed: int
    settings: dict[str, Any]
    parts: list[tuple[Tensor, ...]]

    def check_seed(self, who: str, seed: int | None, settings: dict[str, Any]) -> int:
        """Check that a call may resume from this state, and return the seed.

        Raises:
            ValueError: The state is of another function, of other settings, or of another seed.
        """
        if self.who != who:
            raise ValueError(f"resume is of {self.who}, which was stopped, not of {who}")
        for name, value in settings.items():
            if self.settings[name] != value:
                raise ValueError(
                    f"resume was stopped with {name}={self.settings[name]!r}: it cannot go on "
                    f"with {value!r}"
                )
        if seed not in (None, self.seed):
            raise ValueError(f"resume holds draws of seed {self.seed}, not {seed}: leave seed out")
        return self.seed

    def interrupted(self, partial: object) -> Interrupted:
        """Return the exception that holds this state and a partial result."""
        message = (
            f"{self.who} was stopped after {self.num_done} data, which this exception's attribute "
            "`partial` holds: pass the exception as resume= to go on"
        )
        return Interrupted(message, partial, self)


def state_of(resume: object) -> PartialState | None:
    """Return the state to resume from, or None where there is nothing to resume.

    Raises:
        TypeError: The argument is not an :class:`Interrupted` of an estimate, nor its state.
    """
    state = resume.state if isinstance(resume, Interrupted) else resume
    if resume is None or isinstance(state, PartialState):
        return state
    if isinstance(resume, Interrupted):
        raise TypeError("resume must come from an estimate. Resume a fit from its checkpoint")
    raise TypeError(
        "resume must be the pyro_vae.evaluation.Interrupted that the interrupted call raised, got "
        f"{type(resume).__name__}"
    )
