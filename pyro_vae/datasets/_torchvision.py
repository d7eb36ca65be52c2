"""Splits of an image data set with the interface of torchvision, which is not imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
)

_SPLIT_SEED = 777
_CHANNELS = (1, 3, 4)


@checked
def from_torchvision(
    train: Any,
    test: Any = None,
    *,
    num_validation: int | None = None,
    num_test: int | None = None,
    binarize: Binarization = "none",
    seed: int = 0,
) -> Dataset:
    """Return the splits of a torchvision data set of images, as :func:`load` does.

    The images are read once and kept in memory. Rows for validation, and for the test if ``test``
    is None, are drawn from ``train`` by the permutation of seed 777. torchvision itself is not
    needed: any object works that has a length and items ``(image, label)``.

    Args:
        train: the data set. An image is a PIL image, or a tensor or array (channels, height, width)
            or (height, width). All have one size. Integers are from 0 to 255, and floating-point
            numbers in [0, 1]. Images that other transforms change at random are read once.
        test: the data set of the test images, such as the one with ``train=False``.
        num_validation: number of validation images; the default is a tenth of ``train``.
        num_test: number of test images if ``test`` is None; the default is a fifth of ``train``.
        binarize: see :func:`load`. The default returns intensities, because color images are not
            binary.
        seed: random seed of the fixed samples of the binarization.

    Returns:
        The :class:`Dataset`. Rows are (channels, height, width) in one dimension. ``image_shape``
        is (height, width) for one channel. ``labels`` is None if the items have no integer labels.

    Raises:
        ValueError: An image has another size or has values outside [0, 1]. Too few images are left
            for training. ``num_test`` is passed together with ``test``.
        TypeError: ``train`` or ``test`` has no length or no items, or an image has another type.

    Example:
        >>> import torch, pyro_vae as pv
        >>> images = [(torch.rand(1, 4, 4), label % 2) for label in range(50)]
        >>> data = pv.datasets.from_torchvision(images)
        >>> data.train.shape, data.validation.shape, data.test.shape, data.image_shape
        (torch.Size([35, 16]), torch.Size([5, 16]), torch.Size([10, 16]), (4, 4))
        >>> data.labels.test.shape
        torch.Size([10])
    """
    check_binarization(binarize)
    images, labels = _read(train, "train")
    if test is not None:
        if num_test is not None:
            raise ValueError("num_test must be None if test has the test images. Leave one out")
        test_images, test_labels = _read(test, "test")
        if test_images.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"test must have images of shape {tuple(images.shape[1:])}, as train has, got "
                f"{tuple(test_images.shape[1:])}"
            )
    count = len(images)
    held_out = [
        _number("num_validation", num_validation, count // 10),
        0 if test is not None else _number("num_test", num_test, count // 5),
    ]
    if sum(held_out) >= count:
        raise ValueError(
            f"train must have more than {sum(held_out)} images, which are held out, got {count}"
        )
    # Unlike default_rng, RandomState never changes its sequence, so the split never changes.
    order = torch.from_numpy(np.random.RandomState(_SPLIT_SEED).permutation(count))
    rows = order.split([count - sum(held_out), *held_out])
    parts = [images[each] for each in rows]
    classes = None if labels is None else [labels[each] for each in rows]
    if test is not None:
        parts[2] = test_images
        if classes is not None and test_labels is not None:
            classes[2] = test_labels
        else:
            classes = None
    _, channels, *size = images.shape
    data = Dataset(
        type(train).__name__.lower(),
        *(part.flatten(1) for part in parts),
        image_shape=tuple(size) if channels == 1 else (channels, *size),
        labels=None if classes is None else Labels(*classes),
    )
    return binarized(data, binarize, seed)


def _number(name: str, value: int | None, default: int) -> int:
    return max(1, default) if value is None else positive_integer(name, value)


def _read(source: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Return all images (N, channels, height, width), in [0, 1], and labels (N,) or None."""
    try:
        count = len(source)
        first, last = (_image(source[i], f"{name}[{i}]") for i in (0, count - 1))
    except (TypeError, IndexError, KeyError) as error:
        if name in str(error):
            raise
        raise TypeError(
            f"{name} must be a data set with a length and items (image, label), got "
            f"{type(source).__name__}"
        ) from error
    images = _stored_images(source, first, last)
    targets = getattr(source, "targets", None)
    if images is None or targets is None or len(targets) != count:
        items = [source[i] for i in range(count)]
        images = torch.stack([_same(first, item, f"{name}[{i}]") for i, item in enumerate(items)])
        targets = [item[1] if _is_pair(item) and len(item) > 1 else None for item in items]
    return images, _labels(targets)


def _stored_images(source: Any, first: Tensor, last: Tensor) -> Tensor | None:
    """Return the attribute ``data`` as images, if its first and last row are those of the items.

    It is read at once, but transforms of the items do not change it.
    """
    data = getattr(source, "data", None)
    if not isinstance(data, Tensor | np.ndarray) or data.ndim not in (3, 4):
        return None
    stored = torch.as_tensor(data)
    if len(stored) != len(source) or stored.dtype != torch.uint8:
        return None
    layouts = [stored.unsqueeze(1)] if stored.dim() == 3 else [stored, stored.movedim(-1, 1)]
    for images in layouts:
        ends = images[[0, -1]].float() / 255
        if ends.shape[1:] == first.shape and torch.equal(ends, torch.stack([first, last])):
            return images.float() / 255
    return None


def _same(first: Tensor, item: Any, name: str) -> Tensor:
    image = _image(item, name)
    if image.shape != first.shape:
        raise ValueError(
            f"{name} must be an image of shape {tuple(first.shape)}, as the first one, got "
            f"{tuple(image.shape)}. Resize the images with a transform"
        )
    return image


def _image(item: Any, name: str) -> Tensor:
    """Return the image of an item, (channels, height, width), in [0, 1]."""
    value = item[0] if _is_pair(item) else item
    if isinstance(value, Tensor):
        image, channels_last = value, False
    else:
        array = np.asarray(value)
        if array.dtype.kind not in "buif" or array.ndim not in (2, 3):
            raise TypeError(
                f"{name} must be an image (a PIL image, a tensor or an array), got "
                f"{type(value).__name__}"
            )
        is_pil = not isinstance(value, np.ndarray)
        image = torch.from_numpy(np.array(array))
        channels_last = is_pil or (array.shape[-1] in _CHANNELS and array.shape[0] not in _CHANNELS)
    if image.dim() == 2:
        image = image.unsqueeze(0)
    elif image.dim() != 3:
        raise ValueError(f"{name} must have two or three dimensions, got {tuple(image.shape)}")
    elif channels_last:
        image = image.movedim(-1, 0)
    is_integer = not image.is_floating_point() and image.dtype != torch.bool
    image = image.float() / 255 if is_integer else image.float()
    low, high = image.min().item(), image.max().item()
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"{name} has values in [{low:g}, {high:g}]. Images must be in [0, 1] (integers: 0 to "
            "255). Leave out a transform such as Normalize"
        )
    return image


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple | list) and len(item) > 0


def _labels(targets: Sequence[Any] | Tensor) -> Tensor | None:
    """Return labels as integers (N,), or None if they are not integers."""
    try:
        labels = torch.as_tensor(np.asarray(targets))
    except TypeError:  # None, strings or objects
        return None
    return labels.long() if labels.dim() == 1 and not labels.is_floating_point() else None
