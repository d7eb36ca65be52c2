"""Find the best member of a guide's family for each data point by gradient ascent."""

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
    r"""Settings to maximize the ELBO of each data point over parameters of its own.

    Adam follows reparameterized gradients. The ELBO is averaged over the minibatch and over each
    window of steps. The ascent ends after several windows in a row without a new best ELBO. The
    result is the average of the parameters over all steps since the start of the best window
    (Polyak & Juditsky 1992). The average has less noise than the last step.

    Args:
        learning_rate: learning rate of Adam.
        num_particles: samples of z for each data point and step.
        window: number of steps in a window.
        patience: number of windows without a new best ELBO after which the ascent ends.
        max_steps: largest number of steps.

    Raises:
        ValueError: A number is out of range.
        TypeError: A value is not a number, or not a whole number where one is needed.

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
        """Run the ascent from a start.

        Args:
            step: function of the parameters (B, P) that returns the ELBO of each data point, (B,),
                and its gradient.
            start: initial parameters, (B, P).
        """
        parameters = start.detach().clone()
        # Adam updates each number by itself, so the data points do not affect each other.
        optimizer = torch.optim.Adam([parameters], lr=self.learning_rate, maximize=True)
        # Sums of the parameters since the best window began, and in the current window.
        since_best, in_window = torch.zeros_like(parameters), torch.zeros_like(parameters)
        steps_since_best, best, waited = 0, -math.inf, 0
        elbos = torch.zeros(len(start), dtype=torch.float64, device=start.device)
        for number in range(1, self.max_steps + 1):
            elbo, gradient = step(parameters)
            # Replace NaN and infinite gradients by zero. They would spoil all later steps.
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
    """The result of an ascent.

    Args:
        parameters: parameters of the best member for each data point, (B, P).
        steps: number of steps.
        converged: whether ``patience`` ended the ascent and some window had a finite ELBO.
    """

    parameters: Tensor
    steps: int
    converged: bool
