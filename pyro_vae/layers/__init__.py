"""Layers with two directions: p(x|z) generates and q(z|x) infers; flows and VAEs made of them."""

from pyro_vae.layers.absolute import Absolute, GenerativeAbsolute
from pyro_vae.layers.bijection import Bijection
from pyro_vae.layers.dequantization import UniformDequantization, VariationalDequantization
from pyro_vae.layers.distributions import Image, Preimage, Split
from pyro_vae.layers.layer import (
    GenerativeSurjection,
    InferenceSurjection,
    Layer,
    Surjection,
    check_batch,
    check_support,
)
from pyro_vae.layers.maximum import Maximum
from pyro_vae.layers.slicing import Augment, Slice
from pyro_vae.layers.stochastic import Stochastic

__all__ = [
    "Absolute",
    "Augment",
    "Bijection",
    "GenerativeAbsolute",
    "GenerativeSurjection",
    "Image",
    "InferenceSurjection",
    "Layer",
    "Maximum",
    "Preimage",
    "Slice",
    "Split",
    "Stochastic",
    "Surjection",
    "UniformDequantization",
    "VariationalDequantization",
    "check_batch",
    "check_support",
]
