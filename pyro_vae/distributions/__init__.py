"""Distributions that torch and Pyro lack, and exact supports and KL divergences of theirs."""

from pyro_vae.distributions._mixtures import MixtureOfDiagNormals

__all__ = ["MixtureOfDiagNormals"]
