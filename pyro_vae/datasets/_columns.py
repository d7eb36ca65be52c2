"""One column of data, x or a covariate, as a tensor or as the rows of a sparse matrix."""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pyro_vae._utils.messages import first_line
from pyro_vae.datasets._sparse_rows import SparseRows, is_sparse

Column: TypeAlias = Tensor | SparseRows

KINDS = (
    "a tensor, a numpy array, a DataFrame, a sparse matrix, a tuple of these, a torch Dataset or a "
    "DataLoader"
)
_DENSE_KINDS = "a tensor, a numpy array or a DataFrame"
_ADVICE = {
    "AnnData": "pass pyro_vae.datasets.from_anndata(adata)",
    "list": "pass torch.tensor(rows) for rows of numbers, torch.stack(rows) for rows of tensors, "
    "or numpy.stack(rows) for rows of arrays",
    "dict": "pass a tuple (x, *covariates) of its values",
}


def as_column(values: Any, name: str) -> Column:
    """Return one column of data with N >= 1 rows; a sparse matrix stays sparse.

    Args:
        values: tensor, numpy array, DataFrame or Series of N rows, or a sparse matrix (N, D).
        name: name of the column in error messages.

    Raises:
        ValueError: The values are not of these types, are not real numbers, or have no rows.
    """
    if isinstance(values, SparseRows):
        return values
    if not is_sparse(values) or getattr(values, "is_nested", False):
        return as_tensor(values, name, finite=False)
    if len(values.shape) != 2 or (isinstance(values, Tensor) and values.dense_dim()):
        raise ValueError(
            f"{name} must be a matrix (N, D) if it is sparse, got shape {tuple(values.shape)}: use "
            "to_dense()"
        )
    if isinstance(values, Tensor):
        _require_real(values, name)
        rows = SparseRows.of_torch(values)
    else:
        _require_numbers(values.dtype, name)
        rows = SparseRows.of_scipy(values)
    if 0 in rows.shape:
        raise _empty(name, rows.shape)
    return rows


def as_tensor(values: Any, name: str, *, finite: bool = True) -> Tensor:
    """Return one column of data as a tensor with N >= 1 rows.

    Args:
        values: tensor, numpy array, DataFrame or Series (N, ...).
        name: name of the column in error messages.
        finite: whether NaN and infinite values raise a ValueError.

    Raises:
        ValueError: The values are not dense real numbers, or have no rows. With ``finite``, they
            include NaN or infinity.
    """
    values = _without_pandas(values, name)
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(np.array(native(values, name)))  # a copy: it may be read-only
    if not isinstance(values, Tensor):
        kind = type(values).__name__
        kinds = KINDS if name in ("data", "validation", "train", "test") else _DENSE_KINDS
        advice = "convert it with toarray()" if is_sparse(values) else _ADVICE.get(kind)
        raise ValueError(  # noqa: TRY004 - bad data are a ValueError throughout
            f"{name} must be {kinds}, got {kind}" + (f": {advice}" if advice else "")
        )
    if values.is_nested:
        raise ValueError(f"{name} must have rows of one shape, got a nested tensor: pad its rows")
    if values.layout != torch.strided or values.is_quantized:
        raise ValueError(f"{name} must be dense, got layout {values.layout}: use to_dense()")
    _require_real(values, name)
    values = values.detach()
    if values.is_inference() and not torch.is_inference_mode_enabled():
        values = values.clone()  # autograd can use a clone
    if values.dtype in (torch.uint16, torch.uint32, torch.uint64):  # few operations support them
        values = values.to(torch.int64)
        if (values < 0).any():
            raise ValueError(f"{name} must hold numbers below 2**63, got larger ones")
    if values.dim() == 0 or len(values) == 0 or values.numel() == 0:
        raise _empty(name, values.shape)
    if finite and not (rows := finite_rows(values)).all():
        row = (~rows).nonzero()[0].item()
        raise ValueError(
            f"{name} has NaN or infinite values, first in row {row}: remove or impute them"
        )
    return values


def native(values: np.ndarray | Tensor, name: str) -> np.ndarray | Tensor:
    """Return an array of numbers in the native byte order."""
    if isinstance(values, Tensor):
        return values
    _require_numbers(values.dtype, name)
    if np.ma.is_masked(values):
        raise ValueError(
            f"{name} has masked values: fill them, or replace them by NaN and see "
            "docs/missing-data.md"
        )
    return np.ascontiguousarray(values, values.dtype.newbyteorder("="))


def finite_rows(values: Column) -> Tensor:
    """Return True for each row whose numbers are all finite, shape (N,)."""
    if isinstance(values, SparseRows):
        return values.finite_rows()
    if not values.is_floating_point() or values.sum().isfinite():  # the sum is a fast test
        return values.new_ones(len(values), dtype=torch.bool)
    return torch.isfinite(values).flatten(1).all(1) if values.dim() > 1 else values.isfinite()


def _without_pandas(values: Any, name: str) -> Any:
    """Return the array of a DataFrame, in torch's default dtype, or of a Series, in its own.

    Raises:
        ValueError: A column of the DataFrame does not hold real numbers.
    """
    pandas = sys.modules.get("pandas")  # a DataFrame exists only if pandas is imported
    if pandas is None or not isinstance(values, pandas.DataFrame | pandas.Series):
        return values
    if isinstance(values, pandas.Series):
        return values.to_numpy()
    is_numeric, is_complex = pandas.api.types.is_numeric_dtype, pandas.api.types.is_complex_dtype
    for label, dtype in zip(values.columns, values.dtypes, strict=True):
        if not is_numeric(dtype) or is_complex(dtype):
            raise ValueError(
                f"{name} must hold real numbers, but its column {label!r} has dtype {dtype}. Leave "
                "the column out, or encode it, for example with pandas.get_dummies"
            )
    dtype = torch.zeros(0).numpy().dtype  # the default dtype
    try:
        return values.to_numpy(dtype, na_value=np.nan)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} must hold real numbers: {first_line(error)}") from error


def _require_numbers(dtype: np.dtype, name: str) -> None:
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise ValueError(f"{name} must hold numbers, got dtype {dtype}")


def _require_real(values: Tensor, name: str) -> None:
    if values.is_complex() or values.is_meta:
        raise ValueError(
            f"{name} must hold real numbers, got dtype {values.dtype} on device {values.device}"
        )


def _empty(name: str, shape: torch.Size) -> ValueError:
    what = "is empty" if shape else "is one number"
    return ValueError(f"{name} {what}: expected shape (N, *event) with N >= 1, got {tuple(shape)}")
