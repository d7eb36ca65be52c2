r"""Likelihoods: modules with a decoder inside, which return p(x|z) when called on z.

Further arguments, such as the labels y of p(x|z, y), are passed to the decoder unchanged.

=================================== ===================== =========================================
likelihood                          x                     decoder outputs for each number of x
=================================== ===================== =========================================
:class:`Bernoulli`                  0 and 1               a logit
:class:`ContinuousBernoulli`        [0, 1]                a logit
:class:`Normal`, :class:`Laplace`   real                  a location, and optionally a scale
:class:`StudentT`                   real                  a location, and optionally a scale
:class:`Categorical`                L levels              L logits
:class:`DiscretizedLogistic`        L levels              a mean and a scale
:class:`DiscretizedLogisticMixture` L levels              C weights, C means and C scales
:class:`Poisson`                    0, 1, 2, ...          a rate
:class:`NegativeBinomial`           0, 1, 2, ...          a mean, and optionally a dispersion
=================================== ===================== =========================================

Decoder outputs are unconstrained. Levels are floating-point numbers 0, 1/(L-1), ..., 1, such as
gray values, or integers 0 to L-1. If each number of x has several parameters, the decoder outputs
them as consecutive blocks along the first dimension of the event. See :class:`Likelihood` for this
layout, and for how to write a likelihood of your own.

A scale is a number, a :class:`SharedScale`, a :class:`ScalePerOutput` or a
:class:`ScaleFromDecoder`. :class:`Normal` and :class:`Laplace` also accept an
:class:`OptimalScale`.

:class:`NanMasked` wraps any of these for data with missing numbers (NaN).
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
from pyro_vae.likelihoods._nan_masked import NanMasked
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
    "NanMasked",
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
