r"""The rate-distortion curve of a pair, with one fit per weight of the rate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import pyro
import torch
from rich.progress import Progress
from torch import Tensor

from pyro_vae._programs import fits
from pyro_vae._programs.data_plate import name_data_plate
from pyro_vae._programs.evaluation import evaluation_mode
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import bind, device_of, parameter_store, parameters_of
from pyro_vae._programs.terms import Terms, terms
from pyro_vae._programs.validation import check_pair
from pyro_vae._utils.checks import check_call, positive_integer, positive_number, require_word
from pyro_vae._utils.modules import modules
from pyro_vae._utils.progress import task
from pyro_vae._utils.random import seeded
from pyro_vae._utils.user_warnings import ignores_frozen_parameters, warns_once
from pyro_vae.datasets._minibatches import Data, Minibatches
from pyro_vae.evaluation import Evidence
from pyro_vae.evaluation._context import evaluation_context
from pyro_vae.evaluation._log_evidence import standard_error
from pyro_vae.objectives import BetaELBO
from pyro_vae.report._curve import RateDistortion
from pyro_vae.training import fit

_OWN_OPTIONS = ("objective", "description", "progress", "seed")


@warns_once
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
    vectorize_particles: bool | None = None,
    plate: str | None = None,
    seed: int | None = None,
    progress: bool | Progress = False,
    description: str = "rate-distortion",
    **fit_options: Any,
) -> RateDistortion:
    r"""Trace the rate-distortion curve of a pair (Alemi et al. 2018).

    For each beta, the pair is fitted to

    .. math::
        \max \; -D - \beta R, \qquad D = -\mathbb{E}\,\mathbb{E}_{q(z|x)} \log p(x|z), \quad
        R = \mathbb{E}\,\mathrm{KL}(q(z|x) \| p(z))

    and then its rate and distortion are measured. R + D is minus the ELBO, and at least minus the
    average :math:`\log p(x)`. With ``refit="guide"``, the model is fixed. The guide then
    approximates :math:`q_\beta(z|x) \propto p(z) \, p(x|z)^{1/\beta}`, with an annealed likelihood.
    The curve is convex, with slope :math:`dD/dR = -\beta`. With ``refit="both"``, the model is
    fitted too, and the curve is that of the whole family of models.

    The first fit, for the smallest beta, starts from the current values of the pair. Each later fit
    starts from the result of the fit before. At the end, the values of the pair's parameters and
    buffers are restored, also after an error or an interrupt.

    Args:
        model: program of p(x, z), fitted.
        guide: program of q(z|x), fitted.
        data: training data, as in :func:`pyro_vae.fit`.
        betas: weights of the rate, positive numbers.
        refit: the programs to fit for each beta, the ``"guide"`` alone or ``"both"``.
        test: data to measure on. The default is ``data``.
        evidence: log p(x) of the measured data, from :func:`pyro_vae.evidence`. It sets the bound
            of the curve. Only for ``refit="guide"``.
        num_particles: samples per data point in a measurement.
        training_particles: samples per data point in a fit.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        seed: of all samples.
        progress: show progress bars, or add them to a rich Progress.
        description: text before the bars.
        **fit_options: other arguments of :func:`pyro_vae.fit`, such as ``epochs``,
            ``learning_rate`` and ``batch_size``.

    Returns:
        The :class:`RateDistortion`.

    Raises:
        ValueError: Data or an argument are invalid, or the pair breaks a rule (docs/contract.md). A
            site is global or scaled. ``refit`` is ``"guide"``, and the two programs share
            parameters. ``evidence`` is of other data than the measured ones.
        TypeError: An option is not an argument of a fit, or the curve sets it. ``betas`` is
            not a sequence. ``evidence`` is not a :class:`pyro_vae.evaluation.Evidence`.

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
    name_data_plate(plate, model, guide)
    import pandas as pd

    betas = _check_betas(betas)
    num_particles = positive_integer("num_particles", num_particles)
    training_particles = positive_integer("training_particles", training_particles)
    require_word("refit", refit, ("guide", "both"))
    if own := [name for name in fit_options if name in _OWN_OPTIONS]:
        raise TypeError(f"rate_distortion sets the fit's {own[0]!r} itself. Leave it out")
    if evidence is not None and refit == "both":
        raise ValueError(
            "evidence must be None with refit='both', which fits another model for each beta. "
            "Leave it out"
        )
    batch_size, device = fit_options.get("batch_size"), device_of(model, guide)
    options = {"device": device, "programs": (model, guide)}
    first = Minibatches(data, batch_size, **options).first()
    measured = data if test is None else test
    name = "data" if test is None else "test"
    _check_evidence(evidence, Minibatches(measured, batch_size, name=name, **options))
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
                batches = Minibatches(measured, batch_size, name=name, **options)
                with evaluation_context(
                    "rate_distortion",
                    model,
                    guide,
                    batches,
                    vectorize_particles=vectorize_particles,
                    seed=seeds[1],
                ) as particle_options:
                    how = {"num_particles": num_particles, **particle_options}
                    parts = [
                        _rate_and_distortion(terms(model, guide, *batch, **how))
                        for batch in batches
                    ]
                rows.append(_row(beta, *torch.cat(parts, 1)))
                advance(1)
        fits.find(model, guide).digests.clear()  # the values of the last fit are not kept
    table = pd.DataFrame(rows).set_index("beta")
    entropy = -evidence.mean if evidence is not None else -table["elbo"].max()
    return RateDistortion(table, float(entropy), refit)


def _rate_and_distortion(t: Terms) -> Tensor:
    """Return rate and distortion of each data point, averaged over particles, (2, B)."""
    return torch.stack([t.kl.double().mean(0), -t.log_likelihood.double().mean(0)])


def _row(beta: float, rate: Tensor, distortion: Tensor) -> dict[str, float]:
    row = {"beta": beta}
    for name, values in (("rate", rate), ("distortion", distortion), ("elbo", -rate - distortion)):
        row |= {name: values.mean().item(), f"{name}_error": standard_error(values)}
    return row


def _check_evidence(evidence: Evidence | None, measured: Minibatches) -> None:
    """Raise an error unless the evidence is None, or an Evidence of the measured data."""
    if evidence is None:
        return
    if not isinstance(evidence, Evidence):
        raise TypeError(f"evidence must be a result of pv.evidence, got {type(evidence).__name__}")
    if measured.num_data not in (None, len(evidence.values)):
        raise ValueError(
            f"evidence has {len(evidence.values)} values for {measured.num_data} measured data "
            "points. Estimate it for the same data (test, or data if test is None)"
        )


def _check_betas(betas: Sequence[float]) -> list[float]:
    scalar = getattr(betas, "ndim", 1) == 0
    if scalar or isinstance(betas, str | bytes | Tensor) or not isinstance(betas, Iterable):
        raise TypeError(f"betas must be a sequence of numbers, such as [0.5, 1], got {betas!r}")
    betas = [positive_number("each number in betas", beta) for beta in betas]
    if not betas:
        raise ValueError("betas must have at least one number, got none")
    if len(set(betas)) < len(betas):
        raise ValueError(f"betas must differ from each other, got {betas}")
    return sorted(betas)


def _held(parameters: dict[str, list[Tensor]]) -> list[Tensor]:
    """Return the model's parameters; raise ValueError if the guide has one of them."""
    of_guide = set(map(id, parameters["guide"]))
    if any(id(parameter) in of_guide for parameter in parameters["model"]):
        raise ValueError(
            "refit='guide' fixes the model, but model and guide share parameters (a prior that "
            "runs the guide, or a common network). Pass refit='both'"
        )
    return parameters["model"]


@contextlib.contextmanager
def _frozen(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Disable the gradients of parameters inside the block."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        with ignores_frozen_parameters():
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _as_before(model: Program, guide: Program) -> Iterator[None]:
    """Restore the values of parameters and buffers after the block."""
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
