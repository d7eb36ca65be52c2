"""Training: a pair, an objective and data in, a fitted pair and its history out."""

from pyro_vae.training.fitting import Fit, StoppedFit, fit
from pyro_vae.training.loading import load_checkpoint
from pyro_vae.training.nonfinite import NonFiniteError

__all__ = ["Fit", "NonFiniteError", "StoppedFit", "fit", "load_checkpoint"]
