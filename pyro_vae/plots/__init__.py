"""Plots of data, latents and results, drawn by matplotlib."""

from pyro_vae.plots._aggregated_posterior import aggregated_posterior
from pyro_vae.plots._bars import diagnosis, differences, surgery
from pyro_vae.plots._codes import codes
from pyro_vae.plots._gradient_noise import gradient_noise
from pyro_vae.plots._latent_paths import interpolations, manifold, traversals
from pyro_vae.plots._learning_curves import learning_curves
from pyro_vae.plots._rate_distortion import rate_distortion
from pyro_vae.plots._reconstructions import reconstructions, samples

__all__ = [
    "aggregated_posterior",
    "codes",
    "diagnosis",
    "differences",
    "gradient_noise",
    "interpolations",
    "learning_curves",
    "manifold",
    "rate_distortion",
    "reconstructions",
    "samples",
    "surgery",
    "traversals",
]
