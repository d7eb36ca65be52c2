"""Data sets by name, as tensors: downloaded once, verified, split and binarized."""

from pyro_vae.datasets._datasets import Binarization, Dataset, Labels, load, load_labels, names

__all__ = ["Binarization", "Dataset", "Labels", "load", "load_labels", "names"]
