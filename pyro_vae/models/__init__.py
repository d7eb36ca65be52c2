"""Models: Pyro programs of p(x, z), each a generative story to be read from top to bottom."""

from pyro_vae.models.conditional import ConditionalModel
from pyro_vae.models.flow import FlowModel
from pyro_vae.models.hierarchical import HierarchicalModel
from pyro_vae.models.latent_variable import LatentVariableModel
from pyro_vae.models.mixture import MixtureModel
from pyro_vae.models.semi_supervised import SemiSupervisedModel
from pyro_vae.models.sequence import SequenceModel

__all__ = [
    "ConditionalModel",
    "FlowModel",
    "HierarchicalModel",
    "LatentVariableModel",
    "MixtureModel",
    "SemiSupervisedModel",
    "SequenceModel",
]
