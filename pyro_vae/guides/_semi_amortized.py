"""Guides that refine the parameters from an encoder by a few gradient steps."""

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
from pyro_vae._utils.numerics import gradient_or_zeros
from pyro_vae._utils.random import restored_generators
from pyro_vae.guides._amortized import AmortizedGuide


@records_init_args
class SemiAmortized(PyroModule):
    r"""An amortized guide, refined per data point by gradient steps (Kim et al. 2018, algorithm 1).

    .. math::
        \lambda_0 = \lambda(x), \qquad
        \lambda_{t+1} = \lambda_t
            + \mathrm{Adam}\bigl(\nabla_\lambda \mathrm{ELBO}(x; \lambda_t)\bigr)

    and :math:`q(z|x) = T_\# q_{\lambda_T}`. Each step samples a new z. So :math:`\lambda_T`, and
    the density at a given z, vary slightly between calls. The weights p/q of one call are exact.

    The steps use the guide's model. To copy the pair, copy both at once with the model first:
    ``copy.deepcopy((model, guide))``. Otherwise the copied guide uses the original model.

    Args:
        guide: any :class:`pyro_vae.guides.AmortizedGuide`.
        steps: T, the number of gradient steps.
        step_size: the step size of Adam.
        through: whether the encoder's gradient passes through the steps. This needs second
            derivatives, which not every family has. If False, the encoder gets the gradient at
            :math:`\lambda_T`.

    Raises:
        ValueError: ``steps`` or ``step_size`` is not positive. The first call raises it if the
            model has a latent outside the plate ``"data"``.
        RuntimeError: ``through`` is True, and the family has no second derivatives.
        TypeError: ``guide`` is not an AmortizedGuide.
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
        """Return the refined parameters of the family for each data point, ``(B, P)``."""
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
        # Only the first call runs this check. Restore the generators, so that its samples do not
        # change the noise of that call.
        with restored_generators(), torch.no_grad(), outside_of_plates(), poutine.block():
            trace = trace_of(self.guide._model.program, x, *covariates)
        for site in random_sites(trace):
            if not site["is_observed"] and data_frame(site) is None:
                raise ValueError(
                    'SemiAmortized needs all latent sites inside the plate "data", but the model '
                    f"has the latent site {site['name']!r} outside the plate. Use the guide "
                    "without refinement."
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

        with outside_of_plates(), poutine.block():  # hide these samples from outer handlers
            t = terms(self.guide._model.program, guide, x, *covariates)
            elbo = (t.log_likelihood - t.kl).sum()
        return gradient_or_zeros(elbo, parameters, create_graph=self._through)


def _normal(value: Any) -> Any:
    """Return the value, or a copy that autograd can save if it is an inference tensor."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
