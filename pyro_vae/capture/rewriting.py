"""Operations of a graph in the form that torch's compiler makes fast code of."""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten


def rewrite(module: GraphModule) -> GraphModule:
    """Replace operations by equal ones, equal but for rounding; in place.

    Args:
        module: a graph of ATen operations.
    """
    for target, replacement in _REPLACEMENTS.items():
        for node in module.graph.find_nodes(op="call_function", target=target):
            if node.kwargs:
                continue
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(replacement(module.graph, *node.args))
            module.graph.erase_node(node)
    module.recompile()
    return module


def _addmm(graph: Graph, bias: Node, a: Node, b: Node) -> Node:
    """Write bias + a @ b as a product and a sum, which becomes a part of what follows.

    As one, the product must begin with a copy of the bias in every row. The sum is written as a
    difference, since the compiler would join the two again.
    """
    product = graph.call_function(aten.mm.default, (a, b))
    return graph.call_function(
        aten.sub.Tensor, (product, graph.call_function(aten.neg.default, (bias,)))
    )


_REPLACEMENTS = {aten.addmm.default: _addmm}
