"""Replay a function as a graph of tensor operations, after checking that the two agree."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_vae._capture.comparing import disagreement, rounding_of
from pyro_vae._capture.cuda import CudaGraph, has_graphs, versions_elsewhere
from pyro_vae._capture.dynamo import compiled_functions_run_eagerly
from pyro_vae._capture.guards import change, state_of, tensors_that_may_change
from pyro_vae._capture.inductor import compile_graph
from pyro_vae._capture.policy import (
    SECONDS_THAT_REPAY_COMPILING,
    SECONDS_THAT_REPAY_TRACING,
    Capture,
    WorkCounter,
    check_capture,
    reason_for_eager,
)
from pyro_vae._capture.signatures import Signature, from_config, signature_of, to_config
from pyro_vae._capture.tracing import CaptureError, Outputs, Trace, trace
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.precision import current_precision
from pyro_vae._utils.random import (
    generator_state,
    noise_from_elsewhere,
    preserve_rng_state,
    preserve_tensors,
)

# Rounding alone can move a value across a kink, such as a knot of a spline, where the gradient
# jumps.
_DISAGREEMENTS_THAT_ARE_NO_ACCIDENT = 3


class Stage(Enum):
    """The work of the next call. Its value is its name in a checkpoint."""

    WAIT = "wait"  # count the operations of a call
    TRACE = "trace"
    TRACE_AGAIN = "trace again"
    CHECK = "check"  # run the function and its graph
    REPLAY = "replay"
    EAGER = "function"
    CATCH_UP = "catch up"  # capture again after a resume; never in a checkpoint


class Captured:
    """A function of tensors that runs through Python a few times and is then replayed.

    The first two calls are traced as graphs of tensor operations, which must be equal. The third
    call runs the function and the graph (compiled if requested) on the same random numbers. The
    results must agree within three attempts. From then on, calls replay the graph, until
    :meth:`recheck` requests another comparison. Each call returns the results of the function, and
    it uses the random numbers of torch's generators in the same order.

    Everything else that the function depends on must stay the same. Numbers, strings and containers
    that its code reaches by name are compared before and after a run, and at each recheck. Tensors
    must stay the same objects and change in place. The precision of float32 matrix products must
    stay the same too. If a check fails, all later calls run eagerly, and a warning names the
    reason. The capture is for the first input shapes that occur twice. Calls with other shapes run
    eagerly.

    Args:
        function: function of tensors that returns tensors or None, without gradients.
        watch: the objects that its code can reach, by name.
        name: name of the function in warnings.
        capture: True captures and compiles at once. False never captures. ``"auto"`` captures, or
            also compiles, if this saves time in :attr:`calls_left`. It estimates the time of a call
            from its operations and the sizes of their results. So equal runs decide equally.
            Calls on CUDA run eagerly unless it is True; see :func:`policy.reason_for_eager`.

    Attributes:
        calls_left: number of calls to come, or None if unknown.
        execution: how calls run now: ``"captured"`` (compiled), ``"captured, not compiled"``, or
            ``"eager: "`` and the reason.
        constants: aliases of the tensors that the graph uses, which keep their storage. Each
            capture makes a new list.
        writable: those of them that the graph may change.
        rounding: of the factors of its products; see :func:`comparing.rounding_of`.
        compiles: whether the graph is, or will be, compiled.

    Raises:
        ValueError: ``capture`` is not True, False or ``"auto"``.
    """

    compiles = True

    def __init__(
        self,
        function: Callable[..., Outputs],
        *,
        watch: Mapping[str, Any],
        name: str,
        capture: Capture,
    ):
        check_capture(capture)
        self._capture = capture
        self._function = function
        self._watch = watch
        self._name = name
        self._seen: set[Signature] = set()
        self._signature: Signature | None = None  # of the calls that are captured
        self._seconds: float | None = None  # estimated time of an eager call
        self._stage = {True: Stage.TRACE, False: Stage.EAGER, "auto": Stage.WAIT}[capture]
        self._first: Trace | None = None
        self._sources: list[Tensor] = []  # the tensors that the graph uses
        self._elsewhere: list[tuple[Tensor, int]] = []  # constants whose values the replay keeps
        self._state: dict[str, Any] = {}
        self._precision: str | None = None  # of the matrix products, when they were traced
        self._replay: Callable[..., Outputs] | None = None
        self._disagreements = 0  # in a row
        self._ahead: dict[str, Any] = {}  # the state_dict that Stage.CATCH_UP must reach
        self.calls_left: int | None = None
        self.constants: list[Tensor] = []
        self.writable: list[Tensor] = []
        self.rounding = 0.0
        too_few = "there were too few calls with inputs of one shape"
        self.execution = f"eager: {too_few if capture else 'capture=False'}"

    def __call__(self, *inputs: Tensor) -> Outputs:
        """Return the results of the function."""
        signature = signature_of(inputs)
        if self._signature is None:
            if signature in self._seen:
                self._signature = signature
            self._seen.add(signature)
        if self.calls_left:
            self.calls_left -= 1
        if signature != self._signature:
            return self._function(*inputs)
        return self._run_stage(inputs)

    def state_dict(self) -> dict[str, Any]:
        """Return the progress of the capture as plain values, for :meth:`load_state_dict`."""
        if self._stage is Stage.CATCH_UP:
            return dict(self._ahead)
        return {
            "capture": self._capture,
            "stage": self._stage.value,
            "seen": [to_config(signature) for signature in self._seen],
            "signature": None if self._signature is None else to_config(self._signature),
            "seconds": self._seconds,
            "compiles": self.compiles,
            "disagreements": self._disagreements,
            "execution": self.execution,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume the capture of another process, before the first call of this one.

        Calls then run as they would have run there, because eager and replayed calls differ by
        rounding. The next call captures the graph again, then restores random numbers and buffers.

        Args:
            state: the result of :meth:`state_dict`.
        """
        if self._capture != state["capture"]:
            return  # the user now asks for another mode
        self._seen = {from_config(config) for config in state["seen"]}
        if state["signature"] is not None:
            self._signature = from_config(state["signature"])
        self.compiles = state["compiles"]
        self._stage = Stage(state["stage"])
        self._seconds = state.get("seconds")  # older checkpoints do not have it
        self.execution = state["execution"]
        if self._stage in (Stage.TRACE_AGAIN, Stage.CHECK, Stage.REPLAY):
            self._stage, self._ahead = Stage.CATCH_UP, dict(state)

    def snapshot(self) -> dict[str, Any]:
        """Return the state of the capture, held in memory, for :meth:`restore`."""
        return vars(self) | {"_seen": set(self._seen), "_ahead": dict(self._ahead)}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Restore the state of a :meth:`snapshot`."""
        vars(self).update(snapshot, _seen=set(snapshot["_seen"]), _ahead=dict(snapshot["_ahead"]))

    def recheck(self, *, compare: bool = True) -> None:
        """Check that no watched object has changed. If one has, all later calls run eagerly.

        Args:
            compare: also let the next call run the function and its graph and compare them, because
                a function may depend on objects without a name.
        """
        if self._state and (changed := change(self._state, state_of(self._watch))):
            self._give_up(f"{changed} since the capture. Use a tensor, and change it in place")
        elif self._state and self._precision != (precision := current_precision()):
            self._give_up(
                f"the precision of float32 matrix products changed from {self._precision} to "
                f"{precision} since the capture. Set it before the call, or pass precision="
            )
        elif not compare:
            return
        elif self._stage is Stage.REPLAY:
            self._stage = Stage.CHECK
        elif self._stage is Stage.CATCH_UP and self._ahead["stage"] == Stage.REPLAY.value:
            self._ahead["stage"] = Stage.CHECK.value

    def replays(self, *inputs: Tensor) -> bool:
        """Return whether a call with these inputs replays the graph."""
        return (
            self._stage is Stage.REPLAY
            and signature_of(inputs) == self._signature
            and self._reason_against_replay() is None
        )

    def release(self) -> None:
        """Release the graph and its memory on a GPU. Calls are not possible afterwards."""
        self._graph = self._replay = None

    def run_graph(self, *inputs: Tensor) -> Outputs:
        """Run the operations of the graph, without checks. :meth:`replays` must be true."""
        with torch.no_grad():
            return self._graph(*inputs, *self.constants)

    def _run_stage(self, inputs: Sequence[Tensor]) -> Outputs:
        return self._runs[self._stage](self, inputs)

    def _run_eagerly(self, inputs: Sequence[Tensor]) -> Outputs:
        return self._function(*inputs)

    def _wait(self, inputs: Sequence[Tensor]) -> Outputs:
        if reason := reason_for_eager(inputs[0].device):
            self.execution, self._stage = f"eager: {reason}", Stage.EAGER
            return self._function(*inputs)
        if self._seconds is None:
            return self._count(inputs)
        if self.calls_left is None:
            return self._function(*inputs)
        seconds = self._seconds * self.calls_left
        if seconds < SECONDS_THAT_REPAY_TRACING:
            self.execution = "eager: a capture saves no time in so few calls"
            return self._function(*inputs)
        self.compiles = seconds >= SECONDS_THAT_REPAY_COMPILING
        self._stage = Stage.TRACE
        return self._run_stage(inputs)

    def _count(self, inputs: Sequence[Tensor]) -> Outputs:
        counter = WorkCounter()
        with (
            preserve_rng_state(inputs) as rewind,
            preserve_tensors(tensors_that_may_change(self._watch)) as restore,
        ):
            try:
                with compiled_functions_run_eagerly(), counter:
                    outputs = self._function(*inputs)
            except Exception:
                # Some operations fail while others are counted, such as the gradient of torch.cond.
                rewind()
                restore()
                outputs = self._function(*inputs)  # raises an error of the function itself again
        self._seconds = counter.seconds(inputs[0].device)
        return outputs

    def _catch_up(self, inputs: Sequence[Tensor]) -> Outputs:
        target, self._stage = Stage(self._ahead["stage"]), Stage.TRACE
        ends = {Stage.REPLAY, Stage.EAGER}
        if target is Stage.TRACE_AGAIN:
            ends.add(target)
        with (
            preserve_rng_state(inputs) as rewind,
            preserve_tensors(tensors_that_may_change(self._watch)) as restore,
        ):
            while self._stage not in ends:
                self._run_stage(inputs)
                restore()
            rewind()
        if target is Stage.CHECK and self._stage is Stage.REPLAY:
            self._stage = Stage.CHECK
            self._disagreements = self._ahead["disagreements"]
        return self._run_stage(inputs)

    def _trace_first(self, inputs: Sequence[Tensor]) -> Outputs:
        try:
            _require_device(inputs)
            self._first = self._trace(inputs)
        except CaptureError as error:
            self._give_up(str(error))
            return error.outputs or self._function(*inputs)
        self._stage = Stage.TRACE_AGAIN
        return self._first.outputs

    def _trace_again(self, inputs: Sequence[Tensor]) -> Outputs:
        first, self._first = self._first, None
        state, elsewhere = state_of(self._watch), noise_from_elsewhere()
        try:
            again = self._trace(inputs)
        except CaptureError as error:
            self._give_up(str(error))
            return error.outputs or self._function(*inputs)
        changed = change(state, state_of(self._watch))
        difference = first.difference(again)
        if changed:
            self._give_up(f"it changes an object that it depends on: {changed}")
        elif difference:
            self._give_up(f"its operations differ between two runs: {difference}")
        elif elsewhere != noise_from_elsewhere():
            self._give_up("it draws random numbers from Python or numpy: use those of torch")
        else:
            self._state = state
            self._prepare(again, inputs)
        return again.outputs

    def _prepare(self, traced: Trace, inputs: Sequence[Tensor]) -> None:
        self._sources = traced.constants
        self.constants = [tensor.detach() for tensor in traced.constants]
        self.writable = [self.constants[number] for number in traced.more_than_gathered()]
        self._graph = traced.graph
        self._precision = current_precision()
        self.rounding = rounding_of(traced.graph, inputs[0].device)
        if self.compiles:
            try:
                with preserve_rng_state(inputs) as rewind:
                    self._graph = compile_graph(traced.graph, [*inputs, *self.constants])
                    rewind()
            except Exception as error:  # a compiler may raise any error; go without it
                warnings.warn(
                    f"{self._name} is captured, but not compiled: {_cause(error)}",
                    stacklevel=2,
                )
                self.compiles = False
        self._stage = Stage.CHECK

    def _check(self, inputs: Sequence[Tensor]) -> Outputs:
        replay, failure = self._replay or self.run_graph, None
        with preserve_rng_state(inputs) as rewind, preserve_tensors(self.writable) as restore:
            try:
                if self._replay is None and has_graphs(inputs[0].device):
                    replay = CudaGraph(self.run_graph, inputs)
                    rewind()
                    restore()
                # Replay on copies, because a function may write to its inputs.
                replayed = [*replay(*(tensor.clone() for tensor in inputs))]
                replayed += [tensor.clone() for tensor in (*self.writable, generator_state(inputs))]
            except Exception as error:  # as above, any error
                failure = f"its graph fails: {_cause(error)}"
            rewind()
            restore()
            outputs = self._function(*inputs)
        if failure is not None:
            self._give_up(failure)
            return outputs
        done = [*outputs, *self.writable, generator_state(inputs)]
        failure = disagreement(done, replayed, self.rounding)
        self._disagreements = 0 if failure is None else self._disagreements + 1
        if failure is None:
            self._stage, self._replay = Stage.REPLAY, replay
            if has_graphs(inputs[0].device):
                self._elsewhere = versions_elsewhere(self.constants, inputs[0].device)
            self.execution = "captured" if self.compiles else "captured, not compiled"
        elif self._disagreements == _DISAGREEMENTS_THAT_ARE_NO_ACCIDENT:
            self._give_up(failure)
        return outputs  # the function's; after a disagreement, the next call compares again

    def _run_replay(self, inputs: Sequence[Tensor]) -> Outputs:
        if reason := self._reason_against_replay():
            self._give_up(reason)
            return self._function(*inputs)
        return self._replay(*inputs)

    def _reason_against_replay(self) -> str | None:
        if any(
            source.data_ptr() != constant.data_ptr()
            for source, constant in zip(self._sources, self.constants, strict=True)
        ):
            return "the storage of a parameter was replaced. Change parameters in place"
        if any(tensor._version != version for tensor, version in self._elsewhere):
            return "a tensor on another device changed. Move it to the device of the data"
        return None

    def _trace(self, inputs: Sequence[Tensor]) -> Trace:
        with (
            preserve_rng_state(inputs) as rewind,
            preserve_tensors(tensors_that_may_change(self._watch)) as restore,
        ):
            try:
                return trace(self._function, inputs)
            except CaptureError:
                raise
            except Exception as error:
                rewind()  # the function is called again, eagerly
                restore()
                # An error of the function itself is raised again by that call.
                raise CaptureError(f"it cannot be traced: {_cause(error)}") from error

    def _give_up(self, reason: str) -> None:
        self.execution = f"eager: {reason}"
        self._stage = Stage.EAGER
        self._sources, self.constants, self._elsewhere, self._state = [], [], [], {}
        warnings.warn(f"{self._name} is not captured and runs eagerly: {reason}", stacklevel=2)

    _runs: ClassVar = {
        Stage.WAIT: _wait,
        Stage.TRACE: _trace_first,
        Stage.TRACE_AGAIN: _trace_again,
        Stage.CHECK: _check,
        Stage.REPLAY: _run_replay,
        Stage.EAGER: _run_eagerly,
        Stage.CATCH_UP: _catch_up,
    }


def _require_device(inputs: Sequence[Tensor]) -> None:
    device = inputs[0].device
    if device.type not in ("cpu", "cuda"):
        raise CaptureError(f"device {str(device)!r} does not support capture")


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
