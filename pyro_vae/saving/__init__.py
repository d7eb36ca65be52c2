"""A pair on disk: to hand on, and to read years later without the code that trained it."""

from pyro_vae.saving.pairs import Saved, load, save

__all__ = ["Saved", "load", "save"]
