"""Emulate the matrix products of a processor that rounds their float32 factors."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae._utils.precision import matmul_precision

aten = torch.ops.aten
FACTORS = {
    aten.mm.default: (0, 1),
    aten.mv.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.addmv.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}


class RoundedProducts(TorchDispatchMode):
    """Round the float32 factors of matrix products to bfloat16 inside the block.

    Args:
        noise: relative size of random errors of the products, which move some factors of later
            products to another rounded value.
    """

    def __init__(self, noise=0.0):
        super().__init__()
        self.noise, self.number = noise, 0
        self.generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation not in FACTORS or args[-1].dtype != torch.float32:
            return operation(*args, **kwargs)
        self.number += 1
        args = list(args)
        for position in FACTORS[operation]:
            args[position] = args[position].bfloat16().float()
        result = operation(*args, **kwargs)
        errors = torch.randn(result.shape, generator=self.generator) if self.noise else 0.0
        return result * (1 + self.noise * errors)


@contextlib.contextmanager
def rounded():
    """Set the precision "medium", and emulate a processor with bfloat16 products."""
    with matmul_precision("medium"), RoundedProducts() as mode:
        yield mode
