"""Objectives: bounds on the evidence and their gradients. Change one name to compare them."""

from pyro_vae.objectives._aggregated import BetaTCVAE, InfoVAE
from pyro_vae.objectives._base import Objective, gradient
from pyro_vae.objectives._bounds import CIWAE, ELBO, IWAE, MIWAE, MeanFieldELBO, Renyi
from pyro_vae.objectives._estimators import (
    CUBO,
    PIWAE,
    TVO,
    VIMCO,
    DReG,
    ReweightedWakeSleep,
    ScoreFunction,
    StickingTheLanding,
)
from pyro_vae.objectives._schedules import Constant, Cyclical, Linear, Schedule
from pyro_vae.objectives._semi_supervised import SemiSupervisedELBO
from pyro_vae.objectives._weighted import BetaELBO, CapacityELBO, FreeBits

__all__ = [
    "CIWAE",
    "CUBO",
    "ELBO",
    "IWAE",
    "MIWAE",
    "PIWAE",
    "TVO",
    "VIMCO",
    "BetaELBO",
    "BetaTCVAE",
    "CapacityELBO",
    "Constant",
    "Cyclical",
    "DReG",
    "FreeBits",
    "InfoVAE",
    "Linear",
    "MeanFieldELBO",
    "Objective",
    "Renyi",
    "ReweightedWakeSleep",
    "Schedule",
    "ScoreFunction",
    "SemiSupervisedELBO",
    "StickingTheLanding",
    "gradient",
]
