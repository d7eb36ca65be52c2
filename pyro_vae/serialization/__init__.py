"""A pair on disk: to hand on, and to read years later without the code that trained it."""

from pyro_vae.serialization._folder import UnreadableFile
from pyro_vae.serialization._pair import Saved, load, save

__all__ = ["Saved", "UnreadableFile", "load", "save"]
