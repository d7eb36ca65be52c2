"""Normalizing flows: layers whose parameters, or context, come from an encoder."""

from pyro_vae.flows._autoregressive import InverseAutoregressive, MaskedAutoregressive
from pyro_vae.flows._base import Flow, FlowTransform, collapse_expanded_dims
from pyro_vae.flows._composition import Composition
from pyro_vae.flows._coupling import AffineCoupling
from pyro_vae.flows._householder import Householder
from pyro_vae.flows._planar import Planar
from pyro_vae.flows._radial import Radial
from pyro_vae.flows._spline import NeuralSpline
from pyro_vae.flows._sylvester import Sylvester

__all__ = [
    "AffineCoupling",
    "Composition",
    "Flow",
    "FlowTransform",
    "Householder",
    "InverseAutoregressive",
    "MaskedAutoregressive",
    "NeuralSpline",
    "Planar",
    "Radial",
    "Sylvester",
    "collapse_expanded_dims",
]
