r"""ELBO surgery: the average ELBO as distortion, mutual information and marginal KL."""

from __future__ import annotations

import math
from typing import Any

import torch
from rich.progress import Progress

from pyro_vae._programs.data_plate import name_data_plate
from pyro_vae._programs.pair_trace import Program
from pyro_vae._utils.checks import check_call, positive_integer
from pyro_vae._utils.interrupts import Interrupted
from pyro_vae._utils.messages import first_line
from pyro_vae.datasets._minibatches import Data
from pyro_vae.evaluation._log_evidence import standard_error
from pyro_vae.evaluation._runner import Runner
from pyro_vae.evaluation._surgery.code_scores import CodeScorer, CodeScores
from pyro_vae.evaluation._surgery.control import controlled
from pyro_vae.evaluation._surgery.decomposition import Surgery
from pyro_vae.evaluation._surgery.subsets import Estimator, check_estimator

_MIN_SCORED = 30  # a standard error of fewer would be too uncertain


def elbo_surgery(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_particles: int = 1,
    batch_size: int = 500,
    estimator: Estimator = "exact",
    num_scored: int | None = None,
    vectorize_particles: bool | None = None,
    plate: str | None = None,
    seed: int | None = None,
    resume: Interrupted | None = None,
    progress: bool | Progress = False,
    description: str = "ELBO surgery",
) -> Surgery:
    r"""Decompose the average ELBO (Hoffman & Johnson 2016, eq. 6 and 7).

    .. math::
        \frac1N \sum_n \mathcal{L}(x_n) = \underbrace{\frac1N \sum_n E_{q(z|x_n)} \log p(x_n|z)
        }_{-\text{distortion}} - \underbrace{I_q[x, z]}_{\text{mutual information}}
        - \underbrace{\mathrm{KL}(q_{agg}(z) \| p(z))}_{\text{marginal KL}}

    with the aggregated posterior :math:`q_{agg}(z) = \frac1N \sum_n q(z|x_n)`. A sample
    :math:`z \sim q(z|x_n)` is scored under the posteriors of all N data points. If the posteriors
    are diagonal Gaussians, matrix products in float64 are used, also if the Gaussians are mapped
    onto another support. Any other guide is run on all pairs, and the data are read into memory.
    The rate is computed in closed form if torch or Pyro has a formula.

    With ``num_scored``, only the samples of so many random data points are scored, each under all N
    posteriors. The data points are divided into as many strata by their rate, and one of each is
    chosen (Cochran 1977, chapter 5). The estimate of the mutual information is still unbiased, and
    its error includes the choice.

    The marginal KL of a single Gaussian latent variable is the sum of total correlation and
    dimension-wise KL (Chen et al. 2018, eq. 2). The dimension-wise KL is the rate minus the mutual
    information of each dimension and x, which is computed by quadrature. So it has the sampling
    error of the rate. With a prior that depends on covariates or on x, the marginal KL and the
    terms that need it are NaN.

    In a group of R processes, the processes exchange Gaussians but no codes (samples of z). For
    each block of 16,384 codes of a process, the Gaussians of all processes are sent once. Let D be
    the size of a latent variable. A process receives
    :math:`16 D N (1 - 1/R) \lceil K N / (16384 R) \rceil` bytes, and about 70 N at the end. For any
    other guide, each process runs the guide on all data.

    Minibatch estimators of q_agg (Chen et al. 2018, appendix C) use M times N pairs, with M
    data points in a minibatch. On average, the mutual information I is then too high. The
    bias of ``"stratified"`` is at most log N - I, and is smaller for larger M. The bias of
    ``"weighted"`` is between log M and log(N M) - I. The marginal KL and the total correlation are
    too low by the same amount.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        data: the data of q_agg, usually the training set, as in :func:`pyro_vae.fit`.
        num_particles: samples of z per data point.
        batch_size: number of data points per minibatch. For the minibatch estimators it is M, or a
            little more than M.
        estimator: estimator of q_agg. ``"exact"`` uses all posteriors. ``"stratified"`` and
            ``"weighted"`` use random minibatches and read the data into memory.
        num_scored: number of data points whose samples are scored, at least 30, for the exact
            estimator. By default all, if the posteriors are diagonal Gaussians. For other guides,
            as many as give 10 million pairs, but no fewer than 200 data points.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        seed: seed of the samples. The random state of the process is restored afterwards.
        resume: the exception of an interrupted call (Ctrl-C) with the same arguments. The same
            codes are sampled again, but only codes without a score are scored.
        progress: show a progress bar, or add one to a rich Progress.
        description: text before the bar.

    Returns:
        The :class:`Surgery`. Each process of a group encodes and scores its share of the
        minibatches, and returns the whole result.

    Raises:
        Interrupted: Ctrl-C was pressed. It is a KeyboardInterrupt, and ``.partial`` is the surgery
            from the codes that were scored.
        ValueError: Data or an argument are invalid, or the pair breaks a rule (docs/contract.md). A
            likelihood is zero, or a term is NaN. A minibatch estimator has minibatches of one data
            point. A site is global or scaled. The guide has auxiliary sites, so log q(z|x) is an
            integral that is not known. The guide has masks that differ between data points, or a
            density that differs between runs.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def blind_guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))  # the prior
        >>> surgery = pv.elbo_surgery(model, blind_guide, torch.randn(50), seed=0)
        >>> print(f"{abs(surgery.mutual_information):.3f} {abs(surgery.marginal_kl):.3f}")
        0.000 0.000
    """
    check_call(elbo_surgery, locals())
    name_data_plate(plate, model, guide)
    num_particles = positive_integer("num_particles", num_particles)
    check_estimator(estimator)
    if num_scored is not None:
        num_scored = positive_integer("num_scored", num_scored, minimum=_MIN_SCORED)
        if estimator != "exact":
            raise ValueError(
                f"num_scored is for the exact estimator, got estimator={estimator!r}, which scores "
                "the samples of all data points. Leave num_scored out"
            )
    with Runner.open(
        "elbo_surgery",
        model,
        guide,
        data,
        batch_size=batch_size,
        vectorize_particles=vectorize_particles,
        seed=seed,
        resume=resume,
        settings={
            "estimator": estimator,
            "num_particles": num_particles,
            "num_scored": num_scored,
        },
        progress=progress,
        description=description,
        steps_per_row=1 + num_particles,
        needs_latents=True,
    ) as runner:
        scorer = CodeScorer(runner, num_particles)
        if estimator == "exact":
            scores = scorer.exact(num_scored)
        else:
            scores = scorer.of_subsets(estimator, batch_size)
    surgery = _surgery(scores, estimator, runner.interrupted)
    runner.raise_if_interrupted(surgery, int(scores.done.sum()), scores.parts)
    return surgery


def surgery_or_reason(*args: Any, **options: Any) -> tuple[Surgery | None, str]:
    """Return the surgery of a pair, or None and the reason why it is not possible."""
    try:
        return elbo_surgery(*args, **options), ""
    except ValueError as error:
        return None, first_line(error)


def _surgery(scores: CodeScores, estimator: Estimator, interrupted: bool) -> Surgery:
    """Compute the surgery of all data points, or if interrupted, of those that are done."""
    averages, done = scores.averages, scores.done
    used = done if interrupted else torch.ones_like(done)
    part = None if interrupted else scores.part
    rows = used if part is None else part.chosen
    information = controlled(
        scores.information[rows],
        averages.noise[rows],
        averages.noise_variance[rows],
        scores.num_particles,
    )
    if part is not None:
        information = part.of_all(information)
    rate, log_likelihood = averages.rate[used], averages.log_likelihood[used]
    per_data_point = {
        "elbo": log_likelihood - rate,
        "distortion": -log_likelihood,
        "rate": rate,
        "mutual_information": information,
        "marginal_kl": rate - information if scores.one_prior else torch.full_like(rate, math.nan),
    }
    if scores.of_dimensions is not None:
        of_dimensions = scores.of_dimensions[used]
        per_data_point["total_correlation"] = of_dimensions - information
        per_data_point["dimension_wise_kl"] = rate - of_dimensions
    sites, numbers = averages.kl_of_sites, averages.kl_of_dimensions
    return Surgery(
        **{name: values.mean().item() for name, values in per_data_point.items()},
        log_n=math.log(scores.num_data),
        standard_errors={name: standard_error(values) for name, values in per_data_point.items()},
        kl_of_sites=sites and {name: kl.item() for name, kl in sites.items()},
        kl_of_dimensions=numbers and {n: tuple(kl.flatten().tolist()) for n, kl in numbers.items()},
        estimator=estimator,
        num_scored=int(done.sum()) if interrupted or not done.all() else None,
        interrupted=interrupted,
    )
