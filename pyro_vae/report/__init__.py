"""Reports on fitted pairs: diagnosis, comparisons, rate-distortion curves, ArviZ."""

from pyro_vae.report._arviz import to_arviz
from pyro_vae.report._compare import compare
from pyro_vae.report._comparison import Comparison, Entry, Run
from pyro_vae.report._curve import RateDistortion
from pyro_vae.report._diagnose import diagnose
from pyro_vae.report._diagnosis import Diagnosis, LedgerEntry
from pyro_vae.report._differences import Difference
from pyro_vae.report._rate_distortion import rate_distortion

__all__ = [
    "Comparison",
    "Diagnosis",
    "Difference",
    "Entry",
    "LedgerEntry",
    "RateDistortion",
    "Run",
    "compare",
    "diagnose",
    "rate_distortion",
    "to_arviz",
]
