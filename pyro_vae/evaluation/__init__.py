"""Evaluation: what a fitted pair is worth, each figure with its error."""

from pyro_vae.evaluation.importance import Evidence, evidence
from pyro_vae.evaluation.noise import GradientNoise, gradient_noise
from pyro_vae.evaluation.predict import generate, reconstruct
from pyro_vae.evaluation.psis import khat
from pyro_vae.evaluation.surgery import Surgery, elbo_surgery

__all__ = [
    "Evidence",
    "GradientNoise",
    "Surgery",
    "elbo_surgery",
    "evidence",
    "generate",
    "gradient_noise",
    "khat",
    "reconstruct",
]
