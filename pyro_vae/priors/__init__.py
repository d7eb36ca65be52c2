"""Priors: called without arguments, each gives the distribution p(z) of one datum."""

from pyro_vae.priors.standard_normal import StandardNormal

__all__ = ["StandardNormal"]
