r"""Likelihoods: called on z, each gives the distribution p(x|z), its decoder inside.

Further arguments, such as labels that p(x|z, y) is conditional on, go to the decoder as they are.

=================================== ===================== =========================================
likelihood                          x                     the decoder gives, for each number of x
=================================== ===================== =========================================
:class:`Bernoulli`                  0 and 1               a logit
:class:`ContinuousBernoulli`        [0, 1]                a logit
:class:`Normal`, :class:`Laplace`   real                  a location, and a scale if asked to
:class:`StudentT`                   real                  a location, and a scale if asked to
:class:`Categorical`                L levels              L logits
:class:`DiscretizedLogistic`        L levels              a mean and a scale
:class:`DiscretizedLogisticMixture` L levels              C weights, C means and C scales
:class:`Poisson`                    0, 1, 2, ...          a rate
:class:`NegativeBinomial`           0, 1, 2, ...          a mean, and a dispersion if asked to
=================================== ===================== =========================================

All that a decoder gives is unconstrained. Levels are floating-point numbers 0, 1/(L-1), ..., 1, as
grey values are, or integers 0 to L-1. Several parameters for each number stand one block behind
the other in the first dimension of the event: see :class:`Likelihood`, which also tells how to
write one.

A scale is a number, or one of :class:`SharedScale`, :class:`ScalePerOutput`,
:class:`ScaleFromDecoder` and, for :class:`Normal` and :class:`Laplace`, :class:`OptimalScale`.
"""

from pyro_vae.likelihoods._base import Likelihood
from pyro_vae.likelihoods._bernoulli import Bernoulli
from pyro_vae.likelihoods._continuous_bernoulli import ContinuousBernoulli
from pyro_vae.likelihoods._counts import NegativeBinomial, Poisson
from pyro_vae.likelihoods._discretized_logistic import (
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
)
from pyro_vae.likelihoods._levels import Categorical, Levels
from pyro_vae.likelihoods._location_scale import Laplace, Normal, StudentT
from pyro_vae.likelihoods._scales import (
    OptimalScale,
    Scale,
    ScaleFromDecoder,
    ScalePerOutput,
    SharedScale,
)

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Laplace",
    "Levels",
    "Likelihood",
    "NegativeBinomial",
    "Normal",
    "OptimalScale",
    "Poisson",
    "Scale",
    "ScaleFromDecoder",
    "ScalePerOutput",
    "SharedScale",
    "StudentT",
]
