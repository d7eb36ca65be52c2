"""The best member of a guide's family for each datum, by gradient ascent from the encoder's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae._utils.checks import positive_integer, positive_number

Step = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Ascent:
    r"""How to ascend the ELBO of each datum by parameters of its own, and when to stop.

    Adam takes steps along reparameterised gradients. After each window of steps the ELBO seen in
    it, averaged over the minibatch, is compared with that of the best window so far. When several
    windows in a row have brought nothing, the ascent ends, and the parameters are averaged over
    the steps since the best window began (Polyak & Juditsky 1992): their noise averages out.

    Args:
        learning_rate: of Adam.
        num_particles: draws of z for each datum and step.
        window: steps of a window.
        patience: windows without a gain that end the ascent.
        max_steps: at which it ends in any case.

    Raises:
        ValueError: a number out of range.
        TypeError: what must be a whole number is none.

    Example:
        >>> import pyro_vae as pv
        >>> pv.evaluation.Ascent(learning_rate=0.01)
        Ascent(learning_rate=0.01, num_particles=10, window=100, patience=10, max_steps=20000)
    """

    learning_rate: float = 1e-3
    num_particles: int = 10
    window: int = 100
    patience: int = 10
    max_steps: int = 20_000

    def __post_init__(self) -> None:
        positive_number("learning_rate", self.learning_rate)
        for name in ("num_particles", "window", "patience"):
            object.__setattr__(self, name, positive_integer(name, getattr(self, name)))
        positive_integer("max_steps", self.max_steps, minimum=self.window)

    def __call__(self, step: Step, start: Tensor) -> Ascended:
        """Ascend.

        Args:
            step: gives the ELBO of each datum (B,) at parameters (B, P), and its gradient.
            start: where to begin, (B, P).
        """
        parameters = start.detach().clone()
        # Adam treats each number by itself, and so each datum.
        optimizer = torch.optim.Adam([parameters], lr=self.learning_rate, maximize=True)
        # What is summed: parameters since the best window began, and in the window at hand.
        since_best, in_window = torch.zeros_like(parameters), torch.zeros_like(parameters)
        steps_since_best, best, waited = 0, -math.inf, 0
        elbos = torch.zeros(len(start), dtype=torch.float64, device=start.device)
        for number in range(1, self.max_steps + 1):
            elbo, gradient = step(parameters)
            # A step that overflows is left out: it would spoil all that follow it.
            parameters.grad = gradient.nan_to_num(0.0, 0.0, 0.0)
            optimizer.step()
            elbos += elbo
            in_window += parameters
            if number % self.window:
                continue
            reached = elbos.nanmean().item() / self.window
            since_best, steps_since_best = since_best + in_window, steps_since_best + self.window
            waited += 1
            if reached > best:
                best, waited = reached, 0
                since_best, steps_since_best = in_window.clone(), self.window
            elbos.zero_()
            in_window.zero_()
            if waited == self.patience:
                break
        converged = waited == self.patience and math.isfinite(best)
        return Ascended(since_best / steps_since_best, number, converged)


@dataclass(frozen=True)
class Ascended:
    """Where an ascent ended.

    Args:
        parameters: of the family for each datum, (B, P).
        steps: how many were taken.
        converged: whether it ended by itself, and had a finite ELBO in some window.
    """

    parameters: Tensor
    steps: int
    converged: bool
