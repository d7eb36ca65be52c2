"""Matrix products by oneDNN, for processors on which MKL's products take twice the time."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.lowering import register_lowering
from torch._inductor.mkldnn_ir import LinearUnary
from torch.library import Library

# Below this number of multiplications, the call takes longer than the product.
_FEWEST_MULTIPLICATIONS = 2_500_000

_library = Library("pyro_vae", "DEF")
_library.define("product(Tensor a, Tensor b) -> Tensor")


def use_onednn(a: Tensor, b: Tensor) -> bool:
    """Return whether oneDNN computes the product of two matrices faster than MKL.

    MKL uses AVX2 on processors that are not Intel's, also where they have AVX-512. oneDNN uses
    what the processor has.
    """
    return (
        a.dtype == torch.float32
        and a.shape[0] * a.shape[1] * b.shape[1] >= _FEWEST_MULTIPLICATIONS
        and mkl_is_slow()
    )


@functools.cache
def mkl_is_slow() -> bool:
    """Return whether this is a processor of AMD with AVX-512, and torch uses MKL and oneDNN."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AMD" in _processor()
    )


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        return next((x for x in information.read_text().splitlines() if "vendor_id" in x), "")
    return platform.processor()


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


def _empty_product(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


_library.impl("product", _product, "CPU")
_library.impl("product", _empty_product, "Meta")


@register_lowering(torch.ops.pyro_vae.product.default, type_promotion_kind=None)
def _lower(a: Any, b: Any) -> Any:
    """Call oneDNN from compiled code. The compiler's own lowering takes constant weights only."""
    a = ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(a))
    weight = ir.ExternKernel.realize_input(ir.PermuteView.create(b, [1, 0]))
    layout = ir.FixedLayout(a.get_device(), a.get_dtype(), [a.get_size()[0], b.get_size()[1]])
    kernel = LinearUnary(layout, [a, weight], (None, "none", [-1], ""))
    return ir.TensorBox.create(kernel)
