"""Data frames as dictionaries of arrays and lists, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def dataframe_to_dict(frame: pd.DataFrame) -> dict[str, Any]:
    """Return the structure of a data frame.

    Raises:
        ValueError: two columns have one name.
    """
    import pandas as pd

    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()].to_list()
        raise ValueError(f"history must have a name for each column, got {twice} twice")
    default = isinstance(frame.index, pd.RangeIndex) and frame.index.equals(
        pd.RangeIndex(len(frame))
    )
    return {
        "columns": [(name, _of_values(frame[name])) for name in frame.columns],
        "rows": len(frame),
        "index": None if default else _of_values(frame.index),
        "index_name": frame.index.name,
    }


def dict_to_dataframe(structure: dict[str, Any]) -> pd.DataFrame:
    """Return the data frame of a structure."""
    import pandas as pd

    rows, index = structure["rows"], structure["index"]
    index = pd.RangeIndex(rows) if index is None else pd.Index(index)
    columns = {name: pd.Series(values, index=index) for name, values in structure["columns"]}
    frame = pd.DataFrame(columns, index=index)
    frame.index.name = structure["index_name"]
    return frame


def _of_values(values: pd.Series | pd.Index) -> np.ndarray | list[Any]:
    return values.to_list() if values.dtype.kind not in "biufc" else values.to_numpy()
