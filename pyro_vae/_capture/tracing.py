"""One run of a function through Python, written down as a graph of tensor operations.

The graph is taken below autograd and below Pyro's handlers: what they do in Python has been done,
and what is left is arithmetic, the backward pass included. Tensors that the function takes from
elsewhere (parameters, buffers, data) become inputs of the graph, so that a replay reads and
writes these very tensors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TypeAlias

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

Outputs: TypeAlias = Sequence[Tensor | None]
aten = torch.ops.aten


class CaptureError(Exception):
    """A function, or the place it runs in, does not allow a capture; the message says why.

    Args:
        reason: the message.
        outputs: what the function gave nevertheless, if it ran to its end.
    """

    def __init__(self, reason: str, outputs: Outputs | None = None):
        super().__init__(reason)
        self.outputs = outputs


@dataclass(frozen=True)
class Trace:
    """A function as a graph.

    Args:
        graph: called with the function's inputs, then the constants; gives its outputs.
        constants: tensors from outside that the function uses, each once.
        outputs: of the very run that was written down.
    """

    graph: GraphModule
    constants: list[Tensor]
    outputs: Outputs

    def more_than_gathered(self) -> list[int]:
        """Number the constants that the graph may write to: all but those it takes rows of.

        What an operation writes to cannot be told from its schema: batch norm's does not say.
        """
        inputs = [node for node in self.graph.graph.nodes if node.op == "placeholder"]
        constants = inputs[len(inputs) - len(self.constants) :]
        return [
            number
            for number, node in enumerate(constants)
            if not all(user.target is aten.index.Tensor for user in node.users)
        ]

    def difference(self, other: Trace) -> str | None:
        """Say where another run of the function did something else; None if it did not."""
        lines = [trace.graph.code.strip().splitlines() for trace in (self, other)]
        for mine, its in zip(*lines, strict=False):
            if mine != its:
                return f"{_statement(mine)!r} became {_statement(its)!r}"
        if len(lines[0]) != len(lines[1]):
            return f"{len(lines[0])} operations became {len(lines[1])}"
        for mine, its in zip(self.constants, other.constants, strict=True):
            if mine is not its and not equal(mine, its):
                return f"a tensor that it makes in Python changed, shape {tuple(mine.shape)}"
        return None


def trace(function: Callable[..., Outputs], inputs: Sequence[Tensor]) -> Trace:
    """Run a function and write down its tensor operations.

    Args:
        function: of tensors; what it reads besides must be tensors, or never change.
        inputs: its arguments.

    Raises:
        CaptureError: its control flow, or a shape, depends on the values of tensors.
    """
    outputs: list[Tensor | None] = []
    reasons: list[str] = []

    def run(*tensors: Tensor) -> list[Tensor | None]:
        with (
            _SampleLines() as places,
            _ValuesThatLeave(reasons, places),
            _ValuesThatLeaveTorch(reasons, places),
        ):
            results = list(function(*tensors))
        outputs[:] = [None if result is None else result.detach() for result in results]
        return results

    try:
        graph = make_fx(run)(*inputs)
    except Exception:
        if not (reasons and outputs):  # else the function ran; only its graph makes no sense
            raise
    if reasons:
        raise CaptureError(reasons[0], outputs)
    if any(output is not None and output.layout != torch.strided for output in outputs):
        raise CaptureError("it has sparse gradients", outputs)
    return Trace(graph, _lift(graph, outputs), outputs)


class _ValuesThatLeave(TorchDispatchMode):
    """Notes operations that hand a tensor's values to Python, or make a shape of them.

    The function gets what it asks for, and runs to its end: nothing that it does is done twice.
    """

    def __init__(self, reasons: list[str], places: _SampleLines):
        super().__init__()
        self._reasons, self._places = reasons, places
        self._literals = WeakIdKeyDictionary()  # made of a number, as by torch.tensor(1.0)
        # The shape of each result is noted in this mode; else in one made for each, more slowly.
        self._shapes = TracingContext(FakeTensorMode(allow_fallback_kernels=True))

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tags, kwargs = operation.tags, kwargs or {}
        reason = None
        if torch.Tag.data_dependent_output in tags and args[0] not in self._literals:
            reason = "its control flow depends on values of tensors"
        elif torch.Tag.dynamic_output_shape in tags and not _selects_by_number(operation, args):
            reason = "a shape depends on values of tensors"
        if reason is not None:
            self._reasons.append(reason + self._places.where())
            with _disable_current_modes():
                return operation(*args, **kwargs)
        with tracing(self._shapes):
            result = operation(*args, **kwargs)
        if operation is aten.lift_fresh.default:
            self._literals[result] = True
        return result


class _ValuesThatLeaveTorch(TorchFunctionMode):
    """Notes the ways out of torch that no operation tells of."""

    _WAYS_OUT = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__)

    def __init__(self, reasons: list[str], places: _SampleLines):
        super().__init__()
        self._reasons, self._places = reasons, places

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self._WAYS_OUT:
            self._reasons.append(f"it takes values of tensors out of torch{self._places.where()}")
        return function(*args, **(kwargs or {}))


def _selects_by_number(operation, args) -> bool:
    if operation not in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        return False
    masks = (torch.bool, torch.uint8)
    return all(index is None or index.dtype not in masks for index in args[1])


def _lift(graph: GraphModule, outputs: Outputs) -> list[Tensor]:
    """Turn the tensors that a graph holds into further inputs, and return them; tidy it up."""
    constants: list[Tensor] = []
    inputs: dict[int, torch.fx.Node] = {}
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(graph, node.target)
        if not isinstance(tensor, Tensor):
            raise CaptureError(f"it uses a {type(tensor).__name__} of its own", outputs)
        if id(tensor) not in inputs:
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(f"constant_{len(constants)}")
            inputs[id(tensor)] = last
            constants.append(tensor)
        node.replace_all_uses_with(inputs[id(tensor)])
        graph.graph.erase_node(node)
    for name in {n for n, _ in graph.named_parameters()} | {n for n, _ in graph.named_buffers()}:
        delattr(graph, name)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return constants


def _statement(line: str) -> str:
    """A line of a graph's code without the names that it lets go of."""
    return line.split(";")[0].strip().replace("torch.ops.aten.", "")


def equal(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are of one type and shape, and of equal entries, NaN among them."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


_LIBRARIES = tuple(
    os.path.dirname(os.path.abspath(path)) + os.sep
    for path in (torch.__file__, pyro.__file__, os.path.dirname(__file__))  # and this one
)


class _SampleLines(Messenger):
    """Notes the line of the user's code that samples each site, and names the line that runs."""

    def __init__(self):
        super().__init__()
        self._lines: dict[str, str] = {}

    def _pyro_sample(self, msg) -> None:
        self._lines[msg["name"]] = next(_user_lines(), "")

    def where(self) -> str:
        """Name the line of the user's code that is running, or the site whose density is taken."""
        for place in _user_lines():
            return f" ({place})"
        for frame in _frames():
            site = frame.f_locals.get("site")
            if isinstance(site, dict) and site.get("name") in self._lines:
                place = self._lines[site["name"]]
                return f" (site {site['name']!r}{place and ', '}{place})"
        return ""


def _frames() -> Iterator[FrameType]:
    """Yield the frames inside of the function that is traced, the innermost first."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not trace.__code__:
        yield frame
        frame = frame.f_back


def _user_lines() -> Iterator[str]:
    """Yield the file and line of each of them that runs the user's code."""
    for frame in _frames():
        file = frame.f_code.co_filename
        if not file.startswith((*_LIBRARIES, "<")) and "importlib" not in file:
            yield f"{os.path.basename(file)}, line {frame.f_lineno}"
