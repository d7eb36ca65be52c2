"""Compile a graph with torch's inductor; on a CPU, rewrite some operations first."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import Library

from pyro_vae._capture.products import faster_products
from pyro_vae._utils.precision import current_precision

aten = torch.ops.aten
CompiledGraph = Callable[..., Sequence[Tensor | None]]

_GRAPHS_KEPT = 16
_ALIGNMENT = 64  # bytes; compiled code may assume the alignment of its inputs
_compiled: OrderedDict[Hashable, CompiledGraph] = OrderedDict()  # the last used is at the end

_library = Library("pyro_vae", "FRAGMENT")
_library.define("bernoulli(Tensor p) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_library.impl("bernoulli", torch.bernoulli, "CPU")
_library.impl("bernoulli", torch.bernoulli, "CUDA")
_library.impl("bernoulli", lambda p: p.new_empty(p.shape), "Meta")


def compile_graph(graph: GraphModule, inputs: Sequence[Tensor]) -> CompiledGraph:
    """Compile a graph, whose random numbers stay those of torch's generators.

    Repeated fits of one architecture have equal graphs, whose parameters are inputs. The last 16
    compiled graphs are kept, so that equal graphs are compiled once.

    Args:
        graph: a graph of ATen operations. It cannot be used afterwards.
        inputs: the inputs of the graph.
    """
    key = _key(graph, inputs)
    found = None if key is None else _compiled.pop(key, None)
    if found is None:
        found = _compile(graph, inputs)
    if key is not None:
        _compiled[key] = found
        while len(_compiled) > _GRAPHS_KEPT:
            _compiled.popitem(last=False)
    return found


def _key(graph: GraphModule, inputs: Sequence[Tensor]) -> Hashable | None:
    """Return what the compiled code depends on, None if that is more than operations of torch."""
    for node in graph.graph.nodes:
        plain = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
        if node.op not in ("placeholder", "output") and not plain:
            return None
    if any(each.layout != torch.strided for each in inputs):
        return None
    layouts = tuple(
        (each.dtype, each.device, each.shape, each.stride(), each.data_ptr() % _ALIGNMENT)
        for each in inputs
    )
    storages = [each.untyped_storage().data_ptr() for each in inputs]
    shared = tuple(  # inputs that share memory
        (storages.index(storage), each.storage_offset(), each.untyped_storage().nbytes())
        for storage, each in zip(storages, inputs, strict=True)
        if storages.count(storage) > 1
    )
    settings = (
        torch.get_num_threads(),
        current_precision(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mkldnn.enabled,
        torch._inductor.config.get_hash(),
    )
    return graph.code, layouts, shared, settings


def _compile(graph: GraphModule, inputs: Sequence[Tensor]) -> CompiledGraph:
    options: dict[str, Any] = {"fallback_random": True}  # keeps the order of random numbers
    with torch.no_grad():
        if inputs[0].is_cpu:
            graph = rewrite(graph, inputs)
            options["cpp_wrapper"] = True  # call the kernels from C++
        else:
            keep_bernoulli(graph)
        for node in graph.graph.nodes:
            node.meta.clear()  # otherwise the compiler would use its fake tensors
            if node.target is aten.view.default:
                # A tensor that is contiguous here may have another layout in compiled code.
                node.target = aten.reshape.default
        return torch._inductor.compile(graph, inputs, options)


def keep_bernoulli(graph: GraphModule) -> None:
    """Let compiled code call torch's kernel for torch.bernoulli, by an operation of our own.

    The compiler's version of the operation draws other numbers on a GPU. On a CPU, :func:`rewrite`
    replaces it by a faster one that draws torch's numbers.
    """
    for node in graph.graph.nodes:
        if node.target is aten.bernoulli.default and node.kwargs.get("generator") is None:
            node.target, node.kwargs = torch.ops.pyro_vae.bernoulli.default, {}
    graph.recompile()


def rewrite(graph: GraphModule, inputs: Sequence[Tensor]) -> GraphModule:
    """Replace operations by others that are equal up to rounding.

    Args:
        graph: a graph of ATen operations.
        inputs: the inputs of the graph. Only their shapes and dtypes are used.
    """
    table = _REWRITTEN | faster_products()
    return make_fx(graph, decomposition_table=table, tracing_mode="fake")(*inputs)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta=1, alpha=1) -> Tensor:
    """Separate the sum from the product, so that the compiler can fuse it with the next operation.

    addmm starts with a copy of the bias in every row. The sum is written as a difference, because
    the compiler would merge a sum into addmm again.
    """
    if beta != 1 or alpha != 1:
        return NotImplemented
    return a @ b - (-bias)


def _tanh(x: Tensor) -> Tensor:
    """Compute tanh in half the time of the compiler's version.

    Near zero, where the formula with the exponential would cancel, it uses five terms of the
    series. The error is at most 1.5 units in the last place.
    """
    if x.dtype != torch.float32:
        return NotImplemented
    size, square = x.abs(), x * x
    series = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * 62 / 2835)))
    e = (-2 * size).exp()
    return torch.where(size < 0.3, x * series, ((1 - e) / (1 + e)).copysign(x))


def _bernoulli(p: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Sample as torch does, from uniform numbers of p's dtype. The compiler's are float32."""
    if generator is not None or p.dtype not in (torch.float32, torch.float64):
        return NotImplemented
    return (torch.rand(p.shape, dtype=p.dtype, device=p.device) < p).to(p.dtype)


_REWRITTEN = {
    aten.addmm.default: _addmm,
    aten.bernoulli.default: _bernoulli,
    aten.tanh.default: _tanh,
}
