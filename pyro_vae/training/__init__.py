"""Training: a pair, an objective and data in, a fitted pair and its history out."""

from pyro_vae.training.fitting import Fit, fit

__all__ = ["Fit", "fit"]
