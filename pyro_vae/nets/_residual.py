"""Residual networks for images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from pyro_vae._utils.checks import require_floats, require_same_type, require_tensor
from pyro_vae._utils.init_args import records_init_args
from pyro_vae.nets._images import ImageDecoder, ImageEncoder, checked_image_shape, enlargements


@records_init_args
class ResidualBlock(nn.Module):
    r"""A residual block with an identity shortcut (He et al. 2016, "Identity mappings").

    .. math:: y = x + W_2 * a(W_1 * a(x))

    The activation a is before each convolution. There is no batch normalization, because it would
    mix data points and particles.

    Args:
        channels: number of channels of x and y.
        activation: class or function that creates the nonlinearity.

    Shape:
        ``(N, channels, H, W)`` to the same shape.
    """

    def __init__(self, channels: int, activation: Callable[[], nn.Module] = nn.ReLU):
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        self.branch = nn.Sequential(
            activation(),
            nn.Conv2d(channels, channels, 3, padding=1),
            activation(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return y."""
        weight = self.branch[1].weight
        sizes = tuple(require_tensor("x", x).shape[-2:])
        require_floats("x", x, (weight.shape[1], *sizes))
        require_same_type("x", x, weight)
        return x + self.branch(x.clone())  # the first activation may change its input


@records_init_args
class ResidualEncoder(ImageEncoder):
    r"""Strided convolutions that halve height and width, each followed by residual blocks.

    Args:
        image_shape: (C, H, W), of any size.
        channels: output channels of each strided convolution and its blocks.
        blocks: number of residual blocks after each strided convolution.
        activation: class or function that creates the nonlinearity.

    Attributes:
        out_features: F, the number of features of an image.

    Shape:
        ``(..., C, H, W)`` to ``(..., F)``, for any leading dimensions.

    Raises:
        ValueError: A size is not positive, ``channels`` is empty, or ``blocks`` is less than one.
            Or, in a call, the shape of x does not end in ``image_shape``.
        TypeError: ``channels`` is a number.

    Example:
        >>> import torch, pyro_vae as pv
        >>> encoder = pv.nets.ResidualEncoder((3, 7, 5), channels=(4, 8))
        >>> encoder(torch.zeros(100, 3, 7, 5)).shape
        torch.Size([100, 32])
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        channels: Sequence[int] = (32, 64),
        blocks: int = 2,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ):
        depth, *_ = checked_image_shape(image_shape, channels)
        _check_blocks(blocks)
        layers: list[nn.Module] = []
        for size, next_size in itertools.pairwise([depth, *channels]):
            layers.append(nn.Conv2d(size, next_size, 3, stride=2, padding=1))
            layers += [ResidualBlock(next_size, activation) for _ in range(blocks)]
        super().__init__(image_shape, channels, nn.Sequential(*layers, activation()))


@records_init_args
class ResidualDecoder(ImageDecoder):
    r"""A dense layer, then stages of residual blocks, upsampling and a convolution.

    Upsampling is nearest-neighbor.

    Args:
        in_features: size of the last dimension of the input.
        image_shape: (C, H, W), of any size. Odd heights and widths are exact, too.
        channels: channels of the blocks, smallest maps first: those of the encoder in reverse.
        parameters_per_output: P, the number of parameters of the likelihood per number of x.
        blocks: number of residual blocks before each upsampling.
        activation: class or function that creates the nonlinearity.

    Shape:
        ``(..., in_features)`` to ``(..., P C, H, W)``, for any leading dimensions.

    Raises:
        ValueError: A size is not positive, ``channels`` is empty, or ``blocks`` is less than one.
        TypeError: ``channels`` is a number.

    Example:
        >>> import torch, pyro_vae as pv
        >>> decoder = pv.nets.ResidualDecoder(10, (3, 7, 5), channels=(8, 4))
        >>> decoder(torch.zeros(5, 100, 10)).shape
        torch.Size([5, 100, 3, 7, 5])
    """

    def __init__(
        self,
        in_features: int,
        image_shape: Sequence[int],
        channels: Sequence[int] = (64, 32),
        parameters_per_output: int = 1,
        blocks: int = 2,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ):
        checked_image_shape(image_shape, channels)
        _check_blocks(blocks)
        layers: list[nn.Module] = []
        for size, next_size, made in enlargements(image_shape, channels, parameters_per_output):
            layers += [ResidualBlock(size, activation) for _ in range(blocks)]
            layers += [nn.Upsample(made), activation(), nn.Conv2d(size, next_size, 3, padding=1)]
        super().__init__(
            in_features, image_shape, channels, parameters_per_output, nn.Sequential(*layers)
        )


def _check_blocks(blocks: int) -> None:
    if blocks < 1:
        raise ValueError(f"blocks must be at least 1, got {blocks}")
