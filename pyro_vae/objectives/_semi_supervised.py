"""The objective for partly labeled data."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pyro_vae._programs.pair_trace import Program
from pyro_vae._utils.checks import positive_number
from pyro_vae._utils.init_args import records_init_args
from pyro_vae.objectives._bounds import ELBO


@records_init_args
class SemiSupervisedELBO(ELBO):
    r"""The ELBO plus :math:`\alpha \log q(y|x)` of labeled data (Kingma et al. 2014).

    In the ELBO alone, a known class does not train the classifier q(y|x). With the added term the
    value is not a bound on the evidence.

    Args:
        classification: :math:`\alpha`, per labeled row of a minibatch. If the plate of the data
            points subsamples B of N, the term is multiplied by N/B, as the ELBO is.
        num_particles: K.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: ``classification`` is not positive.
        TypeError: When the loss is computed, the guide has no ``classify`` or y is missing.
    """

    def __init__(
        self,
        classification: float,
        num_particles: int = 1,
        *,
        vectorize_particles: bool | None = None,
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        self.classification = positive_number("classification", classification)

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the differentiable loss."""
        if not hasattr(_without_partial(guide), "classify") or len(args) != 2:
            raise TypeError(
                "SemiSupervisedELBO needs data (x, y) and a guide with classify(x), such as "
                f"guides.SemiSupervisedGuide, got {guide!r} and {len(args)} columns"
            )
        return super().differentiable_loss(model, guide, *args, **kwargs)

    def loss_of_data(self, guide: Program, x: Tensor, y: Tensor) -> Tensor:
        r"""Return :math:`-\alpha \sum \log q(y|x)` over the labeled rows."""
        known = y >= 0
        log_q = _without_partial(guide).classify(x).log_prob(torch.where(known, y, 0))
        return -self.classification * torch.where(known, log_q, 0.0).sum()


def _without_partial(guide: Program) -> Any:
    return guide.func if isinstance(guide, functools.partial) else guide
