"""Base classes of image networks, which handle sizes and any leading dimensions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pyro_vae._utils.checks import require_floats, require_same_type, require_tensor


class ImageEncoder(nn.Module):
    """Apply layers to images with any leading dimensions, and flatten the output.

    Args:
        image_shape: (C, H, W).
        channels: output channels of each layer. Each layer halves height and width, rounded up.
        layers: module from ``(N, C, H, W)`` to ``(N, channels[-1], h, w)``.

    Attributes:
        out_features: F, the number of features of an image.

    Shape:
        ``(..., C, H, W)`` to ``(..., F)``.
    """

    def __init__(self, image_shape: Sequence[int], channels: Sequence[int], layers: nn.Module):
        super().__init__()
        self.image_shape = checked_image_shape(image_shape, channels)
        *_, (height, width) = halvings(image_shape, channels)
        self.layers = layers
        self.out_features = channels[-1] * height * width

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of images.

        Raises:
            TypeError: x is not a floating-point tensor of the dtype of the weights.
            ValueError: The shape of x does not end in ``image_shape``.
        """
        if tuple(require_tensor("x", x).shape[-3:]) != self.image_shape:
            raise ValueError(
                f"x must have shape (..., C, H, W) ending in {self.image_shape} for "
                f"{type(self).__name__}, got shape {tuple(x.shape)}: reshape it, flat rows with "
                f"nn.Unflatten(-1, {self.image_shape})"
            )
        require_floats("x", x, self.image_shape)
        leading = x.shape[:-3]
        require_same_type("x", x, next(self.layers.parameters()))
        features = self.layers(x.reshape(leading.numel(), *self.image_shape))
        return features.reshape(*leading, self.out_features)


class ImageDecoder(nn.Module):
    """Make small feature maps, and apply layers that enlarge them to images.

    Args:
        in_features: size of the last dimension of the input.
        image_shape: (C, H, W).
        channels: input channels of each layer, smallest maps first. Each layer doubles height and
            width, and so inverts a halving of the encoder.
        parameters_per_output: P, the number of parameters of the likelihood per number of x.
        layers: module from ``(N, channels[0], h, w)`` to ``(N, P C, H, W)``.

    Shape:
        ``(..., in_features)`` to ``(..., P C, H, W)``.

    Raises:
        ValueError: ``in_features`` is not positive.
    """

    def __init__(
        self,
        in_features: int,
        image_shape: Sequence[int],
        channels: Sequence[int],
        parameters_per_output: int,
        layers: nn.Module,
    ):
        super().__init__()
        if in_features < 1:
            raise ValueError(f"in_features must be at least 1, got {in_features}")
        depth, *size = checked_image_shape(image_shape, channels)
        *_, smallest = halvings(image_shape, channels)
        self._small_shape = (channels[0], *smallest)
        self._large_shape = (parameters_per_output * depth, *size)
        self.first = nn.Linear(in_features, torch.Size(self._small_shape).numel())
        self.layers = layers

    def forward(self, z: Tensor) -> Tensor:
        """Return images, or parameters of images.

        Raises:
            TypeError: z is not a floating-point tensor of the dtype of the weights.
            ValueError: The last dimension of z is not ``in_features``.
        """
        require_floats("z", z, (self.first.in_features,))
        require_same_type("z", z, self.first.weight)
        leading = z.shape[:-1]
        maps = self.first(z).reshape(leading.numel(), *self._small_shape)
        return self.layers(maps).reshape(*leading, *self._large_shape)


def checked_image_shape(
    image_shape: Sequence[int], channels: Sequence[int]
) -> tuple[int, int, int]:
    """Return the shape of images as a tuple.

    Raises:
        ValueError: ``image_shape`` does not have three positive sizes. Or ``channels`` is empty or
            has a number that is not positive.
        TypeError: ``channels`` is a number.
    """
    if isinstance(channels, int):
        raise TypeError(f"channels must be a sequence, such as [{channels}], got {channels}")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(
            f"image_shape must be (channels, height, width), all positive, got {image_shape}"
        )
    if not channels or min(channels) < 1:
        raise ValueError(f"channels must be positive numbers, at least one, got {channels}")
    return tuple(image_shape)


def halvings(image_shape: Sequence[int], channels: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the height and width of an image, then those after each layer."""
    height, width = image_shape[1:]
    yield height, width
    for _ in channels:
        height, width = (height + 1) // 2, (width + 1) // 2
        yield height, width


def enlargements(
    image_shape: Sequence[int], channels: Sequence[int], parameters_per_output: int
) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Yield each decoder layer's input channels, output channels and output size.

    Raises:
        ValueError: ``parameters_per_output`` is not positive.
    """
    if parameters_per_output < 1:
        raise ValueError(f"parameters_per_output must be at least 1, got {parameters_per_output}")
    *sizes, _ = halvings(image_shape, channels)
    widths = [*channels, parameters_per_output * image_shape[0]]
    for pair, size in zip(itertools.pairwise(widths), reversed(sizes), strict=True):
        yield *pair, size
