"""Calls of public functions with each kind of data, in which the type checker must find no error.

The functions are never called.
"""

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pyro_vae as pv


def kinds_of_data(
    model: pv.LatentVariableModel,
    guide: pv.guides.AmortizedNormal,
    x: Tensor,
    array: "np.ndarray[Any, np.dtype[np.float32]]",
    dataset: Dataset[Tensor],
    stream: IterableDataset[Tensor],
    loader: DataLoader[Tensor],
):
    pv.fit(model, guide, x, validation=array)
    pv.fit(model, guide, (x, array), validation=None)
    pv.evidence(model, guide, pd.DataFrame({"a": [1.0]}))
    pv.evidence(model, guide, sp.csr_matrix(array))
    pv.evidence(model, guide, x.to_sparse_csr())
    pv.encode(model, guide, TensorDataset(x, torch.arange(3)))
    pv.elbo_surgery(model, guide, dataset)
    pv.collapse_report(model, guide, stream)
    pv.compare({"a": (model, guide)}, loader, train=np.memmap("rows", np.float32))
    pv.priors.AggregatedPosterior(guide, pv.datasets.load("digits").train)
