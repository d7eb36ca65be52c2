"""Reconstructions of data, and the runs of a model without observations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyro_vae._programs.data_plate import name_data_plate
from pyro_vae._programs.enumeration import sampled_guides
from pyro_vae._programs.evaluation import evaluation_mode
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import device_of, parameter_store
from pyro_vae._programs.predictions import (
    drawn_observations,
    mean_or_draw,
    means,
    warn_of_factors,
)
from pyro_vae._programs.runs import trace_of
from pyro_vae._programs.sites import Site, Unobserve, random_sites, to_particle_layout
from pyro_vae._programs.validation import check_pair, checked_run
from pyro_vae._utils.checks import check_call
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.random import seeded
from pyro_vae.datasets._columns import as_tensor
from pyro_vae.datasets._unused_columns import columns_taken
from pyro_vae.evaluation._layout import Layout, Readings


def reconstruct(
    model: Program,
    guide: Program,
    x: Tensor,
    *covariates: Tensor,
    plate: str | None = None,
    seed: int | None = None,
    by_site: bool = False,
) -> Tensor | dict[str, Tensor]:
    r"""Return :math:`E[x'|z]` for one :math:`z \sim q(z|x)`, the mean of the likelihood.

    The result has the layout of x. The model may observe x in another order and at several sites:
    transposed, column by column, step by step. The result has the units of the observation, such
    as those of ``x / 255`` if the model observes that. Latents c that the model sums out are
    averaged over :math:`p(c|z)`. If a distribution has no mean, a sample of it is returned. Angles
    have a mean direction, and a sample if latents are summed out.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        x: data ``(B, *event)``.
        *covariates: further arguments of the programs.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        seed: of the samples of z.
        by_site: return the mean at each observed site of the plate ``"data"``, by name.

    Returns:
        Shape ``(B, *event)``; by site, each ``(B, *inner plates, *event)``. On the CPU.

    Raises:
        ValueError: The pair breaks a rule (docs/contract.md). A sample of z has a density of zero,
            and x has no distribution there. Without ``by_site``: the model does not observe all of
            x, observes a number of x twice, or observes sums of numbers of x.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("second", dist.Normal(z + 5.0, 1.0), obs=x[:, 1])
        ...         pyro.sample("first", dist.Normal(z, 1.0), obs=x[:, 0])
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x[:, 0], 0.1))
        >>> means = pv.reconstruct(model, guide, torch.randn(3, 2), seed=0)
        >>> (means[:, 1] - means[:, 0]).tolist()
        [5.0, 5.0, 5.0]
        >>> sorted(pv.reconstruct(model, guide, torch.randn(3, 2), by_site=True))
        ['first', 'second']
    """
    check_call(reconstruct, locals())
    name_data_plate(plate, model, guide)
    x, *covariates = columns_of(model, guide, x, *covariates)
    with (
        seeded(seed),
        parameter_store(model, guide),
        evaluation_mode(model, guide),
    ):
        check_pair(model, guide, (x, *covariates), weighs=True, name="x")
        with sampled_guides():
            run = checked_run(model, guide, (x, *covariates), weighs=True)
        with Readings(x) as readings:
            try:
                found = [*means(run)]
            except (RuntimeError, ValueError) as error:
                excluded = run.excluded
                if excluded is None or not excluded.any():
                    raise
                raise ValueError(
                    "the model gives a sample of the guide a density of zero, first in row "
                    f"{int(excluded[0].nonzero()[0])}, and x has no distribution there: "
                    f"{first_line(error)}. Use a guide on the support of the latents"
                ) from error
    return gathered(x, found, readings, by_site)


def columns_of(model: Program, guide: Program, x: Tensor, *covariates: Tensor) -> list[Tensor]:
    """Return x and covariates as tensors on the device of the pair."""
    device = device_of(model, guide)
    columns = [as_tensor(x, "x", finite=False), *as_covariates(covariates, model, guide)]
    return [column.to(device).contiguous() for column in columns]


def as_covariates(covariates: Sequence[Tensor], *programs: Program) -> list[Tensor]:
    """Return covariates as tensors, without those that the programs do not take, such as labels.

    Args:
        covariates: the arguments after x.
        *programs: programs that are called with x and the covariates.
    """
    columns = [as_tensor(each, "each of covariates", finite=False) for each in covariates]
    return [*columns_taken(programs, [None, *columns])[1:]]


def mean_of_x(
    model: Program, x: Tensor, *covariates: Tensor, by_site: bool = False, draw: bool = False
) -> Tensor | dict[str, Tensor]:
    """Run a model without its observations, and return the mean of x, on the CPU.

    Args:
        model: program of p(x, z). Its latents are sampled.
        x: data ``(B, *event)``.
        *covariates: further arguments of the program.
        by_site: see :func:`reconstruct`.
        draw: return a sample of x instead of the mean.

    Raises:
        ValueError: See :func:`reconstruct`.
    """
    x = x.contiguous()
    with Readings(x) as readings:
        trace = trace_of(Unobserve()(model), x, *covariates)
        warn_of_factors(random_sites(trace))
        sites = drawn_observations(trace)
        found = [(site, site["value"] if draw else mean_or_draw(site)) for site in sites]
    return gathered(x, found, readings, by_site)


def gathered(
    x: Tensor, found: list[tuple[Site, Tensor]], readings: Readings, by_site: bool
) -> Tensor | dict[str, Tensor]:
    """Return the numbers of sites by name, or in the layout of x.

    Args:
        x: the data that the model observed.
        found: each observed site, with one number for each observed number.
        readings: the mode in which the model ran.
        by_site: whether to return the numbers by site.

    Raises:
        ValueError: See :func:`reconstruct`.
    """
    if by_site:
        return {site["name"]: to_particle_layout(mean, site, None)[0].cpu() for site, mean in found}
    layout = Layout(x)
    for site, mean in found:
        observed = site["infer"]["obs"]
        computed = readings.are_computed(observed)
        layout.add(site, mean, readings.places(observed), computed=computed)
    return layout.numbers()
