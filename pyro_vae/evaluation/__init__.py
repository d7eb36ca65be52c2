"""Evaluate a fitted pair: log p(x), posterior collapse, inference gaps, and their errors."""

from pyro_vae._utils.interrupts import Interrupted
from pyro_vae.evaluation._ais import AIS
from pyro_vae.evaluation._ascent import Ascent
from pyro_vae.evaluation._collapse import CollapseReport, collapse_report
from pyro_vae.evaluation._decode import decode
from pyro_vae.evaluation._encode import Encoding, encode
from pyro_vae.evaluation._evidence import evidence
from pyro_vae.evaluation._gap_estimates import Estimate
from pyro_vae.evaluation._generate import generate
from pyro_vae.evaluation._gradient_noise import GradientNoise, gradient_noise
from pyro_vae.evaluation._impute import Imputation, impute
from pyro_vae.evaluation._inference_gaps import InferenceGaps, inference_gaps
from pyro_vae.evaluation._interpolate import interpolate
from pyro_vae.evaluation._log_evidence import Evidence, UnreliableEvidence
from pyro_vae.evaluation._predict import reconstruct
from pyro_vae.evaluation._prior_holes import PriorHoles, prior_holes
from pyro_vae.evaluation._psis import khat
from pyro_vae.evaluation._refit_prior import refit_prior
from pyro_vae.evaluation._sandwich import Sandwich, sandwich
from pyro_vae.evaluation._surgery.decomposition import Surgery
from pyro_vae.evaluation._surgery.surgery import elbo_surgery

__all__ = [
    "AIS",
    "Ascent",
    "CollapseReport",
    "Encoding",
    "Estimate",
    "Evidence",
    "GradientNoise",
    "Imputation",
    "InferenceGaps",
    "Interrupted",
    "PriorHoles",
    "Sandwich",
    "Surgery",
    "UnreliableEvidence",
    "collapse_report",
    "decode",
    "elbo_surgery",
    "encode",
    "evidence",
    "generate",
    "gradient_noise",
    "impute",
    "inference_gaps",
    "interpolate",
    "khat",
    "prior_holes",
    "reconstruct",
    "refit_prior",
    "sandwich",
]
