"""Reports on fitted pairs: comparisons, rate-distortion curves, and export to ArviZ."""

from pyro_vae.report._arviz import to_arviz
from pyro_vae.report._compare import compare
from pyro_vae.report._comparison import Comparison, Entry, Run
from pyro_vae.report._curve import RateDistortion
from pyro_vae.report._differences import Difference
from pyro_vae.report._rate_distortion import rate_distortion

__all__ = [
    "Comparison",
    "Difference",
    "Entry",
    "RateDistortion",
    "Run",
    "compare",
    "rate_distortion",
    "to_arviz",
]
