"""Distributions that torch and Pyro lack, and facts about theirs that they do not state."""

from pyro_vae.distributions._circular import WrappedNormal, circle
from pyro_vae.distributions._mixtures import MixtureOfDiagNormals

__all__ = ["MixtureOfDiagNormals", "WrappedNormal", "circle"]
