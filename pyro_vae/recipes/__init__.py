"""How to make programs again: which classes of this library, with which arguments."""

from pyro_vae.recipes.allowance import Allowance
from pyro_vae.recipes.describing import recipe
from pyro_vae.recipes.rebuilding import rebuild

__all__ = ["Allowance", "rebuild", "recipe"]
