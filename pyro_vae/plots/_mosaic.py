"""Images in a grid of rows and columns, drawn as one image on one axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae._utils.checks import positive_integer
from pyro_vae.plots._arguments import as_list
from pyro_vae.plots._axes import WIDTH, axes_for, literal, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ImageShape = Sequence[int] | None
COLUMNS = 10
MOST_IMAGES = 1000
_CHANNELS = (1, 3)


def check_image_shape(image_shape: Any) -> tuple[int, ...] | None:
    """Return the shape of an image as a tuple, or None.

    Raises:
        TypeError: The shape is not a sequence of whole numbers.
        ValueError: The shape is neither (height, width) nor (channels, height, width).
    """
    if image_shape is None:
        return None
    sizes = as_list("image_shape", image_shape, "(28, 28)")
    shape = tuple(positive_integer("each size in image_shape", size) for size in sizes)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] not in _CHANNELS):
        raise ValueError(
            "image_shape must be (height, width) or (channels, height, width) with 1 or 3 "
            f"channels, got {image_shape!r}"
        )
    return shape


def as_images(values: Tensor, image_shape: tuple[int, ...] | None, name: str = "x") -> np.ndarray:
    """Return data as images ``(N, H, W)``, or ``(N, H, W, 3)`` with colors.

    Args:
        values: data ``(N, *event)``.
        image_shape: shape of one image, or None for the shape of one data point.
        name: name of the data in messages.

    Raises:
        ValueError: The data are not images.
    """
    shape = tuple(values.shape[1:]) if image_shape is None else image_shape
    if image_shape is None and (len(shape) not in (2, 3) or shape[-3:-2] not in ((), (1,), (3,))):
        raise ValueError(
            f"{name} must be images of shape (N, height, width) or (N, channels, height, width) "
            f"with 1 or 3 channels, got {tuple(values.shape)}. For flat images, pass "
            "image_shape=(height, width)"
        )
    if math.prod(shape) != math.prod(values.shape[1:]):
        raise ValueError(
            f"image_shape {shape} does not fit {name} of shape {tuple(values.shape)}. Pass sizes "
            "whose product is the number of values of a data point"
        )
    images = values.detach().cpu().double().reshape(len(values), *shape)
    if len(shape) == 3:
        images = images.movedim(1, -1) if shape[0] == 3 else images.squeeze(1)
    return images.numpy()


def check_count(name: str, count: int) -> None:
    """Raise ValueError if there are more images than one figure can show."""
    if count > MOST_IMAGES:
        raise ValueError(
            f"{name} must have at most {MOST_IMAGES} images in one plot, got {count}. Pass fewer "
            "rows"
        )


def in_rows(images: np.ndarray) -> np.ndarray:
    """Arrange N images in rows of ten, ``(rows, columns, *image)``, with NaN after the last."""
    columns = min(COLUMNS, len(images))
    rows = -(-len(images) // columns)
    full = np.full((rows * columns, *images.shape[1:]), np.nan)
    full[: len(images)] = images
    return full.reshape(rows, columns, *images.shape[1:])


def draw_mosaic(
    ax: Any,
    images: np.ndarray,
    *,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    xlabel: str = "",
    ylabel: str = "",
    cmap: str = "gray_r",
) -> Axes:
    """Draw a grid of images. The center of the image in row r and column c is at (c, r).

    All images have one scale of gray: 0 to 1, or wider if values lie outside.

    Args:
        ax: axes, or None for a new figure.
        images: ``(R, C, H, W)``, or ``(R, C, H, W, 3)`` with colors. NaN is not drawn.
        rows: labels of the rows.
        columns: labels of the columns.
        xlabel: label of the horizontal axis.
        ylabel: label of the vertical axis.
        cmap: name of the colormap of gray images.

    Raises:
        ImportError: The extra ``report`` is not installed.
        TypeError: ``ax`` is neither axes nor None.
    """
    count, across, height, width = images.shape[:4]
    gap = max(1, round(min(height, width) / 14))
    pitch = height + gap, width + gap
    longest = max(map(len, rows), default=0)
    inches = WIDTH - 0.09 * longest - 0.25 * bool(ylabel)
    inches = min(inches, 0.62 * across) if not columns else inches
    tall = inches * (count * pitch[0]) / (across * pitch[1])
    ax = axes_for(
        ax,
        tall + 0.2 * bool(columns) + 0.2 * bool(xlabel) + 0.08,
        inches + 0.09 * longest + 0.25 * bool(ylabel) + 0.1,
    )
    half = (height / pitch[0] / 2, width / pitch[1] / 2)
    ax.imshow(
        _tiled(_colored(images), gap),
        cmap=cmap,
        vmin=0.0,
        vmax=1.0,
        extent=(-half[1], across - 1 + half[1], count - 1 + half[0], -half[0]),
        aspect=pitch[0] / pitch[1],
    )
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xticks(range(len(columns)), columns)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return ax


def _colored(images: np.ndarray) -> np.ndarray:
    """Return images on a scale from 0 to 1, with an opacity where they have colors."""
    finite = images[np.isfinite(images)]
    low, high = min(0.0, finite.min(initial=0.0)), max(1.0, finite.max(initial=1.0))
    scaled = (images - low) / (high - low)
    if images.ndim == 4:
        return scaled
    seen = np.isfinite(scaled).all(-1, keepdims=True)
    return np.concatenate([np.where(seen, scaled, 0.0), seen], -1)


def _tiled(images: np.ndarray, gap: int) -> np.ndarray:
    """Join images ``(R, C, H, W, ...)`` to one, with gaps of NaN or zero opacity."""
    rows, columns, height, width, *channels = images.shape
    shape = (rows, columns, height + gap, width + gap, *channels)
    spaced = np.full(shape, 0.0 if channels else np.nan)
    spaced[:, :, :height, :width] = images
    joined = np.moveaxis(spaced, 1, 2).reshape(rows * shape[2], columns * shape[3], *channels)
    return joined[:-gap, :-gap]


def image_rows(rows: list[tuple[str, Tensor]], image_shape: tuple[int, ...]) -> Figure:
    """Draw rows of images, each below its label.

    Args:
        rows: label and images (B, D), usually in [0, 1]. Each row has its own gray scale.
        image_shape: (height, width), whose product is D.
    """
    count = max(len(images) for _, images in rows)
    of_row = 0.3 + WIDTH * image_shape[-2] / (image_shape[-1] * count)  # inches
    figure = new_figure(of_row * len(rows))
    every = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, (label, images) in zip(every, rows, strict=True):
        draw_mosaic(axes, as_images(torch.as_tensor(images), image_shape)[None])
        axes.set_title(literal(label), loc="left", fontsize="medium")
    return figure
