"""A function that is replayed as compiled code, once that has been shown to be the same."""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.capture.tracing import Outputs, Trace, Uncapturable, trace
from pyro_vae.reach import VALUES, reach


class Captured:
    """A function of tensors that runs through Python three times, and then no more.

    The first two calls are written down as graphs of tensor operations, which must be equal. The
    third runs both the function and the compiled graph on the same noise, which must agree. From
    the fourth on, the compiled graph stands for the function. Each call gives what the function
    would have given: the random numbers are those of torch's generators, in the same order.

    What the function depends on besides tensors must not change. It is watched: numbers, strings
    and containers that its code reaches by name must be the same before and after a run, and at
    each :meth:`recheck`; tensors must stay the objects they are, and change in place. Where this
    does not hold, or anything else forbids it, the function is called as it is, from then on, and a
    warning says why. Calls with inputs of another shape than the first's always call the function.

    Args:
        function: of tensors, to be called with :attr:`torch.Tensor.requires_grad` off; gives
            tensors or None.
        watch: what its code reaches, by name; see :func:`pyro_vae.reach.reach`.
        name: what the warning calls it.
    """

    def __init__(
        self, function: Callable[..., Outputs], *, watch: Mapping[str, Any], name: str = "this step"
    ):
        self._function = function
        self._watch = watch
        self._name = name
        self._signature: tuple | None = None
        self._stage: Callable[..., Outputs] = self._trace_first
        self._traced: Trace | None = None
        self._constants: list[Tensor] = []
        self._state: dict[str, Any] = {}
        self.reason: str | None = None

    @property
    def replaying(self) -> bool:
        """Whether calls no longer run through Python."""
        return self._stage == self._replay

    def __call__(self, *inputs: Tensor) -> Outputs:
        """Give what the function gives."""
        signature = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs)
        if self._signature is None:
            self._signature = signature
        return (self._stage if signature == self._signature else self._function)(*inputs)

    def recheck(self) -> None:
        """Call the function as it is from now on, if what it depends on has changed."""
        if self._state and (change := _change(self._state, self._now())):
            self._give_up(f"{change} since the capture; a tensor changed in place would be seen")

    def _trace_first(self, *inputs: Tensor) -> Outputs:
        try:
            _require_device(inputs)
            self._traced = self._trace(inputs)
        except Uncapturable as error:
            self._give_up(str(error))
            return self._function(*inputs)
        self._stage = self._trace_again
        return self._traced.outputs

    def _trace_again(self, *inputs: Tensor) -> Outputs:
        first = self._traced
        state = self._now()
        versions = [tensor._version for tensor in first.constants]
        try:
            again = self._trace(inputs)
        except Uncapturable as error:
            self._give_up(str(error))
            return self._function(*inputs)
        self._written = [
            tensor.detach()
            for tensor, version in zip(first.constants, versions, strict=True)
            if tensor._version != version
        ]
        change = _change(state, self._now())
        difference = first.difference(again)
        if change:
            self._give_up(f"it changes what it depends on: {change}")
        elif difference:
            self._give_up(f"it does not do the same twice: {difference}")
        else:
            self._state = state
            self._compile(again, inputs)
        return again.outputs

    def _compile(self, traced: Trace, inputs: Sequence[Tensor]) -> None:
        self._constants = [tensor.detach() for tensor in traced.constants]
        try:
            with _same_noise(inputs) as rewind, torch.no_grad():
                # The random numbers of torch's own generators, in the order of the program.
                self._compiled = torch._inductor.compile(
                    traced.graph, [*inputs, *self._constants], {"fallback_random": True}
                )
                rewind()
        except Exception as error:  # whatever a compiler may raise: there is another way
            self._give_up(f"it cannot be compiled: {_first_line(error)}")
        else:
            self._stage = self._check

    def _check(self, *inputs: Tensor) -> Outputs:
        saved = [tensor.clone() for tensor in self._written]
        with _same_noise(inputs) as rewind:
            try:
                replayed = self._replay(*inputs)
            except Exception as error:  # as above
                replayed, failure = None, f"its compiled code fails: {_first_line(error)}"
            rewind()
            for tensor, value in zip(self._written, saved, strict=True):
                tensor.copy_(value)
            outputs = self._function(*inputs)
        if replayed is not None:
            failure = _disagreement(outputs, replayed)
        if failure is None:
            self._stage = self._replay
        else:
            self._give_up(failure)
        return outputs

    def _replay(self, *inputs: Tensor) -> Outputs:
        return self._compiled(*inputs, *self._constants)

    def _trace(self, inputs: Sequence[Tensor]) -> Trace:
        with _same_noise(inputs) as rewind:
            try:
                return trace(self._function, inputs)
            except Uncapturable:
                rewind()  # for the function, which will be called instead
                raise
            except Exception as error:  # that of the function itself comes again when it is called
                rewind()
                raise Uncapturable(f"it cannot be traced: {_first_line(error)}") from error

    def _now(self) -> dict[str, list[Any]]:
        state: dict[str, list[Any]] = {}
        for name, thing in reach(**self._watch):
            state.setdefault(name, []).append(_mark(thing))
        return state

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self._stage = self._function
        self._traced, self._constants, self._state = None, [], {}
        warnings.warn(f"{self._name} is not captured, and runs eagerly: {reason}", stacklevel=2)


@contextlib.contextmanager
def _same_noise(inputs: Sequence[Tensor]) -> Iterator[Callable[[], None]]:
    """Yield what puts torch's generators back to where they are now."""
    device = inputs[0].device
    state = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind() -> None:
        torch.set_rng_state(state)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)

    yield rewind


def _disagreement(outputs: Outputs, replayed: Outputs) -> str | None:
    """Say how far the compiled code is from the function; None if by no more than rounding."""
    sizes = [0.0 if o is None else o.detach().abs().max().item() for o in outputs]
    for number, (mine, its, size) in enumerate(zip(outputs, replayed, sizes, strict=True)):
        if mine is None and its is None:
            continue
        if mine is None or its is None:
            return f"its compiled code differs from it in what output {number} is"
        precision = torch.finfo(mine.dtype).eps
        allowed = math.sqrt(precision) * size + 100 * precision * max(sizes)
        error = (mine - its).abs().max().item()
        if not error <= allowed:
            return (
                f"its compiled code differs from it by {error:.1e} at the same noise, in output "
                f"{number} of largest entry {size:.1e}"
            )
    return None


def _mark(thing: Any) -> Any:
    """What must stay equal of a thing, parts apart; things that count as themselves, kept alive."""
    if isinstance(thing, Tensor):
        return _Same(thing), thing.requires_grad
    if isinstance(thing, float | complex | np.generic):
        return repr(thing)  # NaN is equal to itself
    if isinstance(thing, VALUES):
        return thing
    if isinstance(thing, Mapping | list | tuple | set):
        return type(thing), len(thing)
    if inspect.ismethod(thing):
        return None  # made anew at each access; its function and its owner are parts of it
    return _Same(thing)


class _Same:
    """A thing that is equal to itself alone."""

    def __init__(self, thing: Any):
        self._thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._thing is other._thing

    __hash__ = None

    def __repr__(self) -> str:
        return f"{type(self._thing).__name__} object"


def _change(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> str | None:
    """Say what differs between two states, None if nothing does."""
    for name in before.keys() | after.keys():
        if name not in after:
            return f"{name} is gone"
        if name not in before:
            return f"{name} is new"
        if before[name] != after[name]:
            return f"{name} changed from {_shown(before[name])} to {_shown(after[name])}"
    return None


def _shown(marks: list[Any]) -> str:
    return ", ".join(str(mark) for mark in marks)


def _require_device(inputs: Sequence[Tensor]) -> None:
    device = inputs[0].device
    if device.type not in ("cpu", "cuda"):
        raise Uncapturable(f"there is no capture for the device {str(device)!r}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
