"""Decode latents: means or samples of x given z."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from pyro_vae._programs.argument_shapes import spec_of_x
from pyro_vae._programs.data_plate import name_data_plate
from pyro_vae._programs.enumeration import is_enumerated
from pyro_vae._programs.evaluation import evaluation_mode
from pyro_vae._programs.pair_trace import PairTrace, Program
from pyro_vae._programs.parameters import device_of, parameter_store
from pyro_vae._programs.predictions import drawn_sites, means, warn_of_factors
from pyro_vae._programs.runs import trace_of
from pyro_vae._programs.scales import unscaled
from pyro_vae._programs.sites import (
    Site,
    data_frame,
    from_data_layout,
    random_sites,
    to_particle_layout,
)
from pyro_vae._programs.validation import PROGRAM_ERRORS
from pyro_vae._utils.checks import check_call, positive_integer, shown
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.random import seeded
from pyro_vae._utils.user_warnings import warns_once
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._columns import as_tensor
from pyro_vae.datasets._minibatches import Batch
from pyro_vae.evaluation._delta_sites import guide_to
from pyro_vae.evaluation._generate import Numbers, covariate_columns, in_batches
from pyro_vae.evaluation._given_latents import AtGivenLatents
from pyro_vae.evaluation._global_latents import at_global_latents
from pyro_vae.evaluation._layout import Readings
from pyro_vae.evaluation._predict import gathered, mean_of_x

NEEDS_X = (
    "Pass one row of the shape that the model expects: x=torch.zeros(1, ...), such as "
    "torch.zeros(1, T, D) for sequences of T steps. Its values do not matter."
)


@warns_once
def decode(
    model: Program,
    z: Tensor | Mapping[str, Tensor],
    *covariates: Tensor,
    x: Tensor | None = None,
    guide: Program | None = None,
    num_samples: int = 0,
    batch_size: int = 100,
    plate: str | None = None,
    seed: int | None = None,
    by_site: bool = False,
    progress: bool | Progress = False,
) -> Tensor | dict[str, Tensor]:
    r"""Return :math:`E[x|z]` for given latents, or samples of x.

    The result has the layout of x, as in :func:`reconstruct`. Latents that are not given are
    sampled from p in the order of the model, each given the latents before it. So they do not
    depend on given latents after them. Latents c that the model sums out are averaged over
    :math:`p(c|z)`. A global latent, such as a Bayesian weight, has one sample for all rows of z,
    from the guide if it is given. If a distribution has no mean, a sample of it is returned.

    Args:
        model: program of p(x, z).
        z: values ``(N, *inner plates, *event)`` of the only latent, such as the mean or the samples
            of :func:`encode`. For several latents, a dictionary of such tensors by site.
        *covariates: further arguments of the program, with N rows each.
        x: any data of the right shape, N rows or one row for all. It is needed if the shape is
            unknown, or if the model uses the values of x other than to observe them. By default,
            the shape is that of the data that the model was last fitted or evaluated on.
        guide: the guide that the model was fitted with. A model with ``pyro.param`` statements
            needs it, because their values are in the store of the pair. A model with global latents
            needs it, unless they should follow their prior. The guide then runs on x, or on zeros
            without it. So pass x if these latents depend on it in the guide.
        num_samples: S, the number of samples of x for each z; with 0, the mean is returned.
        batch_size: data points at a time.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        seed: of all samples. The random state of the process is restored afterwards.
        by_site: return the numbers at each observed site of the plate ``"data"``, by name.
        progress: show a progress bar, or add one to a rich Progress.

    Returns:
        Shape ``(N, *event)``, or ``(S, N, *event)`` with ``num_samples``. By site, each of shape
        ``(N, *inner plates, *event)`` or ``(S, N, *inner plates, *event)``. On the CPU.

    Raises:
        ValueError: A latent is unknown, has another shape than its site, or is not given and not
            the only one. A value is outside of the support of its site, NaN or infinite, and not
            masked there. The model cannot run on these values. The shape of x is unknown, or the
            model uses its values, and ``x`` is None. Without ``by_site``: the errors of
            :func:`reconstruct`.
        TypeError: An argument has the wrong type.

    Example:
        >>> import torch, pyro_vae as pv
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
        ... )
        >>> z = torch.randn(5, 2)
        >>> means = pv.decode(model, z)
        >>> torch.allclose(means, model.likelihood(z).mean)
        True
        >>> pv.decode(model, z, num_samples=3, seed=0).shape
        torch.Size([3, 5, 16])
    """
    check_call(decode, locals())
    name_data_plate(plate, model, guide)
    partner = model if guide is None else guide
    num_samples = positive_integer("num_samples", num_samples, minimum=0)
    batch_size = positive_integer("batch_size", batch_size)
    device = device_of(model, partner)
    given = _given(z, device)
    count = len(next(iter(given.values())))
    columns = covariate_columns(model, partner, covariates, count)
    data = None if x is None else _one_for_each(as_tensor(x, "x", finite=False), count).to(device)

    def batch_of(rows: Tensor) -> Batch:
        x_of_rows = spec.full(len(rows), device) if data is None else data[rows].contiguous()
        return x_of_rows, *(column[rows] for column in columns)

    def run(rows: Tensor) -> Numbers:
        program = shared[int(rows[0]) // count] if shared else model
        rows = rows % count
        some = {name: values[rows] for name, values in given.items()}
        values = _placed(latents, some)
        summed = any(is_enumerated(site) and name not in values for name, site in latents.items())
        fixed = AtGivenLatents(values, latents, rows)(program)
        options = {"by_site": by_site, "draw": num_samples > 0}
        try:
            if summed:
                return _reconstructed(model, fixed, batch_of(rows), values, **options)
            return mean_of_x(fixed, *batch_of(rows), **options)
        except PROGRAM_ERRORS as error:
            shapes = {n or "z": (tuple(v.shape), str(v.dtype)) for n, v in some.items()}
            raise ValueError(
                f"the model cannot run on z of these shapes and dtypes, {shapes}: "
                f"{type(error).__name__}: {first_line(error)}. Pass latents as the model samples "
                "them"
            ) from error

    with (
        seeded(seed),
        parameter_store(model, partner),
        evaluation_mode(model, partner),
        values_checked(False),  # x is a placeholder, which may be outside of the support
    ):
        if data is None:
            spec = spec_of_x(model, [c[:2] for c in columns], device, NEEDS_X)
        few = batch_of(torch.arange(min(count, 2)))
        latents = _latents(model, few)
        times, shared = max(1, num_samples), []
        batches = torch.arange(count * times).split(batch_size)
        if any(data_frame(site) is None for site in latents.values()):  # global latents
            shared = [at_global_latents(model, guide, few) for _ in range(times)]
            of_one_sample = torch.arange(count * times).split(count)
            batches = [rows for each in of_one_sample for rows in each.split(batch_size)]
        found = in_batches(run, batches, progress, "decode")
    if not num_samples:
        return found
    if isinstance(found, dict):
        return {name: values.unflatten(0, (num_samples, count)) for name, values in found.items()}
    return found.unflatten(0, (num_samples, count))


def _one_for_each(x: Tensor, count: int) -> Tensor:
    """Return one row of data for each row of z.

    Raises:
        ValueError: The data have neither as many rows as z, nor one.
    """
    if len(x) not in (1, count):
        raise ValueError(f"x must have one row, or {count} as z, got shape {tuple(x.shape)}")
    return x.expand(count, *x.shape[1:])


def _given(z: Any, device: torch.device) -> dict[str, Tensor]:
    """Return values by site; the only latent has the name "".

    Raises:
        ValueError: There are no values, or they are not dense tensors of one length.
    """
    if not isinstance(z, Tensor | np.ndarray | Mapping):
        raise TypeError(
            f"z must be a tensor of latents, or a dictionary of tensors by site, got {shown(z)}"
        )
    columns = dict(z) if isinstance(z, Mapping) else {"": z}
    named = {name: f"z[{name!r}]" if isinstance(z, Mapping) else "z" for name in columns}
    given = {n: as_tensor(values, named[n], finite=False) for n, values in columns.items()}
    if len({len(values) for values in given.values()}) != 1:
        raise ValueError(
            "z must hold at least one latent, and all of one length, got the lengths "
            f"{ {name: len(values) for name, values in given.items()} }"
        )
    return {name: values.to(device) for name, values in given.items()}


def _reconstructed(
    model: Program,
    fixed: Program,
    batch: Batch,
    given: Mapping[str, Tensor],
    *,
    by_site: bool,
    draw: bool,
) -> Numbers:
    """Return means or samples of x, averaged over or sampled from p(c|z) for the other latents c.

    The latents become points of a guide. So the rest is a reconstruction.

    Args:
        model: program of p(x, z).
        fixed: the same program with given latents.
        batch: x and covariates.
        given: the given latents by name.
        by_site: see :func:`decode`.
        draw: whether to return samples of x.
    """
    sites = [
        site
        for site in random_sites(trace_of(fixed, *batch))
        if site["name"] in given or not is_enumerated(site)
    ]
    warn_of_factors(sites)
    latents = {site["name"]: site for site in sites if not site["is_observed"]}
    run = PairTrace(unscaled(model), guide_to(latents), batch)
    with Readings(batch[0]) as readings:
        found = [(s, s["value"]) for s in drawn_sites(run)] if draw else [*means(run)]
    return gathered(batch[0], found, readings, by_site)


def _latents(model: Program, batch: Batch) -> dict[str, Site]:
    """Return the latent sites of a run of the model, by name."""
    sites = random_sites(trace_of(model, *batch))
    return {site["name"]: site for site in sites if not site["is_observed"]}


def _placed(latents: Mapping[str, Site], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return given values in the layout of their sites.

    Raises:
        ValueError: A value belongs to no latent of the plate ``"data"``, or has another shape. Or a
            tensor without a name is given, and there is not exactly one latent to sample.
    """
    local = {name: site for name, site in latents.items() if data_frame(site) is not None}
    if "" in given:
        names = [name for name, site in local.items() if not is_enumerated(site)] or list(local)
        if len(names) != 1:
            raise ValueError(
                f"z must be a dictionary of tensors by site, because the latents of the model are "
                f"{names}, got one tensor"
            )
        given = {names[0]: given[""]}
    placed = {}
    for name, values in given.items():
        if name not in local:
            raise ValueError(
                f"z must hold latents of the model by name, which are {list(local)}, got {name!r}"
            )
        wanted = to_particle_layout(local[name]["value"], local[name], None)[0].shape[1:]
        if values.shape[1:] != wanted:
            sizes = ", ".join(["N", *map(str, wanted)])
            raise ValueError(
                f"z of latent site {name!r} must be of shape ({sizes}), got {tuple(values.shape)}"
            )
        placed[name] = from_data_layout(values, local[name])
    return placed
