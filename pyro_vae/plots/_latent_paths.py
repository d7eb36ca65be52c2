"""Draw decoded points of the latent space: along its dimensions, between codes, and on a grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_vae._programs.argument_shapes import spec_of_x
from pyro_vae._programs.data_plate import name_data_plate
from pyro_vae._programs.evaluation import evaluation_mode
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import device_of, parameter_store
from pyro_vae._utils.checks import check_call, positive_integer, positive_number
from pyro_vae.datasets._columns import as_tensor
from pyro_vae.evaluation import decode, encode, interpolate
from pyro_vae.evaluation._decode import NEEDS_X
from pyro_vae.evaluation._given_latents import remedy_outside_support
from pyro_vae.evaluation._interpolate import Path
from pyro_vae.evaluation._predict import as_covariates
from pyro_vae.plots._axes import check_axes
from pyro_vae.plots._dimensions import choose_dimensions, names_of
from pyro_vae.plots._mosaic import (
    ImageShape,
    as_images,
    check_count,
    check_image_shape,
    draw_mosaic,
)
from pyro_vae.plots._prior import NOT_FREE, PriorOfSite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIXTEEN, _EIGHTY_FOUR = 0.15865525, 0.84134475  # of a normal, one standard deviation off


def traversals(
    model: Program,
    guide: Program,
    x: Tensor,
    *covariates: Tensor,
    row: int = 0,
    site: str | None = None,
    dimensions: Sequence[int] | None = None,
    num: int = 9,
    reach: float = 2.0,
    image_shape: ImageShape = None,
    plate: str | None = None,
    seed: int | None = 0,
    cmap: str = "gray_r",
    ax: Axes | None = None,
) -> Figure:
    r"""Draw :math:`E[x|z]` while one dimension of z moves away from the code of a data point.

    The code m is the mean of q(z|x), see :func:`pyro_vae.encode`. A row of images shows

    .. math::
        z = m + t \, s_d \, e_d, \qquad -\text{reach} \le t \le \text{reach}

    for one dimension d of the latent, with its unit vector :math:`e_d`. :math:`s_d` is half of the
    distance between the 16% and the 84% quantile of the prior. For a Gaussian prior, it is the
    standard deviation. Rows that do not change belong to dimensions that the decoder ignores. If
    not all real numbers are possible, as for a Beta prior, z stays between the 0.1% and the 99.9%
    quantile of the prior, or stops at the code.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        x: images, as in :func:`reconstructions`.
        *covariates: further arguments of the programs.
        row: the number of the data point in x.
        site: name of the latent site; by default, the only latent.
        dimensions: the dimensions d, as positions in the flattened latent. By default, the ten with
            the smallest standard deviation of q(z|x) relative to the prior, in order.
        num: number of images in a row, at least 2. An odd number has the code in its middle.
        reach: the largest t.
        image_shape: shape of one image, ``(H, W)`` or ``(C, H, W)``. By default, that of x.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        seed: of all samples.
        cmap: matplotlib's colormap of images with one channel. ``"gray"`` is for photographs.
        ax: axes to draw on. By default, those of a new figure.

    Returns:
        The figure of the axes.

    Raises:
        ImportError: The extra ``report`` is not installed.
        ValueError: The data are not images, a row or dimension does not exist, the latent is
            discrete, or its numbers cannot change alone, as on a simplex. It also raises the errors
            of :func:`pyro_vae.encode` and :func:`pyro_vae.decode`.
        TypeError: An argument has the wrong type.

    Example:
        >>> import torch, pyro_vae as pv
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
        >>> x = torch.rand(6, 16).round()
        >>> figure = pv.plots.traversals(model, guide, x, row=3, image_shape=(4, 4))
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['z[0]', 'z[1]']
    """
    check_call(traversals, locals())
    check_axes(ax)
    num = positive_integer("num", num, minimum=2)
    reach = positive_number("reach", reach)
    image_shape = check_image_shape(image_shape)
    x = as_tensor(x, "x", finite=False)
    as_images(x[:1], image_shape)
    if (row := positive_integer("row", row, minimum=0)) >= len(x):
        raise ValueError(f"row must be below the number of data points, {len(x)}, got {row}")
    columns = [x, *as_covariates(covariates, model, guide)]
    columns = [column[row : row + 1] for column in columns]
    code = encode(model, guide, *columns, site=site, plate=plate, seed=seed)
    if code.masked.any():
        raise ValueError(
            f"latent site {code.site!r} is masked for row {row}, so it has no code. Pass another "
            "row or site"
        )
    device = device_of(model, guide)
    prior = PriorOfSite(model, guide, [c.to(device) for c in columns], code.site, seed)
    low, high = prior.quantiles(torch.tensor([_SIXTEEN, _EIGHTY_FOUR]))
    scale = (high - low) / 2
    certainty = -(code.std.flatten().double() / scale)
    chosen = choose_dimensions(dimensions, certainty)
    check_count("dimensions and num", num * len(chosen))
    steps = torch.linspace(-reach, reach, num, dtype=torch.double)
    center, bounds = code.mean.flatten().double(), prior.bounds()
    points = center.repeat(len(chosen), num, 1)
    for number, dimension in enumerate(chosen):
        moved = center[dimension] + steps * scale[dimension]
        if bounds is not None:
            moved = moved.clamp(
                torch.minimum(bounds[0], center)[dimension],
                torch.maximum(bounds[1], center)[dimension],
            )
        points[number, :, dimension] = moved
    points = points.to(code.mean.dtype).reshape(-1, *code.mean.shape[1:])
    with remedy_outside_support(NOT_FREE):
        found = decode(
            model,
            {code.site: points},
            *(_repeated(each, len(points)) for each in columns[1:]),
            x=columns[0],
            guide=guide,
            plate=plate,
            seed=seed,
        )
    images = as_images(found, image_shape)
    axes = draw_mosaic(
        ax,
        images.reshape(len(chosen), num, *images.shape[1:]),
        rows=names_of(code.site, chosen, len(scale)),
        columns=_marks(steps),
        xlabel="distance from the code, standard deviations of the prior",
        cmap=cmap,
    )
    return axes.figure


def interpolations(
    model: Program,
    guide: Program,
    start: Tensor,
    end: Tensor,
    *covariates: Tensor,
    num: int = 10,
    path: Path = "linear",
    site: str | None = None,
    image_shape: ImageShape = None,
    plate: str | None = None,
    seed: int | None = 0,
    cmap: str = "gray_r",
    ax: Axes | None = None,
) -> Figure:
    r"""Draw :math:`E[x|z_t]` for points on a path between two codes, one pair of data in each row.

    See :func:`pyro_vae.interpolate` for the paths.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        start: images at t = 0, as in :func:`reconstructions`.
        end: images at t = 1.
        *covariates: further arguments of the programs, the same for both ends.
        num: number of images in a row, both ends included, at least 2.
        path: ``"linear"`` or ``"spherical"``.
        site: name of the latent site; by default, the only latent.
        image_shape: shape of one image, ``(H, W)`` or ``(C, H, W)``. By default, that of x.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        seed: of all samples.
        cmap: matplotlib's colormap of images with one channel. ``"gray"`` is for photographs.
        ax: axes to draw on. By default, those of a new figure.

    Returns:
        The figure of the axes.

    Raises:
        ImportError: The extra ``report`` is not installed.
        ValueError: The data are not images, or there are more than 1000 images. It also raises the
            errors of :func:`pyro_vae.interpolate`.
        TypeError: An argument has the wrong type.

    Example:
        >>> import torch, pyro_vae as pv
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
        >>> x = torch.rand(6, 16).round()
        >>> figure = pv.plots.interpolations(model, guide, x[:3], x[3:], num=5, image_shape=(4, 4))
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['0', '0.25', '0.5', '0.75', '1']
    """
    check_call(interpolations, locals())
    check_axes(ax)
    image_shape = check_image_shape(image_shape)
    num = positive_integer("num", num, minimum=2)
    start = as_tensor(start, "start", finite=False)
    as_images(start, image_shape, "start")
    check_count("start and num", num * len(start))
    found = interpolate(
        model,
        guide,
        start,
        end,
        *covariates,
        num=num,
        path=path,
        site=site,
        plate=plate,
        seed=seed,
    )
    images = as_images(found.flatten(0, 1), image_shape)
    images = np.moveaxis(images.reshape(num, -1, *images.shape[1:]), 0, 1)
    steps = torch.linspace(0, 1, num, dtype=torch.double)
    axes = draw_mosaic(ax, images, columns=_marks(steps), xlabel=f"t, {path} path", cmap=cmap)
    return axes.figure


def manifold(
    model: Program,
    *covariates: Tensor,
    guide: Program | None = None,
    x: Tensor | None = None,
    site: str | None = None,
    num: int = 15,
    image_shape: ImageShape = None,
    plate: str | None = None,
    seed: int | None = 0,
    cmap: str = "gray_r",
    ax: Axes | None = None,
) -> Figure:
    r"""Draw :math:`E[x|z]` on a grid of a latent with two dimensions.

    The points of each dimension are the quantiles of its prior at

    .. math::
        \frac{i - 1/2}{\text{num}}, \qquad i = 1, \ldots, \text{num}

    as in Kingma & Welling (2014, figure 4). If both dimensions are independent under the prior,
    each image stands for the same share of it. The axes show z.

    Args:
        model: program of p(x, z).
        *covariates: further arguments of the program, with one row each.
        guide: the guide that the model was fitted with. A model with ``pyro.param`` statements
            needs it.
        x: any data of the right shape; see :func:`pyro_vae.decode`.
        site: name of the latent site; by default, the only latent.
        num: number of points of each dimension, at least 2.
        image_shape: shape of one image, ``(H, W)`` or ``(C, H, W)``. By default, that of x.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        seed: of all samples.
        cmap: matplotlib's colormap of images with one channel. ``"gray"`` is for photographs.
        ax: axes to draw on. By default, those of a new figure.

    Returns:
        The figure of the axes.

    Raises:
        ImportError: The extra ``report`` is not installed.
        ValueError: The latent does not have two dimensions, is discrete, or its numbers cannot
            change alone, as on a simplex. Decoded points are not
            images, or are more than 1000. It also raises the errors of :func:`pyro_vae.decode`.
        TypeError: An argument has the wrong type.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
        ... )
        >>> figure = pv.plots.manifold(model, num=3, image_shape=(4, 4))
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['-0.97', '0', '0.97']
    """
    check_call(manifold, locals())
    check_axes(ax)
    num = positive_integer("num", num, minimum=2)
    image_shape = check_image_shape(image_shape)
    check_count("num", num**2)
    name_data_plate(plate, model, guide)
    partner = model if guide is None else guide
    columns = as_covariates(covariates, model, partner)
    if any(len(column) != 1 for column in columns):
        raise ValueError(f"each of covariates must have one row, got {[*map(len, columns)]}")
    prior = PriorOfSite(model, partner, _placeholder(model, partner, x, columns), site, seed)
    if (size := int(np.prod(prior.shape))) != 2:
        raise ValueError(
            f"manifold needs a latent with two dimensions, and site {prior.site!r} has {size}. Use "
            "pv.plots.traversals, or pass another site"
        )
    prior.require_free_numbers()
    across_name, up_name = names_of(prior.site, [0, 1], 2)
    levels = (torch.arange(num, dtype=torch.double) + 0.5) / num
    across, up = prior.quantiles(levels).T
    grid = torch.cartesian_prod(up.flip(0), across).flip(1)  # the top row first
    with remedy_outside_support(NOT_FREE):
        found = decode(
            model,
            {prior.site: grid.to(prior.dtype).reshape(-1, *prior.shape)},
            *(_repeated(column, len(grid)) for column in columns),
            x=None if x is None else as_tensor(x, "x", finite=False)[:1],
            guide=guide,
            plate=plate,
            seed=seed,
        )
    images = as_images(found, image_shape)
    axes = draw_mosaic(
        ax,
        images.reshape(num, num, *images.shape[1:]),
        rows=_sparse(_marks(up.flip(0))),
        columns=_sparse(_marks(across)),
        xlabel=across_name,
        ylabel=up_name,
        cmap=cmap,
    )
    return axes.figure


def _placeholder(
    model: Program, guide: Program, x: Tensor | None, covariates: list[Tensor]
) -> list[Tensor]:
    """Return two rows of x and covariates, on the device of the pair."""
    device = device_of(model, guide)
    columns = [_repeated(column, 2).to(device) for column in covariates]
    if x is not None:
        return [_repeated(as_tensor(x, "x", finite=False)[:1], 2).to(device), *columns]
    with parameter_store(model, guide), evaluation_mode(model):
        return [spec_of_x(model, columns, device, NEEDS_X).full(2, device), *columns]


def _repeated(column: Tensor, times: int) -> Tensor:
    return column.expand(times, *column.shape[1:])


def _marks(values: Tensor) -> list[str]:
    return [f"{round(value, 2) + 0.0:g}" for value in values.tolist()]


def _sparse(marks: list[str], most: int = 7) -> list[str]:
    """Return at most seven of the labels, evenly spaced, and empty texts for the others."""
    step = -(-len(marks) // most)
    first = (len(marks) - 1) % step // 2
    return [mark if (i - first) % step == 0 else "" for i, mark in enumerate(marks)]
