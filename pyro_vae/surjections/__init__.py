"""Layers with two directions, p(x|z) and q(z|x), and the flows and VAEs built from them."""

from pyro_vae.surjections._absolute import Absolute, GenerativeAbsolute
from pyro_vae.surjections._bijection import Bijection
from pyro_vae.surjections._dequantization import UniformDequantization, VariationalDequantization
from pyro_vae.surjections._flow_guide import FlowGuide
from pyro_vae.surjections._flow_model import FlowModel
from pyro_vae.surjections._images import Image, Preimage, Split
from pyro_vae.surjections._maximum import Maximum
from pyro_vae.surjections._slicing import Augment, Slice
from pyro_vae.surjections._stochastic import Stochastic
from pyro_vae.surjections._surjection import (
    GenerativeSurjection,
    InferenceSurjection,
    Surjection,
    SurVAELayer,
    check_batch,
    check_support,
)

__all__ = [
    "Absolute",
    "Augment",
    "Bijection",
    "FlowGuide",
    "FlowModel",
    "GenerativeAbsolute",
    "GenerativeSurjection",
    "Image",
    "InferenceSurjection",
    "Maximum",
    "Preimage",
    "Slice",
    "Split",
    "Stochastic",
    "SurVAELayer",
    "Surjection",
    "UniformDequantization",
    "VariationalDequantization",
    "check_batch",
    "check_support",
]
