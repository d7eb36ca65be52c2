"""Priors: called without arguments, each gives the distribution p(z) of one datum."""

from pyro_vae.priors.aggregated import AggregatedPosterior
from pyro_vae.priors.flow import FlowPrior
from pyro_vae.priors.mixture import MixtureOfNormals
from pyro_vae.priors.standard_normal import StandardNormal
from pyro_vae.priors.through_guide import ExemplarPrior, PriorThroughGuide, VampPrior

__all__ = [
    "AggregatedPosterior",
    "ExemplarPrior",
    "FlowPrior",
    "MixtureOfNormals",
    "PriorThroughGuide",
    "StandardNormal",
    "VampPrior",
]
