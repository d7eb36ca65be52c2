"""Data sets by name, and data of other libraries: verified, split and binarized."""

from pyro_vae.datasets._anndata import from_anndata
from pyro_vae.datasets._datasets import Binarization, Dataset, Labels, load, load_labels, names
from pyro_vae.datasets._idx_folder import from_idx
from pyro_vae.datasets._torchvision import from_torchvision
from pyro_vae.datasets._unused_columns import UnusedColumnsWarning

__all__ = [
    "Binarization",
    "Dataset",
    "Labels",
    "UnusedColumnsWarning",
    "from_anndata",
    "from_idx",
    "from_torchvision",
    "load",
    "load_labels",
    "names",
]
