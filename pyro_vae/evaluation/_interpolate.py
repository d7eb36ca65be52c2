"""Decode points on a path between the codes of two data points."""

from __future__ import annotations

from typing import Literal

import torch
from rich.progress import Progress
from torch import Tensor

from pyro_vae._programs.pair_trace import Program
from pyro_vae._utils.checks import check_call, positive_integer, require_word
from pyro_vae.datasets._columns import as_tensor
from pyro_vae.evaluation._decode import decode
from pyro_vae.evaluation._encode import encode
from pyro_vae.evaluation._given_latents import remedy_outside_support
from pyro_vae.evaluation._predict import as_covariates

Path = Literal["linear", "spherical"]
_NO_MEANS = (
    "Pass another latent as site, or decode your own path by pv.decode. It may start at a sample "
    "of pv.encode, because the support has no mean of two samples."
)


def interpolate(
    model: Program,
    guide: Program,
    start: Tensor,
    end: Tensor,
    *covariates: Tensor,
    num: int = 10,
    path: Path = "linear",
    site: str | None = None,
    batch_size: int = 100,
    plate: str | None = None,
    seed: int | None = None,
    progress: bool | Progress = False,
) -> Tensor:
    r"""Decode points on a path between the codes of pairs of data points.

    The codes a and b are the means of q(z|x), see :func:`encode`. The points on the path are

    .. math::
        z_t &= (1 - t) a + t b && \text{linear} \\
        z_t &= \frac{\sin((1 - t) \omega)}{\sin \omega} a + \frac{\sin(t \omega)}{\sin \omega} b
            && \text{spherical (Shoemake 1985, section 3.3)}

    for t from 0 to 1, with the angle :math:`\omega` between a and b. The norm of a sample of a
    standard normal prior is close to :math:`\sqrt D`. A linear path has smaller norms in its
    middle, and a spherical path does not (White 2016). If a and b have one direction, opposite
    directions or a norm of zero, the linear path is used.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        start: data ``(B, *event)`` at t = 0. A model that uses the values of x other than to
            observe them gets these data at all t.
        end: data ``(B, *event)`` at t = 1.
        *covariates: further arguments of the programs, the same for both ends.
        num: number of points on the path, both ends included, at least 2.
        path: ``"linear"`` or ``"spherical"``.
        site: name of the latent site; by default, the only latent. Other latents are sampled from
            p, and global latents from the guide, as in :func:`decode`.
        batch_size: data points at a time.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        seed: of all samples.
        progress: show progress bars, or add them to a rich Progress.

    Returns:
        :math:`E[x|z_t]`, of shape ``(num, B, *event)``, on the CPU.

    Raises:
        ValueError: An argument is invalid, or the shapes of the two ends differ. The latent is
            discrete, so that there are no points between two codes. The path leaves the support of
            the latent, as a spherical path between vectors on a simplex does. It also raises the
            errors of :func:`encode` and :func:`decode`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
        >>> x = torch.rand(6, 16).round()
        >>> pv.interpolate(model, guide, x[:3], x[3:], num=7).shape
        torch.Size([7, 3, 16])
    """
    check_call(interpolate, locals())
    num = positive_integer("num", num, minimum=2)
    require_word("path", path, ("linear", "spherical"))
    ends = [as_tensor(start, "start", finite=False), as_tensor(end, "end", finite=False)]
    if ends[0].shape != ends[1].shape:
        raise ValueError(
            f"start and end must have one shape, got {tuple(ends[0].shape)} and "
            f"{tuple(ends[1].shape)}"
        )
    options = {"batch_size": batch_size, "plate": plate, "seed": seed, "progress": progress}
    columns = as_covariates(covariates, model, guide)
    codes = encode(
        model, guide, torch.cat(ends), *(_repeated(c, 2) for c in columns), site=site, **options
    )
    if codes.discrete:
        raise ValueError(
            f"latent site {codes.site!r} is discrete, so there are no points between two codes. "
            "Pass another latent as site"
        )
    a, b = codes.mean.chunk(2)
    if not torch.equal(*codes.masked.chunk(2)):
        raise ValueError(
            f"latent site {codes.site!r} is masked at start or at end alone, so there is no path. "
            "Pass data points with the same masks, such as sequences of one length"
        )
    steps = torch.linspace(0, 1, num, dtype=a.dtype).reshape(num, *[1] * a.dim())
    points = spherical(a, b, steps) if path == "spherical" else a + steps * (b - a)
    remedy = 'Pass path="linear".' if path == "spherical" else _NO_MEANS
    with remedy_outside_support(f"The {path} path leaves the support. {remedy}"):
        found = decode(
            model,
            {codes.site: points.flatten(0, 1)},
            *(_repeated(column, num) for column in columns),
            x=_repeated(ends[0], num),
            guide=guide,
            **options,
        )
    return found.unflatten(0, (num, len(a)))


def _repeated(column: Tensor, times: int) -> Tensor:
    return column.repeat(times, *[1] * (column.dim() - 1))


def spherical(a: Tensor, b: Tensor, steps: Tensor) -> Tensor:
    """Interpolate spherically between vectors, linearly where the angle has no unique arc.

    Args:
        a: vectors ``(B, *event)`` at step 0.
        b: vectors ``(B, *event)`` at step 1.
        steps: steps in [0, 1], of a shape that broadcasts to ``(num, B, *event)``.
    """
    rows = [each.double().reshape(len(each), -1) for each in (a, b)]
    cosine = torch.cosine_similarity(*rows, dim=-1).clamp(-1, 1)
    angle = cosine.acos().reshape(-1, *[1] * (a.dim() - 1))
    norms = rows[0].norm(dim=-1) * rows[1].norm(dim=-1)
    on_a_line = (angle.sin() < 1e-4) | (norms.reshape_as(angle) == 0)
    safe = torch.where(on_a_line, 1.0, angle)
    arc = ((1 - steps) * safe).sin() / safe.sin() * a + (steps * safe).sin() / safe.sin() * b
    return torch.where(on_a_line, a + steps * (b - a), arc).to(a.dtype)
