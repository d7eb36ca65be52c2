"""Convert a fitted pair to an ArviZ object, for the plots and diagnostics of ArviZ."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch

from pyro_vae._programs.data_plate import name_data_plate
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import device_of
from pyro_vae._programs.terms import terms
from pyro_vae._utils.checks import check_call, positive_integer
from pyro_vae._utils.extras import require
from pyro_vae.datasets._minibatches import Data, Minibatches
from pyro_vae.evaluation._context import evaluation_context
from pyro_vae.evaluation._encode import without


def to_arviz(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_draws: int = 500,
    vectorize_particles: bool | None = None,
    plate: str | None = None,
    seed: int | None = None,
) -> Any:
    """Sample from a pair, and return the samples in an ArviZ container.

    The container has these groups:

    - ``posterior``: the latents, sampled from the guide;
    - ``sample_stats``: ``log_weight``, the log-weight log p(x, z) - log q(z|x) of those samples;
    - ``posterior_predictive``: the observed sites, sampled given the latents;
    - ``observed_data``: x.

    The first dimensions are ``chain`` (of size 1), ``draw`` and ``data_point``. In
    ``observed_data``, the first dimension is ``data_point``. A latent number that the model masks
    has no posterior and is NaN, or -1 if it is an integer. So is a number of ``observed_data`` that
    the model masks, such as the padding of sequences or an unknown label.

    There is no ``log_likelihood`` group. Leave-one-out cross-validation on log p(x|z) would score
    a data point under a z that was inferred from it. Compare models with :func:`pyro_vae.compare`.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        data: the data, as in :func:`pyro_vae.fit`. All samples are held in memory.
        num_draws: samples per data point.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        seed: of the samples.

    Returns:
        ``arviz.InferenceData`` (ArviZ 0.x) or ``xarray.DataTree`` (ArviZ 1.x).

    Raises:
        ValueError: Data or an argument are invalid, or the pair breaks a rule (docs/contract.md). A
            site is global or scaled.
        ImportError: The extra ``arviz`` is not installed.

    Example:
        >>> import torch, pyro_vae as pv
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
        >>> container = pv.to_arviz(model, guide, torch.ones(3, 16), num_draws=7)
        >>> container["posterior"]["z"].shape  # chain, draw, data point, event
        (1, 7, 3, 2)
    """
    check_call(to_arviz, locals())
    name_data_plate(plate, model, guide)
    num_draws = positive_integer("num_draws", num_draws)
    arviz = require("arviz", "arviz", "to_arviz")
    programs = (model, guide)
    batches = Minibatches(data, 2**31, device=device_of(*programs), programs=programs)
    with evaluation_context(
        "to_arviz", model, guide, batches, vectorize_particles=vectorize_particles, seed=seed
    ) as particle_options:
        rows = tuple(column[:] for column in batches.in_memory())  # sparse rows become dense
        t = terms(model, guide, *rows, num_particles=num_draws, **particle_options)
        predictive, masked = t.predict(), t.masked_numbers()
        left_out = t.masked_observations()
    return make_container(
        arviz,
        posterior={
            name: _chain(without(value, masked[name]) if name in masked else value)
            for name, value in t.samples.items()
        },
        sample_stats={"log_weight": _chain(t.log_weight)},
        posterior_predictive={name: _chain(value) for name, value in predictive.items()},
        observed_data={
            name: without(value, left_out[name]).cpu().numpy()
            for name, value in t.observations.items()
        },
    )


def make_container(arviz: ModuleType, **groups: dict[str, np.ndarray]) -> Any:
    """Return the container of the installed ArviZ version, with groups of arrays."""
    dims = {
        name: ["data_point", *(f"{name}_dim_{i}" for i in range(value.ndim - leading))]
        for group, values in groups.items()
        for leading in (1 if group == "observed_data" else 3,)
        for name, value in values.items()
    }
    if int(arviz.__version__.split(".")[0]) < 1:
        return arviz.from_dict(**groups, dims=dims)
    return arviz.from_dict(groups, dims=dims)


def _chain(draws: torch.Tensor) -> np.ndarray:
    return draws.unsqueeze(0).cpu().numpy()
