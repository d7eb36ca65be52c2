"""Data of an AnnData object: a matrix of counts, and columns of its table of observations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae._utils.checks import checked
from pyro_vae._utils.extras import require
from pyro_vae.datasets._columns import as_column, as_tensor


@checked
def from_anndata(
    adata: Any, *, layer: str | None = None, covariates: Sequence[str] = ()
) -> tuple[Any, ...]:
    """Return x and covariates of an AnnData object (Virshup et al. 2024), for any function.

    A sparse matrix stays sparse and shares the memory of the object. Split the rows after this
    call, so that all parts have the same categories: ``train = tuple(c[rows] for c in columns)``.

    Args:
        adata: an ``anndata.AnnData`` of N observations and D variables, in memory.
        layer: name of the layer that is x, such as ``"counts"``. The default is ``adata.X``.
        covariates: names of columns of ``adata.obs``. Strings, truth values and categories become
            indicators (one-hot), shape (N, K), in the order of the categories. Other numbers have
            shape (N, 1). So ``nets.Joined`` can append each covariate to x or z.

    Returns:
        A tuple ``(x, *covariates)``, the data of :func:`pyro_vae.fit` and of all estimators. x is
        the sparse matrix of the object, or a tensor (N, D).

    Raises:
        TypeError: ``adata`` is not an AnnData.
        ValueError: The layer or a covariate does not exist or has missing values. The matrix is
            empty, on disk or missing.
        ImportError: The extra ``anndata`` is not installed.

    Example:
        >>> import anndata, numpy as np, pandas as pd, scipy.sparse as sp, pyro_vae as pv
        >>> counts = sp.csr_array(np.random.default_rng(0).poisson(0.5, (6, 4)))
        >>> batches = pd.DataFrame({"batch": list("aabbab")}, index=list("uvwxyz"))
        >>> x, batch = pv.datasets.from_anndata(
        ...     anndata.AnnData(counts, obs=batches), covariates=["batch"]
        ... )
        >>> x.shape, batch.shape, batch[0]
        ((6, 4), torch.Size([6, 2]), tensor([1., 0.]))
    """
    anndata = require("anndata", "anndata", "from_anndata")
    if not isinstance(adata, anndata.AnnData):
        raise TypeError(f"adata must be an anndata.AnnData, got {type(adata).__name__}")
    if adata.isbacked:
        raise ValueError("adata has its matrix on disk: load it with adata.to_memory()")
    if layer is not None and layer not in adata.layers:
        raise ValueError(f"layer must be one of {[*adata.layers]}, got {layer!r}")
    matrix, name = (adata.X, "adata.X") if layer is None else (adata.layers[layer], layer)
    if matrix is None:
        raise ValueError(f"adata has no matrix X: pass layer, one of {[*adata.layers]}")
    if 0 in adata.shape:
        raise ValueError(
            f"adata must have at least one observation and one variable, got shape {adata.shape}. "
            "Check the filter that made it"
        )
    columns = [_covariate(adata.obs, each) for each in covariates]
    x = as_column(matrix, name)
    return (x if isinstance(x, Tensor) else matrix.tocsr()), *columns


def _covariate(table: Any, name: str) -> Tensor:
    """Return a column of a table as indicators (N, K) or as numbers (N, 1)."""
    import pandas as pd

    if name not in table:
        raise ValueError(
            f"covariates must be columns of adata.obs, which are {[*table]}, got {name!r}"
        )
    column = table[name]
    if column.isna().any():
        raise ValueError(
            f"covariates must have no missing values, but column {name!r} of adata.obs has "
            f"{int(column.isna().sum())}. Fill them, or leave these observations out"
        )
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        return as_tensor(column.to_frame(), f"covariate {name!r}")
    codes = torch.from_numpy(np.array(pd.Categorical(column).codes, dtype=np.int64))
    count = len(pd.Categorical(column).categories)
    return torch.nn.functional.one_hot(codes, count).to(torch.get_default_dtype())
