"""Guides whose parameters begin where an encoder puts them, and take a few steps from there."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor

from pyro_vae._programs.runs import outside_of_plates, trace_of
from pyro_vae._programs.sites import data_frame, random_sites
from pyro_vae._programs.terms import terms
from pyro_vae._utils.init_args import records_init_args
from pyro_vae._utils.random import restored_generators
from pyro_vae.guides._amortized import AmortizedGuide


@records_init_args
class SemiAmortized(PyroModule):
    r"""An amortized guide refined for each datum by gradient steps (Kim et al. 2018, algorithm 1).

    .. math::
        \lambda_0 = \lambda(x), \qquad
        \lambda_{t+1} = \lambda_t
            + \mathrm{Adam}\bigl(\nabla_\lambda \mathrm{ELBO}(x; \lambda_t)\bigr)

    and :math:`q(z|x) = T_\# q_{\lambda_T}`. Each step draws z anew, so that :math:`\lambda_T`, and
    with it the density at a given z, differs a little from call to call; the weights p/q of one
    call are exact.

    Args:
        guide: any :class:`pyro_vae.guides.AmortizedGuide`.
        steps: T.
        step_size: of Adam.
        through: whether the encoder's gradient passes through the steps (second derivatives, which
            not every family has); if not, the encoder gets the gradient at :math:`\lambda_T`.

    Raises:
        ValueError: ``steps`` or ``step_size`` is not positive; at the first call: the model has a
            latent that all data share.
        RuntimeError: ``through``, and the family has no second derivatives.
        TypeError: ``guide`` has no parameters to refine.
    """

    def __init__(
        self,
        guide: AmortizedGuide,
        steps: int = 5,
        step_size: float = 0.05,
        through: bool = False,
    ):
        super().__init__()
        if not isinstance(guide, AmortizedGuide):
            raise TypeError(f"guide must be an AmortizedGuide, got {type(guide).__name__}")
        if steps < 1 or not step_size > 0:
            raise ValueError(f"steps and step_size must be positive, got {steps}, {step_size}")
        self.guide = guide
        self._steps, self._step_size, self._through = steps, step_size, through
        self._checked = False

    def forward(self, x: Tensor, *covariates: Any) -> dict[str, Tensor]:
        """Sample the latents of the data plate given x."""
        return self.guide.sample(self.parameters_of(x, *covariates), x, *covariates)

    def parameters_of(self, x: Tensor, *covariates: Any) -> Tensor:
        """Return the refined parameters of the family for each datum, ``(B, P)``."""
        start = self.guide.parameters_of(x, *covariates)
        if not self._checked:
            self._check(x, *covariates)
        with torch.inference_mode(False), torch.enable_grad():
            refined = _normal(start if self._through else start.detach())
            if not refined.requires_grad:
                refined = refined.requires_grad_()
            refined = self._refine(refined, *map(_normal, (x, *covariates)))
        return refined if self._through else start + (refined - start).detach()

    def _check(self, x: Tensor, *covariates: Any) -> None:
        # What is drawn here is drawn once: it must not move the noise of this call alone.
        with restored_generators(), torch.no_grad(), outside_of_plates(), poutine.block():
            trace = trace_of(self.guide._model.program, x, *covariates)
        for site in random_sites(trace):
            if not site["is_observed"] and data_frame(site) is None:
                raise ValueError(
                    f'the model has the latent site {site["name"]!r} outside the plate "data": '
                    "what SemiAmortized refines for a datum would depend on a value that it does "
                    "not know. Use the guide without refinement."
                )
        self._checked = True

    def _refine(self, parameters: Tensor, x: Tensor, *covariates: Any) -> Tensor:
        first, second = torch.zeros_like(parameters), torch.zeros_like(parameters)
        for step in range(1, self._steps + 1):
            gradient = self._gradient(parameters, x, *covariates)
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient.square()
            size = self._step_size / (1 - 0.9**step) * (1 - 0.999**step) ** 0.5
            parameters = parameters + size * first / (second + 1e-16).sqrt()
        return parameters

    def _gradient(self, parameters: Tensor, x: Tensor, *covariates: Any) -> Tensor:
        def guide(x: Tensor, *covariates: Any) -> dict[str, Tensor]:
            return self.guide.sample(parameters, x, *covariates)

        with outside_of_plates(), poutine.block():  # what is drawn here is nobody else's
            t = terms(self.guide._model.program, guide, x, *covariates)
            elbo = (t.log_likelihood - t.kl).sum()
        (gradient,) = torch.autograd.grad(elbo, parameters, create_graph=self._through)
        return gradient


def _normal(value: Any) -> Any:
    """Return a tensor that autograd can save, if this one was made under inference mode."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
