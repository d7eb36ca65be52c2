"""Data for the command line: a data set by name, or a file of numbers."""

from __future__ import annotations

import csv
import math
import pickle
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae._utils.messages import first_line

FORMATS = (".npy", ".npz", ".csv", ".pt")
PARTS = ("train", "validation", "test")
# The data and their split do not depend on the seed of a comparison.
_BINARIZATION_SEED, _SPLIT_SEED = 0, 777
_SHARES = {"validation": 0.1, "test": 0.2}
_FEWEST = 10  # rows of a file
_UNREADABLE = (ValueError, EOFError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError)


@dataclass(frozen=True)
class Splits:
    """Training, validation and test data.

    Args:
        description: name and preparation of the data, for readers.
        train: training data (N, ...).
        validation: validation data.
        test: test data.
        image_shape: (height, width) of a data point, if it is an image.
        transform: argument of :func:`pyro_vae.fit`.
    """

    description: str
    train: Tensor
    validation: Tensor
    test: Tensor
    image_shape: tuple[int, int] | None = None
    transform: Callable[[Tensor], Tensor] | None = None

    @property
    def sizes(self) -> str:
        """The number of data points of each part, and the shape of one."""
        shape = " x ".join(map(str, self.train.shape[1:])) or "1"
        return (
            f"{len(self.train):,} training, {len(self.validation):,} validation and "
            f"{len(self.test):,} test data points of {shape} numbers"
        )


def load_splits(
    source: str, *, dynamic: bool = False, folder: Path | None = None, test: Path | None = None
) -> Splits:
    """Load a data set by name, or the rows of a file.

    Args:
        source: name of a data set, or path of a file.
        dynamic: whether to binarize each training minibatch at random.
        folder: data folder; see :func:`pyro_vae.datasets.load`.
        test: file of the test data. By default, the data contain them.

    Raises:
        ValueError: There is no such data set or file, or the file cannot be read.
        TypeError: The file does not hold numbers.
    """
    if source in pv.datasets.names():
        if test is not None:
            raise ValueError(f"--test is for files, but {source} has its own test data")
        return _data_set(source, dynamic, folder)
    if Path(source).suffix.lower() not in FORMATS:
        raise ValueError(
            f"--data {source} is unknown: expected one of {', '.join(pv.datasets.names())}, or a "
            f"file of type {', '.join(FORMATS)}"
        )
    if dynamic:
        raise ValueError("--dynamic needs the intensities of a data set by name, not a file")
    parts = _read(Path(source))
    if test is not None:
        parts = {**parts, "test": _only(_read(test), test)}
    return _split(source if test is None else f"{source}, test data {test}", parts)


def _data_set(name: str, dynamic: bool, folder: Path | None) -> Splits:
    images = pv.datasets.load(
        name,
        binarize="dynamic" if dynamic else "fixed",
        seed=_BINARIZATION_SEED,
        folder=folder,
    )
    how = "training data binarized in each minibatch" if dynamic else "binarized once"
    return Splits(
        f"{name}, {how}",
        images.train,
        images.validation,
        images.test,
        images.image_shape,
        images.transform,
    )


def _split(description: str, parts: dict[str, Tensor]) -> Splits:
    """Split rows at random, with a fixed seed, where a file has no validation or test data."""
    train = parts["train"]
    missing = [name for name in ("test", "validation") if name not in parts]
    if missing and len(train) < _FEWEST:
        raise ValueError(f"{description} must have at least {_FEWEST} rows, got {len(train)}")
    if missing:
        # Unlike default_rng, RandomState never changes its sequence, so the split never changes.
        order = np.random.RandomState(_SPLIT_SEED).permutation(len(train))
        start = 0
        for name in missing:
            count = max(1, round(_SHARES[name] * len(train)))
            parts = {**parts, name: train[order[start : start + count]]}
            start += count
        parts["train"] = train[order[start:]]
        shares = " and ".join(f"{_SHARES[name]:.0%} for {name}" for name in missing)
        description += f", split at random with a fixed seed, {shares}"
    shapes = {name: tuple(parts[name].shape[1:]) for name in PARTS}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{description} has rows of different shapes: {shapes}")
    shape = shapes["train"]
    return Splits(description, *(parts[n] for n in PARTS), shape if len(shape) == 2 else None)


def _read(path: Path) -> dict[str, Tensor]:
    """Return the arrays of a file by the names of :data:`PARTS`."""
    read = {".npy": _read_npy, ".npz": _read_npz, ".csv": _read_csv, ".pt": _read_pt}
    suffix = path.suffix.lower()
    if suffix not in read:
        raise ValueError(f"{path} must be of type {', '.join(FORMATS)}")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        found = read[suffix](path)
    except _UNREADABLE as error:
        raise ValueError(f"cannot read {path}: {first_line(error)}") from error
    arrays = found if isinstance(found, dict) else {"train": found}
    if "train" not in arrays:
        if len(arrays) != 1:
            raise ValueError(
                f"{path} must have one array, or arrays named {', '.join(PARTS)}, got "
                f"{', '.join(map(str, arrays)) or 'no array'}"
            )
        arrays = {"train": next(iter(arrays.values()))}
    return {n: _numbers(arrays[n], f"{n} of {path}") for n in PARTS if n in arrays}


def _only(parts: dict[str, Tensor], path: Path) -> Tensor:
    """Return the rows of a file of test data."""
    return parts.get("test", parts["train"])


def _read_npy(path: Path) -> Any:
    return np.load(path, allow_pickle=False)


def _read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        names = file.files
        return {name: file[name] for name in names if "train" not in names or name in PARTS}


def _read_csv(path: Path) -> np.ndarray:
    with path.open(encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file), [])
    header = int(_are_names(names))
    if header and not names[0].strip():
        raise ValueError(
            "its first column has no name, as row numbers that pandas writes. Remove them "
            "(index=False), because they would be data"
        )
    options: dict[str, Any] = {
        "delimiter": ",", "skiprows": header, "ndmin": 2, "encoding": "utf-8-sig"
    }  # fmt: skip
    with warnings.catch_warnings():  # a file without numbers
        warnings.simplefilter("ignore")
        try:
            return np.loadtxt(path, **options)
        except ValueError:  # perhaps of empty cells, which are missing numbers
            pass
        try:
            return np.loadtxt(path, **options, quotechar='"', converters=_number_or_nan)
        except ValueError as error:
            if separator := next((s for s in ";\t" if any(s in name for name in names)), None):
                raise ValueError(
                    f"{first_line(error)}. If its cells are separated by {separator!r}, write it "
                    "with commas between them, and with a point in decimal numbers"
                ) from error
            raise


def _number_or_nan(cell: str) -> float:
    return float(cell) if cell.strip() else math.nan


def _are_names(cells: list[str]) -> bool:
    """Return whether the first row of a file has names of columns. pandas may name them 0, 1, 2."""
    filled = [cell for cell in cells if cell.strip()]
    if len(filled) > 2 and filled == [str(number) for number in range(len(filled))]:
        return True
    try:
        [float(cell) for cell in filled]  # the row may have missing values
    except ValueError:
        return True
    return False


def _read_pt(path: Path) -> Any:
    return torch.load(path, weights_only=True, map_location="cpu")


def _numbers(values: Any, name: str) -> Tensor:
    """Return an array or tensor as a tensor. Floating-point numbers get torch's default dtype."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
        kind = values.dtype.newbyteorder("=")
        values = torch.from_numpy(np.ascontiguousarray(values, kind))
    if not isinstance(values, Tensor):
        dtype = getattr(values, "dtype", type(values).__name__)
        raise TypeError(f"{name} must be an array of numbers, got {dtype}")
    if values.dim() == 0 or len(values) == 0:
        raise ValueError(f"{name} must have at least one row, got shape {tuple(values.shape)}")
    values = values.detach()
    return values.to(torch.get_default_dtype()) if values.is_floating_point() else values
