"""Guides: programs of q(z|x), built for any model by tracing the model once."""

from pyro_vae.guides import _families as families
from pyro_vae.guides._amortized import (
    AmortizedDelta,
    AmortizedFlow,
    AmortizedGuide,
    AmortizedLowRankNormal,
    AmortizedMixture,
    AmortizedMultivariateNormal,
    AmortizedNormal,
)
from pyro_vae.guides._families import Family
from pyro_vae.guides._hierarchical import HierarchicalGuide
from pyro_vae.guides._local import LocalGuide
from pyro_vae.guides._semi_amortized import SemiAmortized
from pyro_vae.guides._semi_supervised import SemiSupervisedGuide
from pyro_vae.guides._sequence import SequenceGuide

__all__ = [
    "AmortizedDelta",
    "AmortizedFlow",
    "AmortizedGuide",
    "AmortizedLowRankNormal",
    "AmortizedMixture",
    "AmortizedMultivariateNormal",
    "AmortizedNormal",
    "Family",
    "HierarchicalGuide",
    "LocalGuide",
    "SemiAmortized",
    "SemiSupervisedGuide",
    "SequenceGuide",
    "families",
]
