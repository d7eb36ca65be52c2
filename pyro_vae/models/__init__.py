"""Models: Pyro programs of p(x, z), written as generative stories from top to bottom."""

from pyro_vae.models._conditional import ConditionalModel
from pyro_vae.models._hierarchical import HierarchicalModel
from pyro_vae.models._latent_variable import LatentVariableModel
from pyro_vae.models._mixture import MixtureModel
from pyro_vae.models._semi_supervised import SemiSupervisedModel
from pyro_vae.models._sequence import SequenceModel

__all__ = [
    "ConditionalModel",
    "HierarchicalModel",
    "LatentVariableModel",
    "MixtureModel",
    "SemiSupervisedModel",
    "SequenceModel",
]
