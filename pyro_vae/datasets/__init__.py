"""Data sets by name, as tensors: fetched once, checked, split and binarised in a fixed way."""

from pyro_vae.datasets._datasets import Binarization, Dataset, Labels, load, load_labels, names

__all__ = ["Binarization", "Dataset", "Labels", "load", "load_labels", "names"]
