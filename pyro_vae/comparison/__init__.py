"""Comparison: results side by side, for a person to read and for other tools to take up."""

from pyro_vae.comparison.arviz import to_arviz
from pyro_vae.comparison.pairs import Comparison, Entry, compare

__all__ = ["Comparison", "Entry", "compare", "to_arviz"]
