"""Networks: tensors in, tensors out. They know no site, no plate and no distribution."""

from pyro_vae.nets.convolutional import ConvDecoder, ConvEncoder
from pyro_vae.nets.dense import MLP, GatedMLP
from pyro_vae.nets.joined import Joined
from pyro_vae.nets.residual import ResidualBlock, ResidualDecoder, ResidualEncoder

__all__ = [
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "GatedMLP",
    "Joined",
    "ResidualBlock",
    "ResidualDecoder",
    "ResidualEncoder",
]
