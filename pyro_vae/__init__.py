"""Variational autoencoders as pairs of Pyro programs: guides, objectives and evaluation."""

from pyro_vae import (
    datasets,
    distributions,
    evaluation,
    flows,
    guides,
    likelihoods,
    models,
    nets,
    objectives,
    plots,
    priors,
    report,
    serialization,
    surjections,
    training,
)
from pyro_vae._programs.parameters import parameter_store
from pyro_vae._programs.scales import unscaled
from pyro_vae._programs.terms import Terms, terms
from pyro_vae.evaluation import (
    collapse_report,
    decode,
    elbo_surgery,
    encode,
    evidence,
    generate,
    gradient_noise,
    impute,
    inference_gaps,
    interpolate,
    prior_holes,
    reconstruct,
    sandwich,
)
from pyro_vae.models import LatentVariableModel
from pyro_vae.report import compare, diagnose, rate_distortion, to_arviz
from pyro_vae.serialization import load, save
from pyro_vae.training import fit, fit_seeds, load_checkpoint

__version__ = "0.1.0"

__all__ = [
    "LatentVariableModel",
    "Terms",
    "collapse_report",
    "compare",
    "datasets",
    "decode",
    "diagnose",
    "distributions",
    "elbo_surgery",
    "encode",
    "evaluation",
    "evidence",
    "fit",
    "fit_seeds",
    "flows",
    "generate",
    "gradient_noise",
    "guides",
    "impute",
    "inference_gaps",
    "interpolate",
    "likelihoods",
    "load",
    "load_checkpoint",
    "models",
    "nets",
    "objectives",
    "parameter_store",
    "plots",
    "prior_holes",
    "priors",
    "rate_distortion",
    "reconstruct",
    "report",
    "sandwich",
    "save",
    "serialization",
    "surjections",
    "terms",
    "to_arviz",
    "training",
    "unscaled",
]
