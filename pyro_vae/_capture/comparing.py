"""Compare the results of a function and of its graph, up to rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from pyro_vae._capture.tracing import Outputs, equal
from pyro_vae._utils.numerics import real_parts
from pyro_vae._utils.precision import rounding_of_convolutions, rounding_of_products

aten = torch.ops.aten

# The allowance in units of the rounding error of one factor. In one step of a VAE, the float32
# rounding of a compiled graph moves few of the factors to another rounded value. The gradients
# then differ by up to 0.8 units of their largest entry (IWAE with 50 particles, bfloat16).
_UNITS_OF_ROUNDING = 4

_PRODUCTS = {
    aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.addbmm, aten.mv, aten.addmv, aten.dot,
    aten._cdist_forward, aten._cdist_backward,
}  # fmt: skip
_CONVOLUTIONS = {aten.convolution, aten.convolution_backward}
_ATTENTION = "_scaled_dot_product"


def rounding_of(graph: GraphModule, device: torch.device) -> float:
    """Return the relative error of the float32 factors of a graph's products, zero without any.

    Args:
        graph: of ATen operations, as traced.
        device: of its tensors.
    """
    found = 0.0
    for node in graph.graph.nodes:
        operation = getattr(node.target, "overloadpacket", None)
        if torch.float32 not in _dtypes(node):
            continue
        if operation in _CONVOLUTIONS:
            found = max(found, rounding_of_convolutions(device))
        elif operation in _PRODUCTS or _ATTENTION in getattr(operation, "__name__", ""):
            found = max(found, rounding_of_products(device))
    return found


def _dtypes(node: torch.fx.Node) -> list[torch.dtype]:
    """Return the dtypes of the results of an operation."""
    return [each.dtype for each in tree_leaves(node.meta.get("val")) if isinstance(each, Tensor)]


def disagreement(results: Outputs, replayed: Outputs, rounding: float = 0.0) -> str | None:
    """Describe how a graph differs from its function. Return None if only by rounding.

    Args:
        results: of the function.
        replayed: the results of the graph.
        rounding: the relative error of the factors of float32 products; see :func:`rounding_of`.
            Results in float64 must agree as without it.
    """
    results, replayed = (
        [None if each is None else real_parts(each) for each in outputs]
        for outputs in (results, replayed)
    )
    noise = max((_largest(r) for r in results[1:] if r is not None and _is_real(r)), default=0.0)
    for number, (mine, its) in enumerate(zip(results, replayed, strict=True)):
        if mine is None and its is None:
            continue
        if mine is None or its is None:
            return f"its graph differs from the eager run: only one of them has output {number}"
        if equal(mine, its):
            continue
        if not _is_real(mine):
            return f"its graph differs from the eager run in output {number}"
        precision = torch.finfo(mine.dtype).eps
        relative = math.sqrt(precision)
        if mine.dtype == torch.float32:
            relative = max(relative, _UNITS_OF_ROUNDING * rounding)
        size = _largest(mine)
        allowed = relative * size + 10 * precision * noise
        same = (mine == its) | (mine.isnan() & its.isnan())
        error = (mine - its).abs().masked_fill(same, 0.0).max().item()
        if not error <= allowed:
            return (
                f"its graph differs from the eager run by {error:.1e} at the same noise, in output "
                f"{number}, whose largest entry is {size:.1e}"
            )
    return None


def _largest(tensor: Tensor) -> float:
    """Return the largest absolute value of the finite entries."""
    size = torch.linalg.vector_norm(tensor, math.inf).item()
    if math.isfinite(size):
        return size
    return tensor.abs().masked_fill(~tensor.isfinite(), 0.0).max().item()


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0
