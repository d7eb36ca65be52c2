"""Networks from tensors to tensors, without sites, plates or distributions."""

from pyro_vae.nets._convolutional import ConvDecoder, ConvEncoder
from pyro_vae.nets._dense import MLP, GatedMLP
from pyro_vae.nets._joined import Joined
from pyro_vae.nets._residual import ResidualBlock, ResidualDecoder, ResidualEncoder
from pyro_vae.nets._zero_imputed import ZeroImputed

__all__ = [
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "GatedMLP",
    "Joined",
    "ResidualBlock",
    "ResidualDecoder",
    "ResidualEncoder",
    "ZeroImputed",
]
