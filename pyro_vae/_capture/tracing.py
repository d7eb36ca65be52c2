"""Trace one run of a function through Python as a graph of tensor operations.

The graph is recorded below autograd and below Pyro's handlers. It contains only tensor operations,
including those of the backward pass. Tensors from outside the function (parameters, buffers, data)
become inputs of the graph, so that a replay reads and writes the same tensors.
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
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from pyro_vae._capture.dynamo import compiled_functions_run_eagerly

Outputs: TypeAlias = Sequence[Tensor | None]
aten = torch.ops.aten


class CaptureError(Exception):
    """The function, or its device, does not allow a capture. The message names the reason.

    Args:
        reason: the message.
        outputs: the outputs of the function, if it ran to its end.
    """

    def __init__(self, reason: str, outputs: Outputs | None = None):
        super().__init__(reason)
        self.outputs = outputs


@dataclass(frozen=True)
class Trace:
    """A function as a graph.

    Args:
        graph: function of the function's inputs, then the constants. It returns the outputs.
        constants: tensors from outside that the function uses, each once.
        outputs: outputs of the traced run.
    """

    graph: GraphModule
    constants: list[Tensor]
    outputs: Outputs

    def more_than_gathered(self) -> list[int]:
        """Return the positions of the constants that the graph may write to.

        These are all constants except those that are only indexed. The schema of an operation may
        omit its writes, as that of batch norm does.
        """
        inputs = [node for node in self.graph.graph.nodes if node.op == "placeholder"]
        constants = inputs[len(inputs) - len(self.constants) :]
        return [
            number
            for number, node in enumerate(constants)
            if not all(user.target is aten.index.Tensor for user in node.users)
        ]

    def difference(self, other: Trace) -> str | None:
        """Describe the first difference from another run. Return None if they are equal."""
        lines = [trace.graph.code.strip().splitlines() for trace in (self, other)]
        for mine, its in zip(*lines, strict=False):
            if mine != its:
                return f"{_statement(mine)!r} became {_statement(its)!r}"
        if len(lines[0]) != len(lines[1]):
            return f"{len(lines[0])} operations became {len(lines[1])}"
        for mine, its in zip(self.constants, other.constants, strict=True):
            if mine is not its and not equal(mine, its):
                return f"a tensor of shape {tuple(mine.shape)} that it creates in Python changed"
        return None


def trace(function: Callable[..., Outputs], inputs: Sequence[Tensor]) -> Trace:
    """Run a function and record its tensor operations.

    Args:
        function: function of tensors. Everything else that it reads must be tensors or constant.
        inputs: its arguments.

    Raises:
        CaptureError: The control flow or a shape depends on values of tensors. Values leave torch.
            An output is sparse.
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
        sparse = [result is not None and result.layout != torch.strided for result in results]
        if any(sparse):  # newer versions of torch cannot record their detach
            reasons.append("it has sparse gradients")
        outputs[:] = [
            result if result is None or is_sparse else result.detach()
            for result, is_sparse in zip(results, sparse, strict=True)
        ]
        return results

    try:
        with compiled_functions_run_eagerly():
            graph = make_fx(run)(*inputs)
    except Exception:
        if not (reasons and outputs):  # with both, only its graph is invalid
            raise
    if reasons:
        raise CaptureError(reasons[0], outputs)
    return Trace(graph, _lift(graph, outputs), outputs)


class _ValuesThatLeave(TorchDispatchMode):
    """Record operations that pass a tensor's values to Python, or use them as a shape.

    The function receives these values and runs to its end, so its effects occur only once.
    """

    def __init__(self, reasons: list[str], places: _SampleLines):
        super().__init__()
        self._reasons, self._places = reasons, places
        # Tensors of numbers, as torch.tensor(1.0) or torch.tensor(x.shape), and functions of them.
        self._literals = WeakIdKeyDictionary()
        # One mode for the shapes of all results is faster than a new mode for each.
        self._shapes = TracingContext(FakeTensorMode(allow_fallback_kernels=True))

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tags, kwargs = operation.tags, kwargs or {}
        reason, literal = None, self._is_literal(operation, args, kwargs)
        if torch.Tag.data_dependent_output in tags:
            if literal:
                with _disable_current_modes():
                    return operation(*args, **kwargs)
            reason = "its control flow depends on values of tensors"
        elif torch.Tag.dynamic_output_shape in tags and not _selects_by_number(operation, args):
            reason = "a shape depends on values of tensors"
        if reason is not None:
            self._reasons.append(reason + self._places.where())
            with _disable_current_modes():
                return operation(*args, **kwargs)
        with tracing(self._shapes):
            result = operation(*args, **kwargs)
        if literal and isinstance(result, Tensor):
            self._literals[result] = True
        elif not literal and operation._schema.is_mutable:
            self._forget(args, kwargs)
        return result

    def _forget(self, args, kwargs) -> None:
        """Remove the tensors of numbers into which an operation may have put other values."""
        changed = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        places = {tensor.untyped_storage().data_ptr() for tensor in changed}
        for tensor in [*self._literals]:
            if tensor.untyped_storage().data_ptr() in places:
                del self._literals[tensor]

    def _is_literal(self, operation, args, kwargs) -> bool:
        """Return whether the result of an operation depends on numbers alone."""
        if operation is aten.lift_fresh.default:
            return True
        if torch.Tag.nondeterministic_seeded in operation.tags:
            return False
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        return bool(tensors) and all(tensor in self._literals for tensor in tensors)


class _ValuesThatLeaveTorch(TorchFunctionMode):
    """Record conversions out of torch that are not tensor operations.

    ``one_hot`` is replaced by an equal operation that does not read values to check them.
    """

    _WAYS_OUT = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__)

    def __init__(self, reasons: list[str], places: _SampleLines):
        super().__init__()
        self._reasons, self._places = reasons, places

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self._WAYS_OUT:
            self._reasons.append(f"it takes values of tensors out of torch{self._places.where()}")
        if function is torch.nn.functional.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes <= 0 or tensor.dtype != torch.int64:
        return torch.nn.functional.one_hot(tensor, num_classes)
    zeros = torch.zeros(*tensor.shape, num_classes, dtype=torch.int64, device=tensor.device)
    return zeros.scatter(-1, tensor.unsqueeze(-1), 1)


def _selects_by_number(operation, args) -> bool:
    if operation not in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        return False
    masks = (torch.bool, torch.uint8)
    return all(index is None or index.dtype not in masks for index in args[1])


def _lift(graph: GraphModule, outputs: Outputs) -> list[Tensor]:
    """Turn the tensors inside a graph into inputs and return them. Remove unused operations."""
    constants: list[Tensor] = []
    inputs: dict[int, torch.fx.Node] = {}
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(graph, node.target)
        if not isinstance(tensor, Tensor):
            raise CaptureError(
                f"it uses a {type(tensor).__name__} object, which no graph can hold", outputs
            )
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
    """Return a line of a graph's code without the names that it deletes."""
    return line.split(";")[0].strip().replace("torch.ops.aten.", "")


def equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have equal dtypes, shapes and entries. NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


_LIBRARIES = tuple(
    os.path.dirname(os.path.abspath(path)) + os.sep
    for path in (torch.__file__, pyro.__file__, os.path.dirname(__file__))  # and this one
)


class _SampleLines(Messenger):
    """Record the line of user code that samples each site."""

    def __init__(self):
        super().__init__()
        self._lines: dict[str, str] = {}

    def _pyro_sample(self, msg) -> None:
        self._lines[msg["name"]] = next(_user_lines(), "")

    def where(self) -> str:
        """Return the current line of user code, or the site that is being scored."""
        for place in _user_lines():
            return f" ({place})"
        for frame in _frames():
            site = frame.f_locals.get("site")
            if isinstance(site, dict) and site.get("name") in self._lines:
                place = self._lines[site["name"]]
                return f" (site {site['name']!r}{place and ', '}{place})"
        return ""


def _frames() -> Iterator[FrameType]:
    """Yield the frames inside the traced function, the innermost first."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not trace.__code__:
        yield frame
        frame = frame.f_back


def _user_lines() -> Iterator[str]:
    """Yield the file and line of each frame of user code."""
    for frame in _frames():
        file = frame.f_code.co_filename
        if not file.startswith((*_LIBRARIES, "<")) and "importlib" not in file:
            yield f"{os.path.basename(file)}, line {frame.f_lineno}"
