"""Distributions that torch and Pyro lack, and exact supports and KL divergences of theirs."""

from pyro_vae.distributions._circular import WrappedNormal, circle
from pyro_vae.distributions._mixtures import MixtureOfDiagNormals
from pyro_vae.distributions._nan_masked import NanMasked

__all__ = ["MixtureOfDiagNormals", "NanMasked", "WrappedNormal", "circle"]
