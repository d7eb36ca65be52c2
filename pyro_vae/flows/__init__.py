"""Normalizing flows: layers whose parameters, or whose context, come from an encoder."""

from pyro_vae.flows.autoregressive import InverseAutoregressive, MaskedAutoregressive
from pyro_vae.flows.composition import Composition
from pyro_vae.flows.coupling import AffineCoupling
from pyro_vae.flows.householder import Householder
from pyro_vae.flows.layer import Flow, FlowTransform, without_repetitions
from pyro_vae.flows.planar import Planar
from pyro_vae.flows.radial import Radial
from pyro_vae.flows.spline import NeuralSpline
from pyro_vae.flows.sylvester import Sylvester

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
    "without_repetitions",
]
