"""What an interrupted estimate leaves behind, and what it goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Unfinished:
    """What ``resume=`` goes on from.

    Args:
        who: the function that was stopped.
        num_done: data that are done.
        seed: of the draws; if none was asked for, the one that was drawn.
        settings: arguments that must be the same again, by name.
        parts: tensors of what was done, a tuple for each part.
    """

    who: str
    num_done: int
    seed: int
    settings: dict[str, Any]
    parts: list[tuple[Tensor, ...]]

    def seed_again(self, who: str, seed: int | None, **settings: Any) -> int:
        """Check that a call goes on with what this is of; return the seed.

        Raises:
            ValueError: it is of another function, or other settings, or has other draws.
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


class Stopped(KeyboardInterrupt):
    """An estimate that was interrupted (Ctrl-C) before its end; pass it as ``resume=`` to go on.

    The call that goes on takes the same arguments, and the seed from here. It ends with the numbers
    of one that was never stopped: to the bit, but where operations are captured, to their rounding.

    Args:
        partial: what the function returns, of the data that were done.
        unfinished: what ``resume=`` goes on from.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     if not busy and x[0] == 20:  # Ctrl-C
        ...         raise KeyboardInterrupt
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
        >>> x, busy = torch.arange(30.0), False
        >>> options = {"num_particles": 100, "batch_size": 10}
        >>> try:
        ...     estimate = pv.evidence(model, guide, x, **options)
        ... except pv.evaluation.Stopped as stopped:
        ...     so_far = stopped
        >>> len(so_far.partial.values)
        20
        >>> busy = True
        >>> len(pv.evidence(model, guide, x, resume=so_far, **options).values)
        30
    """

    def __init__(self, partial: Any, unfinished: Unfinished):
        super().__init__(partial, unfinished)
        self.partial, self.unfinished = partial, unfinished

    def __str__(self) -> str:
        return (
            f"{self.unfinished.who} was stopped after {self.unfinished.num_done} data, which this "
            "exception's attribute `partial` holds: pass the exception as resume= to go on"
        )


def check_resume(resume: object, *others: type) -> None:
    """Refuse what nothing goes on from.

    Raises:
        TypeError: it is no :class:`Stopped`, nor of another type that is allowed.
    """
    if resume is not None and not isinstance(resume, (Stopped, *others)):
        raise TypeError(
            "resume must be the pyro_vae.evaluation.Stopped that the interrupted call raised, got "
            f"{type(resume).__name__}"
        )
