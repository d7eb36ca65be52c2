"""Splits of a folder with files in the format of MNIST."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_vae._utils.checks import checked, positive_integer
from pyro_vae.datasets._datasets import (
    Binarization,
    Dataset,
    Labels,
    binarized,
    check_binarization,
    intensities,
)
from pyro_vae.datasets._idx import read_idx


@checked
def from_idx(
    folder: str | Path,
    *,
    num_validation: int | None = None,
    binarize: Binarization = "fixed",
    seed: int = 0,
) -> Dataset:
    """Return the splits of a folder with files in the format of MNIST, as :func:`load` does.

    Many data sets have this format and its file names, such as Kuzushiji-MNIST. Hashes are not
    verified. The folder has the files ``train-images-idx3-ubyte`` and ``t10k-images-idx3-ubyte``,
    and perhaps the labels ``train-labels-idx1-ubyte`` and ``t10k-labels-idx1-ubyte``, each with or
    without the ending ``.gz``. The last training images, in the order of the file, are those for
    validation.

    Args:
        folder: the folder. Its name is that of the data set.
        num_validation: number of validation images; the default is a sixth of the training images,
            which are 10,000 of 60,000.
        binarize: see :func:`load`.
        seed: random seed of the fixed samples of the binarization.

    Returns:
        The :class:`Dataset`. ``labels`` is None if the folder has none.

    Raises:
        ValueError: A file is damaged, or its shape does not fit the other files. Too few images are
            left for training.
        FileNotFoundError: The folder has no images for training or for the test.

    Example:
        >>> import tempfile, pathlib, numpy as np, pyro_vae as pv
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for name, count in [("train", 60), ("t10k", 20)]:
        ...     header = bytes([0, 0, 8, 3, 0, 0, 0, count, 0, 0, 0, 4, 0, 0, 0, 4])
        ...     images = np.random.randint(0, 256, (count, 4, 4), dtype=np.uint8)
        ...     path = folder / f"{name}-images-idx3-ubyte"
        ...     _ = path.write_bytes(header + images.tobytes())
        >>> data = pv.datasets.from_idx(folder)
        >>> data.train.shape, data.validation.shape, data.test.shape, data.image_shape
        (torch.Size([50, 16]), torch.Size([10, 16]), torch.Size([20, 16]), (4, 4))
    """
    check_binarization(binarize)
    folder = Path(folder)
    train, test = (_images(folder, part) for part in ("train", "t10k"))
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(
            f"the test images in {folder} must have the shape of the training images, "
            f"{train.shape[1:]}, got {test.shape[1:]}"
        )
    held_out = max(1, len(train) // 6)
    if num_validation is not None:
        held_out = positive_integer("num_validation", num_validation)
    if held_out >= len(train):
        raise ValueError(
            f"{folder} must have more than {held_out} training images, which are held out for "
            f"validation, got {len(train)}"
        )
    split = len(train) - held_out
    data = Dataset(
        folder.resolve().name,
        *(intensities(images, 255) for images in (train[:split], train[split:], test)),
        image_shape=train.shape[1:],
    )
    of_train, of_test = _labels(folder, "train", len(train)), _labels(folder, "t10k", len(test))
    if of_train is not None and of_test is not None:
        data = replace(data, labels=Labels(of_train[:split], of_train[split:], of_test))
    return binarized(data, binarize, seed)


def _images(folder: Path, part: str) -> np.ndarray:
    name = f"{part}-images-idx3-ubyte"
    images = _read(folder, name)
    if images is None:
        raise FileNotFoundError(f"{folder} must have the file {name} or {name}.gz, got none")
    if images.ndim != 3 or not images.size:
        raise ValueError(f"{folder / name} must have images (N, height, width), got {images.shape}")
    return images


def _labels(folder: Path, part: str, count: int) -> Tensor | None:
    name = f"{part}-labels-idx1-ubyte"
    labels = _read(folder, name)
    if labels is None:
        return None
    if labels.shape != (count,):
        raise ValueError(f"{folder / name} must have {count} labels, got shape {labels.shape}")
    return torch.tensor(labels).long()


def _read(folder: Path, name: str) -> np.ndarray | None:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            try:
                return read_idx(path)
            except (OSError, EOFError, ValueError, zlib.error) as error:
                raise ValueError(f"{path} is truncated or not an IDX file: {error}") from error
    return None
