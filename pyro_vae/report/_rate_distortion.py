r"""The rate-distortion curve of a pair, by fitting it anew for each weight of the rate."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import pyro
import torch
from rich.progress import Progress
from torch import Tensor

from pyro_vae._programs import fits
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import (
    bind,
    device_of,
    evaluation_mode,
    parameter_store,
    parameters_of,
)
from pyro_vae._programs.terms import Terms, terms
from pyro_vae._programs.validation import check_pair
from pyro_vae._utils.checks import check_call, positive_integer, positive_number
from pyro_vae._utils.modules import modules
from pyro_vae._utils.progress import task
from pyro_vae._utils.random import seeded
from pyro_vae.datasets._minibatches import Data, Minibatches
from pyro_vae.evaluation import Evidence
from pyro_vae.evaluation._context import evaluation_context
from pyro_vae.evaluation._log_evidence import standard_error
from pyro_vae.objectives import BetaELBO
from pyro_vae.report._curve import RateDistortion
from pyro_vae.training import fit

_OWN_OPTIONS = ("objective", "description", "progress", "seed")


def rate_distortion(
    model: Program,
    guide: Program,
    data: Data,
    betas: Sequence[float],
    *,
    refit: Literal["guide", "both"] = "guide",
    test: Data | None = None,
    evidence: Evidence | None = None,
    num_particles: int = 10,
    training_particles: int = 1,
    vectorize_particles: bool = True,
    seed: int | None = None,
    progress: bool | Progress = False,
    description: str = "rate-distortion",
    **fit_options: Any,
) -> RateDistortion:
    r"""Trace the rate-distortion curve of a pair (Alemi et al. 2018).

    For each weight the pair is fitted to

    .. math::
        \max \; -D - \beta R, \qquad D = -\mathbb{E}\,\mathbb{E}_{q(z|x)} \log p(x|z), \quad
        R = \mathbb{E}\,\mathrm{KL}(q(z|x) \| p(z))

    and its rate and distortion are measured. R + D is minus the ELBO, and never below minus
    the average :math:`\log p(x)`. With ``refit="guide"`` the model stays as it is: the guide
    then approximates :math:`q_\beta(z|x) \propto p(z) \, p(x|z)^{1/\beta}`, an annealed
    likelihood, and the curve is convex, of slope :math:`dD/dR = -\beta`. With ``refit="both"``
    the model moves too, and the curve is that of the whole family.

    The smallest beta begins with the pair as it is, each of the others where the one before it
    ended. In the end, and after an error or an interruption, the pair's parameters and buffers
    have the values that they had.

    Args:
        model: program of p(x, z), fitted.
        guide: program of q(z|x), fitted.
        data: to fit to; what :func:`pyro_vae.fit` takes.
        betas: positive numbers.
        refit: what to fit for each: the ``"guide"`` alone, or ``"both"``.
        test: data to measure on; ``data`` if not given.
        evidence: log p(x) of the data measured on, by :func:`pyro_vae.evidence`; with
            ``refit="guide"`` it gives the bound of the curve.
        num_particles: draws for each datum when it is measured.
        training_particles: and when it is fitted.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.
        seed: fixes all draws.
        progress: show bars; or a rich Progress to add them to.
        description: text before the bars.
        **fit_options: of :func:`pyro_vae.fit`: ``epochs``, ``learning_rate``, ``batch_size`` and
            the like.

    Returns:
        The :class:`RateDistortion`.

    Raises:
        ValueError: bad data or arguments, or a pair that breaks the contract; a site is global or
            scaled; the guide alone is to be fitted, and the model has parameters of it; the
            evidence is of other data than are measured on.
        TypeError: an option that is none of a fit's, or one that the curve sets itself; ``betas``
            is no sequence, ``evidence`` no :class:`pyro_vae.evaluation.Evidence`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> data = pv.datasets.load("digits")
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [32], 64)),
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(64, [32]))
        >>> fit = pv.fit(model, guide, data.train, epochs=5, seed=0, progress=False)
        >>> curve = pv.rate_distortion(model, guide, data.train, [0.2, 1, 5], epochs=3, seed=0)
        >>> curve.table["rate"].is_monotonic_decreasing
        True
    """
    check_call(rate_distortion, locals())
    import pandas as pd

    betas = _check_betas(betas)
    num_particles = positive_integer("num_particles", num_particles)
    training_particles = positive_integer("training_particles", training_particles)
    if refit not in ("guide", "both"):
        raise ValueError(f"refit must be 'guide' or 'both', got {refit!r}")
    if own := [name for name in fit_options if name in _OWN_OPTIONS]:
        raise TypeError(f"rate_distortion sets the fit's {own[0]!r} itself: leave it out")
    if evidence is not None and refit == "both":
        raise ValueError(
            "evidence is that of one model, and refit='both' fits one for each beta: leave it out"
        )
    batch_size = fit_options.get("batch_size", 100)
    device = device_of(model, guide)
    first = Minibatches(data, batch_size, device=device).first()
    measured = data if test is None else test
    name = "data" if test is None else "test"
    _check_evidence(evidence, Minibatches(measured, batch_size, device=device, name=name))
    rows = []
    with (
        seeded(seed),
        parameter_store(model, guide, fresh=True) as store,
        task(progress, description, len(betas), transient=True) as advance,
    ):
        with evaluation_mode(model, guide):
            trace = check_pair(model, guide, first)
            bind(model, guide, store, trace)
            parameters = parameters_of(model, guide, trace)
        held = _held(parameters) if refit == "guide" else []
        seeds = torch.randint(2**62, (2,)).tolist()  # the same noise for every beta
        with _as_before(model, guide), _frozen(held):
            for beta in betas:
                fit(
                    model,
                    guide,
                    data,
                    objective=BetaELBO(
                        beta, training_particles, vectorize_particles=vectorize_particles
                    ),
                    seed=seeds[0],
                    progress=progress,
                    description=f"{description}: beta {beta:g}",
                    **fit_options,
                )
                batches = Minibatches(measured, batch_size, device=device, name=name)
                with evaluation_context(
                    "rate_distortion",
                    model,
                    guide,
                    batches,
                    vectorize_particles=vectorize_particles,
                    seed=seeds[1],
                ) as plate_nesting:
                    how = {
                        "num_particles": num_particles,
                        "vectorize_particles": vectorize_particles,
                        "plate_nesting": plate_nesting,
                    }
                    parts = [
                        _rate_and_distortion(terms(model, guide, *batch, **how))
                        for batch in batches
                    ]
                rows.append(_row(beta, *torch.cat(parts, 1)))
                advance(1)
        fits.find(model, guide).digests.clear()  # of the last fit, which is undone
    table = pd.DataFrame(rows).set_index("beta")
    entropy = -evidence.mean if evidence is not None else -table["elbo"].max()
    return RateDistortion(table, float(entropy), refit)


def _rate_and_distortion(t: Terms) -> Tensor:
    """Return both for each datum, averaged over the particles, (2, B)."""
    return torch.stack([t.kl.double().mean(0), -t.log_likelihood.double().mean(0)])


def _row(beta: float, rate: Tensor, distortion: Tensor) -> dict[str, float]:
    row = {"beta": beta}
    for name, values in (("rate", rate), ("distortion", distortion), ("elbo", -rate - distortion)):
        row |= {name: values.mean().item(), f"{name}_error": standard_error(values)}
    return row


def _check_evidence(evidence: Evidence | None, measured: Minibatches) -> None:
    """Refuse an evidence that is none, or of other data than are measured on."""
    if evidence is None:
        return
    if not isinstance(evidence, Evidence):
        raise TypeError(f"evidence must be what pv.evidence gives, got {type(evidence).__name__}")
    if measured.num_data not in (None, len(evidence.values)):
        raise ValueError(
            f"evidence has {len(evidence.values)} values for {measured.num_data} data to measure "
            "on: estimate it for these data (test, or data if there are none)"
        )


def _check_betas(betas: Sequence[float]) -> list[float]:
    scalar = getattr(betas, "ndim", 1) == 0
    if scalar or isinstance(betas, str | bytes | Tensor) or not isinstance(betas, Iterable):
        raise TypeError(f"betas must be a sequence of numbers, such as [0.5, 1], got {betas!r}")
    betas = [positive_number("each of betas", beta) for beta in betas]
    if not betas:
        raise ValueError("betas must hold at least one, got none")
    if len(set(betas)) < len(betas):
        raise ValueError(f"betas must differ, got {betas}")
    return sorted(betas)


def _held(parameters: dict[str, list[Tensor]]) -> list[Tensor]:
    """Return the model's parameters, none of which may be the guide's."""
    of_guide = set(map(id, parameters["guide"]))
    if any(id(parameter) in of_guide for parameter in parameters["model"]):
        raise ValueError(
            "refit='guide' keeps the model as it is, but model and guide share parameters (a "
            "prior that runs the guide, a common network): pass refit='both'"
        )
    return parameters["model"]


@contextlib.contextmanager
def _frozen(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Let parameters have no gradient inside the block."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not registered in the param store")
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _as_before(model: Program, guide: Program) -> Iterator[None]:
    """Give parameters and buffers back their values after the block."""
    tensors = [p for _, p in pyro.get_param_store().named_parameters()]
    for module in modules(model, guide):
        tensors += [*module.parameters(), *module.buffers()]
    saved = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in zip(tensors, saved, strict=True):
                tensor.copy_(before)
