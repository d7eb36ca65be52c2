"""Run one program of a pair under Pyro's handlers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.poutine import indep_messenger
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger, block_messengers
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import _PYRO_STACK, get_plates
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution

from pyro_vae._programs.data_plate import name_plates_in
from pyro_vae._programs.sites import ROWS_WERE_DRAWN, WAS_GIVEN, Site, base_distribution

Program = Callable[..., Any]

# Whether a program runs in a trace of the library, in which the data plate is called "data".
_traced: ContextVar[bool] = ContextVar("traced", default=False)


def is_traced() -> bool:
    """Return whether a program runs in a trace of the library. A guide then uses ``"data"``."""
    return _traced.get()


def trace_of(program: Program, *args: Any, **kwargs: Any) -> poutine.Trace:
    """Run a program and return the trace of its sites.

    The plate of the data points has the name ``"data"`` in the trace, whatever name the program
    uses. Errors of the program keep their messages. ``poutine.trace(program).get_trace`` would
    append the shapes of all sites to them.
    """
    trace = plain_trace(program, *args, **kwargs)
    name_plates_in(trace, program, args, kwargs, functools.partial(plain_trace, program))
    return trace


def plain_trace(program: Program, *args: Any, **kwargs: Any) -> poutine.Trace:
    """Run a program and return the trace of its sites, with the program's own names of plates."""
    token = _traced.set(True)
    try:
        with poutine.trace() as messenger:
            program(*args, **kwargs)
    finally:
        _traced.reset(token)
    return messenger.trace


def as_guide(program: Program) -> Program:
    """Return a guide that hides the model's observations and marks plates with random rows.

    A ``GuideMessenger``, such as ``AutoNormalMessenger``, runs the model to sample the latents. The
    model's observed sites and factors are not part of log q. Pyro's ELBOs also drop them.
    """
    return _AsGuide()(program)


class _AsGuide(Messenger):
    def __enter__(self) -> _AsGuide:
        self._plates: dict[str, Site] = {}
        return super().__enter__()

    def _pyro_sample(self, msg: Site) -> None:
        if msg["is_observed"]:
            msg["stop"] = any(isinstance(handler, GuideMessenger) for handler in _PYRO_STACK)
        elif site_is_subsample(msg):
            size, drawn = msg["fn"].size, msg["fn"].subsample_size
            msg["infer"][ROWS_WERE_DRAWN] = msg["value"] is None and drawn not in (None, size)
            first = self._plates.setdefault(msg["name"], msg)
            if first is not msg:  # several guides in one program each open the plate
                _share_rows(first, msg)


def _share_rows(first: Site, msg: Site) -> None:
    """Give a plate that is opened again the rows of the first one; hide it from the trace."""
    msg["stop"] = True
    rows = first["value"]
    if msg["value"] is None:
        msg["value"] = rows
    elif Distribution._validate_args and not _are_equal(rows, msg["value"]):
        raise ValueError(
            f"the guide opens the plate {msg['name']!r} twice, with different rows. Open it with "
            "the same rows each time."
        )


def _are_equal(rows: Any, others: Any) -> bool:
    return len(rows) == len(others) and bool(
        torch.equal(torch.as_tensor(rows), torch.as_tensor(others))
    )


def replay(model: Program, guide_trace: poutine.Trace) -> Program:
    """Return the model with its latents at the values of a guide's trace.

    Unlike ``poutine.replay``, it keeps the rows that the model itself gives, as in
    ``pyro.plate("data", N, subsample=rows)``. It also ignores the observations of the guide.
    """
    return _Replay(guide_trace)(model)


class _Replay(ReplayMessenger):
    def _pyro_sample(self, msg: Any) -> None:
        site = self.trace.nodes.get(msg["name"])
        if site is None or site["is_observed"]:
            return
        if not (site_is_subsample(msg) and msg["value"] is not None):
            super()._pyro_sample(msg)


class AtValues(Messenger):
    """Give sites values, instead of samples, and keep everything else of the program.

    Pyro's ``replay`` would also copy the ``infer`` entries of another run. A ``GuideMessenger``
    keeps the priors of its own run there.
    """

    def __init__(self, values: Mapping[str, Tensor]):
        super().__init__()
        self._values = values

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self._values and not msg["is_observed"]:
            value = _at_the_delta(msg, self._values[msg["name"]])
            msg["done"], msg["value"] = True, value
            msg["infer"] = {**msg["infer"], WAS_GIVEN: True}


def _at_the_delta(site: Site, value: Tensor) -> Tensor:
    """Return the point of a Delta if the value equals it up to rounding, else the value.

    The point is a function of other samples. In a run with another number of particles, the same
    function may round differently, and the density of a Delta is zero at any other number.
    """
    delta = base_distribution(site["fn"])
    if not isinstance(delta, Delta) or not value.is_floating_point():
        return value
    try:
        point = delta.v.expand(value.shape)
    except RuntimeError:  # not the shape of this run
        return value
    rounding = 16 * torch.finfo(value.dtype).eps
    return point if torch.allclose(value, point.to(value), rtol=rounding, atol=rounding) else value


def plate_of_guide(
    name: str, size: int, dim: int | None, full_size: int | None = None
) -> contextlib.AbstractContextManager:
    """Return a plate for a guide that has no access to the row indices of the minibatch.

    The rows of the plate are not recorded. So the model keeps its own rows, and several guides
    can each open a plate of the same name. Inside a plate of that name, or of that dimension and
    size, the result does nothing.

    Args:
        name: the name of the plate.
        size: number of rows of the minibatch.
        dim: batch dimension of the plate, from the right.
        full_size: number of rows that the minibatch represents, if it is a subsample.
    """
    if any(f.name == name or (f.dim, f.size) == (dim, size) for f in get_plates()):
        return contextlib.nullcontext()
    with poutine.block():
        if full_size in (None, size):
            return pyro.plate(name, size, dim=dim)
        return pyro.plate(name, full_size, subsample=torch.arange(size), dim=dim)


@contextlib.contextmanager
def outside_of_plates() -> Iterator[None]:
    """Run the block as if no plate were open around it."""
    allocator = indep_messenger._DIM_ALLOCATOR
    stack, allocator._stack = allocator._stack, []
    try:
        with block_messengers(lambda handler: isinstance(handler, IndepMessenger)):
            yield
    finally:
        allocator._stack = stack
