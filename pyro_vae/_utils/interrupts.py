"""Ctrl-C: deferred to the end of a step, and raised with the partial result."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A fit or an estimate that was interrupted (Ctrl-C) after part of its work.

    Pass the exception as ``resume=`` to the function of :mod:`pyro_vae.evaluation` that raised it.
    Pass the same arguments again; the seed comes from the exception. The results equal those of an
    uninterrupted call bit by bit, or up to rounding if operations are captured. To resume a fit,
    use its checkpoint instead.

    Args:
        message: the text of the exception.
        partial: the result so far: an :class:`pyro_vae.evaluation.Evidence`, a
            :class:`pyro_vae.training.Fit`, or another result of the function.
        state: the tensors and settings that ``resume=`` needs; None for a fit.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     if not resumed and x[0] == 20:  # Ctrl-C
        ...         raise KeyboardInterrupt
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
        >>> x, resumed = torch.arange(30.0), False
        >>> options = {"num_particles": 100, "batch_size": 10}
        >>> try:
        ...     estimate = pv.evidence(model, guide, x, **options)
        ... except pv.evaluation.Interrupted as error:
        ...     interrupted = error
        >>> len(interrupted.partial.values)
        20
        >>> resumed = True
        >>> len(pv.evidence(model, guide, x, resume=interrupted, **options).values)
        30
    """

    def __init__(self, message: str, partial: Any, state: Any = None):
        super().__init__(message, partial, state)
        self.message, self.partial, self.state = message, partial, state

    def __str__(self) -> str:
        return self.message


@contextlib.contextmanager
def defer_keyboard_interrupt() -> Iterator[Callable[[], bool]]:
    """Defer the first Ctrl-C, and yield a function that returns whether it has occurred.

    A second Ctrl-C raises KeyboardInterrupt at once. In other threads, or with another handler of
    the signal, nothing is deferred. If the function is not called after a Ctrl-C, the end of the
    block raises KeyboardInterrupt.
    """
    came = told = False

    def hold(signum, frame) -> None:
        nonlocal came, told
        if came:
            told = True
            raise KeyboardInterrupt
        came = True

    def interrupted() -> bool:
        nonlocal told
        told = came
        return came

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, hold)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came and not told:
        raise KeyboardInterrupt
