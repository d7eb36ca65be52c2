"""Operations in the form that torch's compiler makes fast code of, or the same, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


def compile_graph(
    graph: GraphModule, inputs: Sequence[Tensor]
) -> Callable[..., Sequence[Tensor | None]]:
    """Compile a graph, which is used up; its random numbers stay those of torch's generators.

    Args:
        graph: of ATen operations.
        inputs: of the graph.
    """
    options: dict[str, Any] = {"fallback_random": True}  # draws in the order of the program
    with torch.no_grad():
        if inputs[0].is_cpu:
            graph = rewrite(graph, inputs)
            options["cpp_wrapper"] = True  # the calls of the kernels in C++ as well
        for node in graph.graph.nodes:
            node.meta.clear()  # the compiler would take the fake tensors in it for its own
            if node.target is aten.view.default:
                # A tensor that was contiguous here may have another layout in compiled code.
                node.target = aten.reshape.default
        return torch._inductor.compile(graph, inputs, options)


def rewrite(graph: GraphModule, inputs: Sequence[Tensor]) -> GraphModule:
    """Replace operations by others that are equal but for rounding.

    Args:
        graph: of ATen operations.
        inputs: of the graph; only their shapes and types are looked at.
    """
    return make_fx(graph, decomposition_table=_REWRITTEN, tracing_mode="fake")(*inputs)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta=1, alpha=1) -> Tensor:
    """Take the sum apart from the product, so that it becomes a part of what follows.

    As one, the product must begin with a copy of the bias in every row. The sum is written as a
    difference, since the compiler would join the two again.
    """
    if beta != 1 or alpha != 1:
        return NotImplemented
    return a @ b - (-bias)


def _tanh(x: Tensor) -> Tensor:
    """Half the time of the compiler's own; off by at most 1.5 units in the last place.

    By the exponential, and by five terms of the series where that would cancel.
    """
    if x.dtype != torch.float32:
        return NotImplemented
    size, square = x.abs(), x * x
    series = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * 62 / 2835)))
    e = (-2 * size).exp()
    return torch.where(size < 0.3, x * series, ((1 - e) / (1 + e)).copysign(x))


def _bernoulli(p: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw as torch does: by uniform numbers of p's own type. The compiler's are float32."""
    if generator is not None or p.dtype not in (torch.float32, torch.float64):
        return NotImplemented
    return (torch.rand(p.shape, dtype=p.dtype, device=p.device) < p).to(p.dtype)


_REWRITTEN = {
    aten.addmm.default: _addmm,
    aten.bernoulli.default: _bernoulli,
    aten.tanh.default: _tanh,
}
