"""Models: Pyro programs of p(x, z), each a generative story to be read from top to bottom."""

from pyro_vae.models.latent_variable import LatentVariableModel

__all__ = ["LatentVariableModel"]
