"""Convolutional networks for images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import nn

from pyro_vae._utils.init_args import records_init_args
from pyro_vae.nets._images import ImageDecoder, ImageEncoder, checked_image_shape, enlargements


@records_init_args
class ConvEncoder(ImageEncoder):
    r"""Strided convolutions. Each halves height and width, rounded up.

    Args:
        image_shape: (C, H, W), of any size.
        channels: output channels of each convolution. The activation follows each.
        activation: class or function that creates the nonlinearity.

    Attributes:
        out_features: F, the number of features of an image.

    Shape:
        ``(..., C, H, W)`` to ``(..., F)``, for any leading dimensions.

    Raises:
        ValueError: A size is not positive, or ``channels`` is empty. Or, in a call, the shape of x
            does not end in ``image_shape``.
        TypeError: ``channels`` is a number.

    Example:
        >>> import torch, pyro_vae as pv
        >>> encoder = pv.nets.ConvEncoder((1, 28, 20), channels=(8, 16))
        >>> encoder(torch.zeros(100, 1, 28, 20)).shape, encoder.out_features
        (torch.Size([100, 560]), 560)
        >>> of_rows = torch.nn.Sequential(torch.nn.Unflatten(-1, (1, 28, 20)), encoder)
        >>> of_rows(torch.zeros(100, 560)).shape
        torch.Size([100, 560])
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        channels: Sequence[int] = (32, 64),
        activation: Callable[[], nn.Module] = nn.ReLU,
    ):
        depth, *_ = checked_image_shape(image_shape, channels)
        layers: list[nn.Module] = []
        for size, next_size in itertools.pairwise([depth, *channels]):
            layers += [nn.Conv2d(size, next_size, 3, stride=2, padding=1), activation()]
        super().__init__(image_shape, channels, nn.Sequential(*layers))


@records_init_args
class ConvDecoder(ImageDecoder):
    r"""A dense layer, then transposed convolutions. Each convolution doubles height and width.

    Args:
        in_features: size of the last dimension of the input.
        image_shape: (C, H, W), of any size. Odd heights and widths are exact, too.
        channels: input channels of each convolution, smallest maps first: those of the encoder in
            reverse.
        parameters_per_output: P, the number of parameters of the likelihood per number of x.
        activation: class or function that creates the nonlinearity between layers.

    Shape:
        ``(..., in_features)`` to ``(..., P C, H, W)``, for any leading dimensions.

    Raises:
        ValueError: A size is not positive, or ``channels`` is empty.
        TypeError: ``channels`` is a number.

    Example:
        >>> import torch, pyro_vae as pv
        >>> decoder = pv.nets.ConvDecoder(10, (3, 7, 5), channels=(16, 8), parameters_per_output=2)
        >>> likelihood = pv.likelihoods.DiscretizedLogistic(decoder, event_dim=3)
        >>> likelihood(torch.zeros(100, 10)).event_shape
        torch.Size([3, 7, 5])
        >>> to_rows = torch.nn.Sequential(
        ...     pv.nets.ConvDecoder(10, (1, 28, 20)), torch.nn.Flatten(-3)
        ... )
        >>> to_rows(torch.zeros(100, 10)).shape
        torch.Size([100, 560])
    """

    def __init__(
        self,
        in_features: int,
        image_shape: Sequence[int],
        channels: Sequence[int] = (64, 32),
        parameters_per_output: int = 1,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ):
        checked_image_shape(image_shape, channels)
        layers: list[nn.Module] = []
        for size, next_size, made in enlargements(image_shape, channels, parameters_per_output):
            padding = [1 - n % 2 for n in made]  # from n to 2n - 1 or 2n
            layers += [
                activation(),
                nn.ConvTranspose2d(size, next_size, 3, stride=2, padding=1, output_padding=padding),
            ]
        super().__init__(
            in_features, image_shape, channels, parameters_per_output, nn.Sequential(*layers)
        )
