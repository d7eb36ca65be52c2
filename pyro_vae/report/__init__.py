"""Reports on fitted pairs: comparisons, rate-distortion curves, and export to ArviZ."""

from pyro_vae.report._arviz import to_arviz
from pyro_vae.report._compare import Comparison, Entry, compare
from pyro_vae.report._curve import RateDistortion
from pyro_vae.report._rate_distortion import rate_distortion

__all__ = [
    "Comparison",
    "Entry",
    "RateDistortion",
    "compare",
    "rate_distortion",
    "to_arviz",
]
