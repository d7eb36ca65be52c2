"""Hamiltonian Monte Carlo for many chains of many data points in parallel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_vae.evaluation._tempered_path import State

_JITTER = 0.2


def transition(
    evaluate: Callable[[Tensor], State],
    state: State,
    temperature: float,
    step_size: Tensor,
    leapfrog_steps: int,
    moving: Tensor | None = None,
) -> tuple[State, Tensor]:
    r"""Run one transition of Hamiltonian Monte Carlo that leaves :math:`p_b` invariant.

    Momenta r are sampled from N(0, I). After L leapfrog steps the end is accepted with probability
    :math:`\min(1, e^{H - H'})`, where :math:`H = -\log p_b(z) + \|r\|^2/2` (Neal 2011). The
    transition is reversible with respect to :math:`p_b` for any step size that does not depend on
    the latents. Step sizes vary at random by up to a fifth, so that trajectories do not close.

    Args:
        evaluate: returns the state of the chains at given rows.
        state: the current state of the chains.
        temperature: b.
        step_size: one per data point, ``(B,)``.
        leapfrog_steps: L.
        moving: 1 for numbers that may move, 0 for others, ``(B, D)``. None moves all.

    Returns:
        The new state, and the acceptance probabilities ``(C, B)``.
    """
    momentum = torch.randn_like(state.rows)
    if moving is not None:
        momentum = momentum * moving
    jitter = 1 + _JITTER * (2 * torch.rand_like(state.start) - 1)
    step = (step_size.to(jitter) * jitter).unsqueeze(-1)
    kicked = step if moving is None else step * moving
    before = _energy(state, temperature, momentum)
    new = state
    momentum = momentum + 0.5 * kicked * new.gradient(temperature)
    for number in range(1, leapfrog_steps + 1):
        new = evaluate(new.rows + step * momentum)
        half = 0.5 if number == leapfrog_steps else 1.0
        momentum = momentum + half * kicked * new.gradient(temperature)
    log_ratio = before - _energy(new, temperature, momentum)
    # A trajectory that diverged has NaN here and is rejected.
    accepted = torch.rand_like(log_ratio).log() < log_ratio
    kept = [
        torch.where(accepted if new_part.dim() == 2 else accepted.unsqueeze(-1), new_part, part)
        for new_part, part in zip(new, state, strict=True)
    ]
    return State(*kept), log_ratio.clamp(max=0.0).exp().nan_to_num(nan=0.0)


def _energy(state: State, temperature: float, momentum: Tensor) -> Tensor:
    return 0.5 * momentum.double().square().sum(-1) - state.log_density(temperature).double()
