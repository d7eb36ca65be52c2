"""Data sets by name: split, scaled to [0, 1] and binarized."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from pyro_vae._utils.checks import checked, require_word
from pyro_vae.datasets import _download as download

#: The argument ``binarize`` of :func:`load`: ``"none"``, ``"fixed"`` or ``"dynamic"``.
Binarization: TypeAlias = Literal["none", "fixed", "dynamic"]


@dataclass(frozen=True)
class Dataset:
    """Images as rows, float32.

    Args:
        name: name of the data set.
        train: training images, (N, D).
        validation: validation images, (N, D).
        test: test images, (N, D).
        image_shape: (height, width) of a row, with D = height x width. For images of several
            channels, it is (channels, height, width), and D is the product.
        transform: the argument ``transform`` of :func:`pyro_vae.fit`. It is ``torch.bernoulli``
            for dynamic binarization, else None.
        labels: the classes of the rows, if they are known. :func:`load` leaves them to
            :func:`load_labels`.
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    image_shape: tuple[int, ...]
    transform: Callable[[Tensor], Tensor] | None = None
    labels: Labels | None = None

    def __repr__(self) -> str:
        height, width = self.image_shape
        binarized = "" if self.transform is None else f", transform={self.transform.__name__}"
        return (
            f"{self.name}: {len(self.train)} training, {len(self.validation)} validation and "
            f"{len(self.test)} test images of {height} x {width}{binarized}"
        )


@checked
def load(
    name: str,
    *,
    binarize: Binarization = "fixed",
    seed: int = 0,
    folder: str | Path | None = None,
) -> Dataset:
    r"""Load a data set.

    ==============  ===========  =====  ======================  ==================================
    name            N            D      train/validation/test   split
    ==============  ===========  =====  ======================  ==================================
    digits          1797         64     1297 / 200 / 300        permutation of seed 777
    mnist           70,000       784    50,000 / 10,000 /       file order; the test files
                                        10,000
    fashion-mnist   70,000       784    50,000 / 10,000 /       file order; the test files
                                        10,000
    freyfaces       1965         560    1565 / 200 / 200        permutation of seed 777
    static-mnist    70,000       784    50,000 / 10,000 /       the files
                                        10,000
    omniglot        32,415       784    23,000 / 1345 / 8070    permutation of seed 123; the test
                                                                data of the file
    ==============  ===========  =====  ======================  ==================================

    The digits (Alpaydin & Kaynak 1998, UCI, CC BY 4.0, as in scikit-learn) are part of the
    package. The other data sets are downloaded once and kept in the user's cache folder.

    ``"static-mnist"`` is the MNIST of Larochelle & Murray (2011), whose pixels were binarized once.
    So ``binarize`` and ``seed`` do not change it. ``"omniglot"`` has the characters of Lake et al.
    (2015) as 28 x 28 images, with the split of Burda et al. (2016).

    Args:
        name: one of the names above.
        binarize: ``"none"`` returns intensities in [0, 1]. ``"fixed"`` samples each pixel once from
            Bernoulli(intensity). ``"dynamic"`` returns intensities for ``train``, and fixed samples
            for ``validation`` and ``test``. Then ``fit(..., transform=data.transform)`` samples the
            pixels of each minibatch.
        seed: random seed of the fixed samples.
        folder: a data folder to search first, as in ``FOLDER/mnist/train-images-idx3-ubyte.gz``.
            The default is the environment variable ``PYRO_VAE_DATA``.

    Returns:
        The :class:`Dataset`.

    Raises:
        ValueError: The data set or the binarization is unknown. A file is truncated or has the
            wrong hash.
        FileNotFoundError: A file is not in the data folder and cannot be downloaded.
        ImportError: The extra ``data`` is not installed, and a file must be downloaded.

    Example:
        >>> import pyro_vae as pv
        >>> data = pv.datasets.load("digits")
        >>> data.train.shape, data.test.unique()
        (torch.Size([1297, 64]), tensor([0., 1.]))
    """
    if name not in _LOADERS:
        raise ValueError(f"unknown data set {name!r}: expected one of {', '.join(names())}")
    check_binarization(binarize)
    splits, image_shape = _LOADERS[name](folder)
    return binarized(Dataset(name, *splits, image_shape), binarize, seed)


def check_binarization(binarize: str) -> None:
    """Raise ValueError if the binarization is unknown."""
    require_word("binarize", binarize, get_args(Binarization))


def binarized(data: Dataset, binarize: Binarization, seed: int) -> Dataset:
    """Binarize the intensities of a data set; see :func:`load`."""
    if binarize == "none":
        return data
    generator = torch.Generator().manual_seed(seed)
    validation, test, train = (
        torch.bernoulli(split, generator=generator)
        for split in (data.validation, data.test, data.train)
    )
    if binarize == "dynamic":
        return replace(data, validation=validation, test=test, transform=torch.bernoulli)
    return replace(data, train=train, validation=validation, test=test)


@dataclass(frozen=True)
class Labels:
    """The classes of a data set's rows as integers from 0 to 9, in the order of the rows.

    Args:
        train: labels of the training images, (N,).
        validation: labels of the validation images, (N,).
        test: labels of the test images, (N,).
    """

    train: Tensor
    validation: Tensor
    test: Tensor

    def __repr__(self) -> str:
        return (
            f"{len(self.train)} training, {len(self.validation)} validation and {len(self.test)} "
            "test labels"
        )


@checked
def load_labels(name: str, *, folder: str | Path | None = None) -> Labels:
    """Load the labels of digits, mnist or fashion-mnist.

    Args:
        name: name of the data set.
        folder: a data folder to search first; see :func:`load`.

    Raises:
        ValueError: The data set is unknown or has no labels. A file is truncated or has the wrong
            hash.
        FileNotFoundError: A file is not in the data folder and cannot be downloaded.
        ImportError: A file must be downloaded, and the extra ``data`` is not installed.

    Example:
        >>> import pyro_vae as pv
        >>> pv.datasets.load_labels("digits").test.shape
        torch.Size([300])
    """
    if name not in _LABELS:
        raise ValueError(f"no labels for {name!r}: expected one of {', '.join(_LABELS)}")
    return Labels(*(torch.tensor(part).long() for part in _LABELS[name](folder)))


def names() -> list[str]:
    """Return the names that :func:`load` accepts."""
    return list(_LOADERS)


Splits: TypeAlias = tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int]]


def _digits(folder) -> Splits:
    return _permuted(download.load_digits(), levels=16, held_out=(200, 300)), (8, 8)


def _freyfaces(folder) -> Splits:
    images = download.FREYFACES.load(folder)
    return _permuted(images, levels=255, held_out=(200, 200)), (28, 20)


def _mnist(folder) -> Splits:
    return _idx(download.MNIST, folder), (28, 28)


def _fashion(folder) -> Splits:
    return _idx(download.FASHION, folder), (28, 28)


def _static_mnist(folder) -> Splits:
    train, validation, test = (intensities(file.load(folder), 1) for file in download.STATIC_MNIST)
    return (train, validation, test), (28, 28)


def _omniglot(folder, held_out: tuple[int, int] = (1345, 8070)) -> Splits:
    images = intensities(download.OMNIGLOT.load(folder), 1)
    rows, test = images[: -held_out[1]], images[-held_out[1] :]
    rows = rows[torch.from_numpy(np.random.RandomState(123).permutation(len(rows)))]
    return (rows[: -held_out[0]], rows[-held_out[0] :], test), (28, 28)


def _idx(files: tuple[download.SourceFile, download.SourceFile], folder):
    images, test = (intensities(file.load(folder), 255) for file in files)
    return images[:50_000], images[50_000:], test


def _permuted(images: np.ndarray, levels: int, held_out: tuple[int, int]):
    rows = intensities(images[_order(len(images))], levels)
    return rows.split([len(rows) - sum(held_out), *held_out])


def _order(count: int) -> np.ndarray:
    # Unlike default_rng, RandomState never changes its sequence, so the split never changes.
    return np.random.RandomState(777).permutation(count)


def intensities(images: np.ndarray, levels: int) -> Tensor:
    """Return images as rows of numbers in [0, 1], from integers up to ``levels``."""
    return torch.tensor(images.reshape(len(images), -1)).float() / levels


def _digit_labels(folder) -> list[np.ndarray]:
    labels = download.load_digits("labels")
    return np.split(labels[_order(len(labels))], [1297, 1497])


def _idx_labels(files: tuple[download.SourceFile, download.SourceFile], folder) -> list[np.ndarray]:
    train, test = (file.load(folder) for file in files)
    return [train[:50_000], train[50_000:], test]


_LABELS: dict[str, Callable[[str | Path | None], list[np.ndarray]]] = {
    "digits": _digit_labels,
    "mnist": functools.partial(_idx_labels, download.MNIST_LABELS),
    "fashion-mnist": functools.partial(_idx_labels, download.FASHION_LABELS),
}
_LOADERS: dict[str, Callable[[str | Path | None], Splits]] = {
    "digits": _digits,
    "mnist": _mnist,
    "fashion-mnist": _fashion,
    "freyfaces": _freyfaces,
    "static-mnist": _static_mnist,
    "omniglot": _omniglot,
}
