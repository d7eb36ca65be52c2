"""Guides: programs of q(z|x), built for any model by tracing it once."""

from pyro_vae.guides import families
from pyro_vae.guides.amortized import (
    AmortizedDelta,
    AmortizedFlow,
    AmortizedGuide,
    AmortizedLowRankNormal,
    AmortizedMixture,
    AmortizedMultivariateNormal,
    AmortizedNormal,
)
from pyro_vae.guides.families import Family
from pyro_vae.guides.hierarchical import HierarchicalGuide
from pyro_vae.guides.layered import FlowGuide
from pyro_vae.guides.local import LocalGuide
from pyro_vae.guides.semi_amortized import SemiAmortized
from pyro_vae.guides.semi_supervised import SemiSupervisedGuide
from pyro_vae.guides.sequence import SequenceGuide

__all__ = [
    "AmortizedDelta",
    "AmortizedFlow",
    "AmortizedGuide",
    "AmortizedLowRankNormal",
    "AmortizedMixture",
    "AmortizedMultivariateNormal",
    "AmortizedNormal",
    "Family",
    "FlowGuide",
    "HierarchicalGuide",
    "LocalGuide",
    "SemiAmortized",
    "SemiSupervisedGuide",
    "SequenceGuide",
    "families",
]
