r"""ELBO surgery: the bound cut into what the model does well and what the prior costs it."""

from __future__ import annotations

import math

import torch
from rich.progress import Progress
from torch import Tensor

from pyro_vae._programs import parameters as programs
from pyro_vae._programs.pair_trace import Program
from pyro_vae._utils.checks import check_call, positive_integer
from pyro_vae._utils.progress import task
from pyro_vae.datasets._minibatches import Data, Minibatches
from pyro_vae.evaluation._estimating import estimating
from pyro_vae.evaluation._log_evidence import standard_error
from pyro_vae.evaluation._stopping import Stopped, Unfinished, check_resume
from pyro_vae.evaluation._surgery.code_scores import CodeScorer, CodeScores
from pyro_vae.evaluation._surgery.decomposition import Surgery
from pyro_vae.evaluation._surgery.subsets import Estimator, check_estimator
from pyro_vae.evaluation._together import Together

_FEWEST_TO_REGRESS = 30


def elbo_surgery(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_particles: int = 1,
    batch_size: int = 500,
    estimator: Estimator = "exact",
    vectorize_particles: bool = True,
    seed: int | None = None,
    resume: Stopped | None = None,
    progress: bool | Progress = False,
    description: str = "ELBO surgery",
) -> Surgery:
    r"""Decompose the average ELBO (Hoffman & Johnson 2016, eq. 6 and 7).

    .. math::
        \frac1N \sum_n \mathcal{L}(x_n) = \underbrace{\frac1N \sum_n E_{q(z|x_n)} \log p(x_n|z)
        }_{-\text{distortion}} - \underbrace{I_q[n, z]}_{\text{mutual information}}
        - \underbrace{\mathrm{KL}(q_{agg}(z) \| p(z))}_{\text{marginal KL}}

    with the aggregated posterior :math:`q_{agg}(z) = \frac1N \sum_n q(z|x_n)`. Every draw
    :math:`z \sim q(z|x_n)` is scored under the posteriors of all N data points: no subset stands
    in for the whole, unless ``estimator`` asks for it. For diagonal Gaussian guides, also mapped
    onto a support, that is done by matrix products in float64; for any other guide by running it
    on the given values, N times N, the data read into memory. The rate is in closed form where
    torch or Pyro knows it.

    The marginal KL of a single Gaussian latent is in turn cut into total correlation and
    dimension-wise KL (Chen et al. 2018, eq. 2), the latter by quadrature. A prior that depends on
    covariates, or on x, has no marginal KL: what is left of the rate is NaN.

    In a group of R processes no codes travel. The Gaussians do, for each block of 16,384 codes in a
    process once around: with D numbers in a latent, a process receives
    :math:`16 D N (1 - 1/R) \lceil K N / (16384 R) \rceil` bytes, and at the end some 50 N.
    A guide that is run on the given codes is run in each process on all data, which each has.

    For large N, minibatch estimators of q_agg (Chen et al. 2018, appendix C) take M times N pairs,
    M data in a minibatch. In expectation ``"stratified"`` puts the mutual information too high, by
    no more than log N less its value, and by less the larger M is; ``"weighted"`` by at least
    log M, and by no more than log(N M) less its value. The marginal KL is too low by as much, and
    with it the total correlation.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        data: the data that q_agg is over: the training set, as a rule. What
            :func:`pyro_vae.fit` takes.
        num_particles: draws of z for each datum.
        batch_size: data points at a time; for the minibatch estimators, M or a little more.
        estimator: of q_agg: "exact", from all pairs; or "stratified" or "weighted", from random
            minibatches of the data, which are then read into memory.
        vectorize_particles: draw many particles in one run; see :func:`pyro_vae.terms`.
        seed: fixes the draws and leaves the process's random numbers as they were.
        resume: what a call of the same arguments raised when it was stopped (Ctrl-C). The codes are
            drawn again, the same ones; those that were scored are not scored again.
        progress: show a bar; or a rich Progress to add one to.
        description: text before the bar.

    Returns:
        The :class:`Surgery`. Processes of a group each encode a share of the minibatches and score
        the codes of it; each has the whole result.

    Raises:
        Stopped: a KeyboardInterrupt, with the surgery from the codes that were scored.
        ValueError: bad data or arguments, or a pair that breaks the contract; a likelihood of zero,
            or a term that is NaN; a minibatch estimator has minibatches of one datum; a site is
            global or scaled; the guide has auxiliary sites, so that its density is an integral,
            masks that differ from datum to datum, or a density that differs from run to run.

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
    num_particles = positive_integer("num_particles", num_particles)
    check_estimator(estimator)
    check_resume(resume)
    settings = {"estimator": estimator, "num_particles": num_particles}
    with Together() as together:
        if resume is not None:
            seed = resume.unfinished.seed_again("elbo_surgery", seed, **settings)
        seed = together.common_seed(seed)
        batches = Minibatches(data, batch_size, device=programs.device_of(model, guide))
        steps = batches.num_data and batches.num_data * (1 + num_particles)
        with (
            estimating(
                "elbo_surgery",
                model,
                guide,
                batches,
                vectorize_particles=vectorize_particles,
                seed=seed,
                needs_latents=True,
            ) as plate_nesting,
            task(progress, description, steps, transient=True) as show,
        ):
            scoring = CodeScorer(
                together,
                model,
                guide,
                batches,
                num_particles=num_particles,
                how={"plate_nesting": plate_nesting, "vectorize_particles": vectorize_particles},
                advance=together.checked(show),
            )
            known = [] if resume is None else resume.unfinished.parts
            if estimator == "exact":
                scored = scoring.exact(known)
            else:
                scored = scoring.of_subsets(estimator, batch_size, known)
    surgery = _surgery(scored, estimator)
    if together.stopped:
        count = int(scored.done.sum())
        unfinished = Unfinished("elbo_surgery", count, seed, settings, scored.parts)
        raise Stopped(surgery, unfinished)
    return surgery


def _surgery(scored: CodeScores, estimator: Estimator) -> Surgery:
    """Put together what is known of the data that are done."""
    averages, done = scored.averages, scored.done
    rate, log_likelihood = averages.rate[done], averages.log_likelihood[done]
    information = _control(scored.information[done], rate - averages.sampled_rate[done])
    per_datum = {
        "elbo": log_likelihood - rate,
        "distortion": -log_likelihood,
        "rate": rate,
        "mutual_information": information,
        "marginal_kl": rate - information if scored.one_prior else torch.full_like(rate, math.nan),
    }
    if scored.of_dimensions is not None:
        of_dimensions = scored.of_dimensions[done]
        per_datum["total_correlation"] = rate - information - of_dimensions
        per_datum["dimension_wise_kl"] = of_dimensions
    sites, numbers = averages.kl_of_sites, averages.kl_of_dimensions
    return Surgery(
        **{name: values.mean().item() for name, values in per_datum.items()},
        log_n=math.log(scored.num_data),
        standard_errors={name: standard_error(values) for name, values in per_datum.items()},
        kl_of_sites=sites and {name: kl.item() for name, kl in sites.items()},
        kl_of_dimensions=numbers and {n: tuple(kl.flatten().tolist()) for n, kl in numbers.items()},
        estimator=estimator,
        num_scored=len(rate) if scored.stopped else None,
    )


def _control(values: Tensor, noise: Tensor) -> Tensor:
    """Take out of the values what they share with a noise whose expectation is zero.

    The noise is what sampling adds to a rate known in closed form. The regression moves between
    two estimates of the marginal KL, the rate less the sampled mutual information and the sampled
    log q_agg - log p: the former is exact where the information saturates at log N, the latter
    where the aggregated posterior is the prior. Of few data its coefficient is fitted to the noise,
    and the errors come out too small; of a rate that is infinite there is none.
    """
    centred = noise - noise.mean()
    variance = centred.square().sum()
    if len(values) < _FEWEST_TO_REGRESS or variance == 0 or not variance.isfinite():
        return values
    return values - (values * centred).sum() / variance * noise
