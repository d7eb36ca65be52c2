"""Save a pair, and load it years later or elsewhere without the code that trained it."""

from pyro_vae.serialization._export import export_decoder, export_encoder
from pyro_vae.serialization._folder import UnreadableFile
from pyro_vae.serialization._pair import Saved, load, save

__all__ = ["Saved", "UnreadableFile", "export_decoder", "export_encoder", "load", "save"]
