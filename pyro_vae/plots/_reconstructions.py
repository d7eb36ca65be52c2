"""Draw data beside their reconstructions, and samples of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pyro_vae._programs.pair_trace import Program
from pyro_vae._utils.checks import check_call, is_whole_number
from pyro_vae.datasets._columns import as_tensor
from pyro_vae.evaluation import generate, reconstruct
from pyro_vae.plots._axes import check_axes
from pyro_vae.plots._mosaic import (
    ImageShape,
    as_images,
    check_count,
    check_image_shape,
    draw_mosaic,
    in_rows,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def reconstructions(
    model: Program,
    guide: Program,
    x: Tensor,
    *covariates: Tensor,
    image_shape: ImageShape = None,
    plate: str | None = None,
    seed: int | None = 0,
    cmap: str = "gray_r",
    ax: Axes | None = None,
) -> Figure:
    r"""Draw images above their reconstructions :math:`E[x'|z]`, for one :math:`z \sim q(z|x)`.

    Ten data points are in one row. See :func:`pyro_vae.reconstruct`. All images have one scale: 0
    to 1, or wider if values lie outside.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        x: images ``(B, H, W)`` or ``(B, C, H, W)`` with 1 or 3 channels, or flat data ``(B, D)``
            with ``image_shape``.
        *covariates: further arguments of the programs.
        image_shape: shape of one image, ``(H, W)`` or ``(C, H, W)``. By default, that of x.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        seed: of the samples of z.
        cmap: matplotlib's colormap of images with one channel. ``"gray"`` is for photographs.
        ax: axes to draw on. By default, those of a new figure.

    Returns:
        The figure of the axes.

    Raises:
        ImportError: The extra ``report`` is not installed.
        ValueError: The data are not images, or are more than 1000. It also raises the errors of
            :func:`pyro_vae.reconstruct`.
        TypeError: An argument has the wrong type.

    Example:
        >>> import torch, pyro_vae as pv
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
        >>> x = torch.rand(6, 16).round()
        >>> figure = pv.plots.reconstructions(model, guide, x, image_shape=(4, 4))
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['data', 'E[x|z]']
    """
    check_call(reconstructions, locals())
    check_axes(ax)
    image_shape = check_image_shape(image_shape)
    x = as_tensor(x, "x", finite=False)
    originals = in_rows(as_images(x, image_shape))
    check_count("x", len(x))
    means = reconstruct(model, guide, x, *covariates, plate=plate, seed=seed)
    pairs = np.stack([originals, in_rows(as_images(means, image_shape))], 1)
    axes = draw_mosaic(
        ax,
        pairs.reshape(-1, *pairs.shape[2:]),
        rows=["data", "E[x|z]"] * len(pairs),
        cmap=cmap,
    )
    return axes.figure


def samples(
    model: Program,
    x: int | Tensor = 50,
    *covariates: Tensor,
    image_shape: ImageShape = None,
    guide: Program | None = None,
    draw: bool = False,
    plate: str | None = None,
    seed: int | None = 0,
    cmap: str = "gray_r",
    ax: Axes | None = None,
) -> Figure:
    r"""Draw images that a model generates: :math:`E[x|z]` for :math:`z \sim p(z)`.

    Ten images are in one row. See :func:`pyro_vae.generate`.

    Args:
        model: program of p(x, z).
        x: the number of images, or any data of the right shape; see :func:`pyro_vae.generate`.
        *covariates: further arguments of the program, with one row for each image.
        image_shape: shape of one image, ``(H, W)`` or ``(C, H, W)``. By default, that of x.
        guide: the guide that the model was fitted with. A model with ``pyro.param`` statements
            needs it.
        draw: draw samples of p(x|z) instead of means.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        seed: of the samples of z.
        cmap: matplotlib's colormap of images with one channel. ``"gray"`` is for photographs.
        ax: axes to draw on. By default, those of a new figure.

    Returns:
        The figure of the axes.

    Raises:
        ImportError: The extra ``report`` is not installed.
        ValueError: The data are not images, or are more than 1000. It also raises the errors of
            :func:`pyro_vae.generate`.
        TypeError: An argument has the wrong type.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
        ... )
        >>> figure = pv.plots.samples(model, 20, image_shape=(4, 4))
        >>> figure.savefig("samples.png")  # doctest: +SKIP
    """
    check_call(samples, locals())
    check_axes(ax)
    image_shape = check_image_shape(image_shape)
    check_count("x", x if is_whole_number(x) else len(as_tensor(x, "x", finite=False)))
    found = generate(model, x, *covariates, guide=guide, draw=draw, plate=plate, seed=seed)
    return draw_mosaic(ax, in_rows(as_images(found, image_shape)), cmap=cmap).figure
