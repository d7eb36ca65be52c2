"""Evaluation: what a fitted pair is worth, each figure with its error."""

from pyro_vae.evaluation.aggregated.decomposition import Surgery
from pyro_vae.evaluation.aggregated.holes import PriorHoles, prior_holes
from pyro_vae.evaluation.aggregated.surgery import elbo_surgery
from pyro_vae.evaluation.collapse import CollapseReport, collapse_report
from pyro_vae.evaluation.inference.ascent import Ascent
from pyro_vae.evaluation.inference.gap_parts import Estimate
from pyro_vae.evaluation.inference.gaps import InferenceGaps, inference_gaps
from pyro_vae.evaluation.noise import GradientNoise, gradient_noise
from pyro_vae.evaluation.predict import generate, reconstruct
from pyro_vae.evaluation.stopping import Stopped
from pyro_vae.evaluation.weighing.annealing import AIS
from pyro_vae.evaluation.weighing.importance import evidence
from pyro_vae.evaluation.weighing.log_evidence import Evidence, StoppedEvidence, UnreliableEvidence
from pyro_vae.evaluation.weighing.psis import khat
from pyro_vae.evaluation.weighing.sandwich import Sandwich, sandwich

__all__ = [
    "AIS",
    "Ascent",
    "CollapseReport",
    "Estimate",
    "Evidence",
    "GradientNoise",
    "InferenceGaps",
    "PriorHoles",
    "Sandwich",
    "Stopped",
    "StoppedEvidence",
    "Surgery",
    "UnreliableEvidence",
    "collapse_report",
    "elbo_surgery",
    "evidence",
    "generate",
    "gradient_noise",
    "inference_gaps",
    "khat",
    "prior_holes",
    "reconstruct",
    "sandwich",
]
