"""What a fitted pair shows: reconstructions of data, and data of its own."""

from __future__ import annotations

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae import programs
from pyro_vae.contract import check_pair
from pyro_vae.minibatches import as_tensor
from pyro_vae.seeding import seeded
from pyro_vae.sites import Site, Unobserve, data_frame, random_sites
from pyro_vae.traces import Program


def reconstruct(
    model: Program, guide: Program, x: Tensor, *covariates: Tensor, seed: int | None = None
) -> Tensor:
    r"""Return :math:`E[x'|z]` for one :math:`z \sim q(z|x)`, the mean of the likelihood.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        x: data ``(B, *event)``.
        *covariates: further arguments of the programs.
        seed: fixes the draws of z.

    Returns:
        Shape ``(B, *event)``, on the CPU.

    Raises:
        ValueError: the pair breaks the contract; no observed site has the shape of x.
    """
    x, *covariates = _columns(model, guide, x, *covariates)
    with (
        seeded(seed),
        programs.parameter_store(model, guide),
        programs.evaluation_mode(model, guide),
    ):
        check_pair(model, guide, (x, *covariates))
        guide_trace = poutine.trace(guide).get_trace(x, *covariates)
        return mean_of_x(poutine.replay(model, trace=guide_trace), x, *covariates)


def generate(
    model: Program,
    x: Tensor,
    *covariates: Tensor,
    guide: Program | None = None,
    seed: int | None = None,
) -> Tensor:
    r"""Return :math:`E[x'|z]` for one :math:`z \sim p(z)` for each row of x.

    Args:
        model: program of p(x, z).
        x: any data of the right shape ``(B, *event)``: it says how many rows to generate, no more.
        *covariates: further arguments of the program.
        guide: program that the model was fitted with; needed for a model whose ``pyro.param``
            values live in the store of the pair.
        seed: fixes the draws of z.

    Returns:
        Shape ``(B, *event)``, on the CPU.

    Raises:
        ValueError: no observed site of the model has the shape of x.
    """
    guide = model if guide is None else guide
    x, *covariates = _columns(model, guide, x, *covariates)
    with (
        seeded(seed),
        programs.parameter_store(model, guide),
        programs.evaluation_mode(model),
    ):
        return mean_of_x(model, x, *covariates)


def _columns(model: Program, guide: Program, x: Tensor, *covariates: Tensor) -> list[Tensor]:
    device = programs.device_of(model, guide)
    columns = [as_tensor(x, "x"), *(as_tensor(each, "a covariate") for each in covariates)]
    return [column.to(device) for column in columns]


def mean_of_x(model: Program, x: Tensor, *covariates: Tensor) -> Tensor:
    """Run a model without its observations; return the mean of what observed x, on the CPU.

    Raises:
        ValueError: no observed site has the shape of x.
    """
    trace = poutine.trace(Unobserve()(model)).get_trace(x, *covariates)
    observed = [
        site
        for site in random_sites(trace)
        if site["infer"].get("was_observed") and data_frame(site) is not None
    ]
    if x.dim() > 1:  # a site for each step of a sequence
        step = x.shape[:1] + x.shape[2:]
        if len(observed) == x.shape[1] and all(site["value"].shape == step for site in observed):
            return torch.stack([_mean(site).expand(step) for site in observed], 1).cpu()
    return _mean(_observed_site(observed, x)).expand(x.shape).cpu()


def _observed_site(observed: list[Site], x: Tensor) -> Site:
    """Return the site, of those of an unconditioned model, that observed x or has its shape."""
    alike = [site for site in observed if site["value"].shape[-x.dim() :] == x.shape]
    for site in alike:
        value = site["infer"].get("obs")
        if isinstance(value, Tensor) and value.shape == x.shape and torch.equal(value, x):
            return site
    if alike:
        return alike[0]
    shapes = {site["name"]: tuple(site["value"].shape) for site in observed}
    raise ValueError(
        f"no observed site of the model has the shape of x, {tuple(x.shape)}: they are {shapes}"
    )


def _mean(site: Site) -> Tensor:
    """Return the mean of a site's distribution; a sample where it has none."""
    try:
        mean = site["fn"].mean
    except NotImplementedError:
        return site["value"]
    return site["value"] if mean.isnan().any() else mean
