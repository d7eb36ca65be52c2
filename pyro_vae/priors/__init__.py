"""Priors: a call without arguments returns the distribution p(z) of one data point."""

from pyro_vae.priors._aggregated import AggregatedPosterior
from pyro_vae.priors._exemplar import ExemplarPrior
from pyro_vae.priors._flow import FlowPrior
from pyro_vae.priors._guide_mixture import GuideMixturePrior, VampPrior
from pyro_vae.priors._mixture import MixtureOfNormals
from pyro_vae.priors._standard_normal import StandardNormal

__all__ = [
    "AggregatedPosterior",
    "ExemplarPrior",
    "FlowPrior",
    "GuideMixturePrior",
    "MixtureOfNormals",
    "StandardNormal",
    "VampPrior",
]
