"""Variational autoencoders as pairs of Pyro programs: guides, objectives, honest evaluation."""

from pyro_vae import datasets, flows, guides, layers, likelihoods, nets, objectives, priors
from pyro_vae.comparison import Comparison, compare, to_arviz
from pyro_vae.evaluation import (
    Evidence,
    GradientNoise,
    Surgery,
    elbo_surgery,
    evidence,
    generate,
    gradient_noise,
    khat,
    reconstruct,
)
from pyro_vae.mixtures import MixtureOfNormals
from pyro_vae.models import (
    ConditionalModel,
    FlowModel,
    HierarchicalModel,
    LatentVariableModel,
    MixtureModel,
    SemiSupervisedModel,
    SequenceModel,
)
from pyro_vae.programs import parameter_store
from pyro_vae.terms import Terms, terms
from pyro_vae.training import Fit, fit

__all__ = [
    "Comparison",
    "ConditionalModel",
    "Evidence",
    "Fit",
    "FlowModel",
    "GradientNoise",
    "HierarchicalModel",
    "LatentVariableModel",
    "MixtureModel",
    "MixtureOfNormals",
    "SemiSupervisedModel",
    "SequenceModel",
    "Surgery",
    "Terms",
    "compare",
    "datasets",
    "elbo_surgery",
    "evidence",
    "fit",
    "flows",
    "generate",
    "gradient_noise",
    "guides",
    "khat",
    "layers",
    "likelihoods",
    "nets",
    "objectives",
    "parameter_store",
    "priors",
    "reconstruct",
    "terms",
    "to_arviz",
]
