"""Objectives: bounds on the evidence and their gradients, to be compared by changing one name."""

from pyro_vae.objectives.aggregated import BetaTCVAE, InfoVAE
from pyro_vae.objectives.bounds import CIWAE, ELBO, IWAE, MIWAE, MeanFieldELBO, Renyi
from pyro_vae.objectives.estimators import (
    CUBO,
    PIWAE,
    TVO,
    VIMCO,
    DReG,
    ReweightedWakeSleep,
    ScoreFunction,
    StickingTheLanding,
)
from pyro_vae.objectives.objective import Objective, gradient
from pyro_vae.objectives.schedules import Constant, Cyclical, Linear, Schedule
from pyro_vae.objectives.semi_supervised import SemiSupervisedELBO
from pyro_vae.objectives.weighted import BetaELBO, CapacityELBO, FreeBits

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
