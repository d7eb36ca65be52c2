"""Fit a pair of programs to data, and write, resume and load checkpoints."""

from pyro_vae._utils.distributed import group_of_torchrun
from pyro_vae._utils.interrupts import Interrupted
from pyro_vae.training._callbacks import Callback, StopTraining
from pyro_vae.training._checkpoints import Checkpoint
from pyro_vae.training._fit import Fit, fit
from pyro_vae.training._loading import load_checkpoint
from pyro_vae.training._nonfinite import NonFiniteError, Skip
from pyro_vae.training._seeds import fit_seeds

__all__ = [
    "Callback",
    "Checkpoint",
    "Fit",
    "Interrupted",
    "NonFiniteError",
    "Skip",
    "StopTraining",
    "fit",
    "fit_seeds",
    "group_of_torchrun",
    "load_checkpoint",
]
