"""Likelihoods: called on z, each gives the distribution p(x|z), its decoder inside."""

from pyro_vae.likelihoods.bernoulli import Bernoulli

__all__ = ["Bernoulli"]
