"""Find parameters that belong to positions in a minibatch, and not to rows of the data."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae._programs.pair_trace import PairTrace
from pyro_vae._programs.runs import Program
from pyro_vae._utils.random import restored_generators


def check_positions(
    model: Program, guide: Program, batch: tuple[Tensor, ...], trace: PairTrace, num_data: int
) -> None:
    """Raise ValueError if a parameter belongs to positions that hold other rows each time.

    Such a parameter is ``pyro.param("loc", torch.zeros(len(x)))`` in the plate ``"data"``, or any
    parameter of Pyro's AutoGuides for a local latent. Gradients reveal it: two rows have gradients
    to separate elements, and to the same elements after the rows have moved.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        batch: x ``(B, *event)`` and any covariates.
        trace: a run of the pair on this batch.
        num_data: N.

    Raises:
        ValueError: N is larger than B, and there is such a parameter.
    """
    batch_size = len(batch[0])
    parameters = {
        name: parameter
        for program in ("model", "guide")
        for name, parameter in trace.named_parameters(program).items()
        if parameter.requires_grad and parameter.numel() > 1
    }
    if not parameters or batch_size < 2 or num_data <= batch_size:
        return
    with restored_generators():
        # The gradient of one row reaches most elements of a network, so few parameters are left.
        first = _numbers_reached(model, guide, batch, [*parameters.values()], 1)
        found = zip(parameters.items(), first, strict=True)
        parameters = {n: p for (n, p), one in found if 0 < one.sum() * batch_size <= p.numel()}
        if not parameters:
            return
        moved = tuple(c.roll(1, 0) if c.dim() and len(c) == batch_size else c for c in batch)
        before = _numbers_reached(model, guide, batch, [*parameters.values()], 2)
        after = _numbers_reached(model, guide, moved, [*parameters.values()], 2)
    for name, here, there in zip(parameters, before, after, strict=True):
        separate = here.flatten(1).any(1).all() and not (here[0] & here[1]).any()
        if separate and torch.equal(here, there):
            raise ValueError(
                f"parameter {name!r} of shape {tuple(parameters[name].shape)} has separate numbers "
                f"for each position in a minibatch of {batch_size}, so that the {num_data} data "
                "points would share them. Use "
                f'pyro.plate("data", {num_data}, subsample=rows) and a parameter with {num_data} '
                "rows; for an AutoGuide of Pyro, also return that plate from its create_plates "
                f"argument. Or use guides.LocalGuide, an amortized guide, or batch_size={num_data}."
            )


def _numbers_reached(
    model: Program, guide: Program, batch: tuple[Tensor, ...], parameters: list[Tensor], rows: int
) -> list[Tensor]:
    """Return, for each parameter, a mask of its elements that the first rows have gradients to."""
    with torch.enable_grad():
        trace = PairTrace(model, guide, batch)
        values = [f.log_prob for f in (*trace.model.values(), *trace.guide.values()) if f.local]
        if not trace.averaged:
            values += [s.reshape(*s.shape[:2], -1).sum(2) for s in trace.samples().values()]
        total = sum(value.sum(0) for value in values)
        if not isinstance(total, Tensor) or not total.requires_grad:
            return [p.new_zeros((rows, *p.shape), dtype=torch.bool) for p in parameters]
        found = [
            torch.autograd.grad(total[row], parameters, retain_graph=True, allow_unused=True)
            for row in range(rows)
        ]
    return [
        torch.stack(
            [torch.zeros_like(p) if g is None else g.detach().to_dense() for g in gradients]
        )
        != 0
        for p, gradients in zip(parameters, zip(*found, strict=True), strict=True)
    ]
