"""Diagnose a fitted pair: how many nats each part of it loses, and what to change."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from pyro_vae._capture import Capture, check_capture
from pyro_vae._programs.data_plate import name_data_plate
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import require_programs, require_trainable_tensors
from pyro_vae._utils.checks import check_call, positive_integer, truth_value
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.precision import Precision, check_precision, matmul_precision
from pyro_vae._utils.progress import task
from pyro_vae._utils.random import seeded
from pyro_vae._utils.user_warnings import warns_once
from pyro_vae.datasets._minibatches import Batch, Data, Minibatches
from pyro_vae.evaluation import (
    AIS,
    Ascent,
    Surgery,
    collapse_report,
    elbo_surgery,
    prior_holes,
)
from pyro_vae.evaluation._improvements import improvements
from pyro_vae.evaluation._log_evidence import FEWEST_JUDGED, UNRELIABLE_KHAT, standard_error
from pyro_vae.report._diagnosis import Diagnosis, LedgerEntry
from pyro_vae.report._log_evidence import LogEvidence, estimate_log_evidence

_HOLE_SAMPLES = 1000
_MOST_OF_DECODER = 5000  # rows of training data for the decoder gain
_CONDITIONAL = "the prior depends on covariates or on x"
_QUICK = Ascent(learning_rate=0.02, num_particles=4, window=25, patience=3, max_steps=2000)


@warns_once
def diagnose(
    model: Program,
    guide: Program,
    train: Data,
    test: Data,
    *,
    num_data: int = 500,
    num_particles: int = 1000,
    ascent: Ascent | None = None,
    annealing: AIS | None = None,
    refit: bool = True,
    vectorize_particles: bool | None = None,
    plate: str | None = None,
    capture: Capture = "auto",
    precision: Precision | None = None,
    seed: int = 0,
    progress: bool | Progress = False,
) -> Diagnosis:
    r"""Diagnose a fitted pair: how many nats each part of it loses, and what to change.

    Log p(x) is estimated by importance sampling from the guide and from the best member of its
    family. If the weights are unreliable for more than a tenth of the data points, a Gaussian with
    full covariance is fitted to each posterior, and samples of it are used too.

    The ledger begins with the test log-likelihood and splits what lies below it,

    .. math::
        \mathcal{L}(x) = \log p(x) - \text{approximation gap} - \text{amortization gap}

    (Cremer, Li & Duvenaud 2018; :func:`pyro_vae.inference_gaps`), for test and for training data.
    The amortization gap of the test data minus that of the training data is the overfitting of the
    encoder. Log p(x) of the training data minus that of the test data is the overfitting of the
    model. Distortion, mutual information and marginal KL are those of :func:`pyro_vae.elbo_surgery`
    for the training data. If the two gaps are unknown, as for a discrete latent, the line
    ``inference gap`` has their sum, log p(x) minus the ELBO of the test data.

    Two further lines show what another model would gain in log p(x) of the test data:

    - ``prior gain``: A mixture of up to 16 Gaussians replaces the prior. It maximizes log p(x) of
      the training data with the decoder as it is. So the gain is not that on the data from which
      the prior was made. If the model's prior depends on covariates or on x, no mixture may be
      better, and the gain is then unknown.
    - ``decoder gain``: A network of two hidden layers is added to the parameters of p(x|z), in
      unconstrained space, with the prior of the line before. It is trained on the training data.
      It is a lower bound of what a larger decoder gains, so it may be below zero. A gain also shows
      that the decoder was trained for too short a time.

    The verdict names the losses above 0.05 nats and above two standard errors, the largest first.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        train: the training data, as in :func:`pyro_vae.fit`.
        test: held-out data.
        num_data: the number of random rows of each data set for the gaps and the ``prior gain``.
            The surgery uses all training data, and the ``decoder gain`` up to 5000 rows.
        num_particles: importance samples per data point.
        ascent: settings of the ascent of :func:`pyro_vae.inference_gaps`. The default here takes a
            tenth of the time of that function's default, and ends up to 0.01 nats lower in tests.
        annealing: annealed importance sampling. It is used if importance sampling remains
            unreliable for more than a tenth of the data points. The default is not to use it.
        refit: whether to train the networks of the ``decoder gain``. False leaves out that line.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        capture: replay the operations of a run as compiled code; see :func:`pyro_vae.fit`.
        precision: of float32 matrix products; see :func:`pyro_vae.fit`.
        seed: of all samples, and of the choice of rows.
        progress: show progress bars, or add them to a rich Progress.

    Returns:
        The :class:`pyro_vae.report.Diagnosis`. A quantity that the pair does not allow is NaN, with
        the reason in its note. Examples are the gaps of a guide with a discrete latent.

    Raises:
        ValueError: Data or an argument are invalid, or the pair breaks a rule (docs/contract.md).
            A site is global or scaled. There are no latents. There is only one row of training or
            test data.
        TypeError: An argument has the wrong type.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 4.0))  # the latents of the data: N(0, 1)
        ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x * 64 / 65, (16 / 65) ** 0.5))  # the posterior
        >>> train, test = torch.randn(2, 200) * 1.25**0.5
        >>> diagnosis = pv.diagnose(model, guide, train, test, refit=False)
        >>> diagnosis.losses[0].name
        'prior gain'
    """
    check_call(diagnose, locals())
    name_data_plate(plate, model, guide)
    require_programs(model, guide)
    require_trainable_tensors(model, guide)
    num_data = positive_integer("num_data", num_data, minimum=2)
    num_particles = positive_integer("num_particles", num_particles, minimum=2)
    check_capture(capture)
    check_precision(precision)
    truth_value("refit", refit)
    if annealing is not None and not isinstance(annealing, AIS):
        raise TypeError(f"annealing must be a pyro_vae.evaluation.AIS, got {annealing!r}")
    ascent = _QUICK if ascent is None else ascent
    if not isinstance(ascent, Ascent):
        raise TypeError(f"ascent must be a pyro_vae.evaluation.Ascent, got {ascent!r}")
    with matmul_precision(precision):
        return _diagnosis(
            model,
            guide,
            train,
            test,
            num_data=num_data,
            num_particles=num_particles,
            ascent=ascent,
            annealing=annealing,
            refit=refit,
            capture=capture,
            vectorize_particles=vectorize_particles,
            seed=seed,
            progress=progress,
        )


def _diagnosis(
    model: Program,
    guide: Program,
    train: Data,
    test: Data,
    *,
    num_data: int,
    num_particles: int,
    ascent: Ascent,
    annealing: AIS | None,
    refit: bool,
    capture: Capture,
    **options: Any,
) -> Diagnosis:
    """Diagnose a pair, after the checks of the arguments; see :func:`diagnose`."""
    seed, progress = options["seed"], options["progress"]
    programs = (model, guide)
    of_train = Minibatches(train, 100, name="train", programs=programs).in_memory()
    of_test = Minibatches(test, 100, name="test", programs=programs).in_memory()
    for name, columns in (("train", of_train), ("test", of_test)):
        if len(columns[0]) < 2:
            raise ValueError(
                f"{name} must have at least two rows, because a diagnosis needs standard errors, "
                "got 1"
            )
    few_train, few_test = (_rows(columns, num_data, seed) for columns in (of_train, of_test))
    of_model = [
        estimate_log_evidence(
            model,
            guide,
            columns,
            ascent=ascent,
            num_particles=num_particles,
            annealing=annealing,
            capture=capture,
            **options,
        )
        for columns in (few_train, few_test)
    ]
    of_khat = "" if num_particles < FEWEST_JUDGED else f"k-hat above {UNRELIABLE_KHAT} or "
    surgery, collapse, surgery_note = _surgery(model, guide, of_train, **options)
    holes, holes_note = _holes(model, guide, of_train, **options)
    with task(progress, "prior and decoder", None, transient=True) as advance:
        gains = improvements(
            model,
            guide,
            few_train,
            few_test,
            [(each.members, each.parameters) for each in of_model],
            decoder_data=_rows(of_train, _MOST_OF_DECODER, seed) if refit else None,
            vectorize_particles=options["vectorize_particles"],
            seed=seed,
            advance=advance,
        )
    if _is_conditional(surgery) and gains.prior is not None and not gains.prior.any():
        # A single mixture for all data points is no better. One for each covariate could be.
        gains = dataclasses.replace(gains, prior=None, prior_note=_CONDITIONAL)
    entries = [
        *_gap_entries(*of_model),
        *_surgery_entries(surgery, surgery_note),
        _mean("prior gain", gains.prior, "a better prior, in test log p(x)", gains.prior_note),
        *(
            [
                _mean(
                    "decoder gain",
                    gains.decoder,
                    "a larger decoder, in test log p(x)",
                    gains.decoder_note,
                )
            ]
            if refit
            else []
        ),
        *_count_entries(collapse, surgery_note, holes, holes_note),
        LedgerEntry(
            "unreliable log p(x)",
            of_model[1].unreliable_share,
            math.nan,
            f"share of test data with {of_khat}few effective samples",
            "share",
        ),
    ]
    return Diagnosis(tuple(entries), len(few_train[0]), len(few_test[0]))


def _rows(columns: Batch, count: int, seed: int) -> Batch:
    """Return at most ``count`` random rows, the same for the same seed."""
    with seeded(seed):
        rows = torch.randperm(len(columns[0]))[:count]
    return tuple(column[rows] for column in columns)


def _surgery(model: Program, guide: Program, columns: Batch, **options):
    """Return the surgery, the activity of the latents, and the reason if both are None."""
    try:
        report = collapse_report(model, guide, columns, **options)
    except ValueError:  # a latent without a mean
        try:
            return elbo_surgery(model, guide, columns, **options), None, ""
        except ValueError as error:
            return None, None, first_line(error)
    return report.surgery, report, report.note


def _is_conditional(surgery: Surgery | None) -> bool:
    """Return whether the prior depends on covariates or on x, if the surgery is known."""
    return surgery is not None and math.isnan(surgery.marginal_kl)


def _holes(model: Program, guide: Program, columns: Batch, **options):
    try:
        return prior_holes(model, guide, columns, num_samples=_HOLE_SAMPLES, **options), ""
    except ValueError as error:
        return None, first_line(error)


def _gap_entries(train: LogEvidence, test: LogEvidence) -> list[LedgerEntry]:
    note = test.note or train.note
    both = []
    if test.gaps is None:
        meaning = "the guide's family and the encoder, test"
        both = [_mean("inference gap", test.values - test.elbo, meaning)]
    return [
        _mean("log p(x), test", test.values, "the higher the better"),
        _mean("log p(x), training", train.values, ""),
        _difference("model overfitting", train.values, test.values, "training minus test log p(x)"),
        _mean("ELBO, test", test.elbo, "log p(x) minus both gaps"),
        *both,
        _mean("approximation gap", test.approximation_gap, "the guide's family, test", note),
        _mean("amortization gap, test", test.amortization_gap, "the encoder, test", note),
        _mean("amortization gap, training", train.amortization_gap, "the encoder, training", note),
        _difference(
            "encoder overfitting",
            test.amortization_gap,
            train.amortization_gap,
            "amortization gap, test minus training",
            note,
        ),
    ]


def _surgery_entries(surgery, note: str) -> list[LedgerEntry]:
    terms = (
        ("distortion", "minus the reconstruction term, training"),
        ("mutual information", "information of z about x, training"),
        ("marginal KL", "KL(q_agg || p), training"),
    )
    found = []
    for name, meaning in terms:
        key = name.lower().replace(" ", "_")
        value = math.nan if surgery is None else getattr(surgery, key)
        error = math.nan if surgery is None else surgery.standard_errors[key]
        if math.isnan(value) and surgery is not None:
            note = _CONDITIONAL
        found.append(LedgerEntry(name, value, error, note if math.isnan(value) else meaning))
    return found


def _count_entries(collapse, note: str, holes, holes_note: str) -> list[LedgerEntry]:
    if collapse is None:
        reason = note or "a latent has no mean"
        unused = LedgerEntry("unused units", math.nan, math.nan, reason, "units")
    else:
        count = len(collapse.units)
        unused = LedgerEntry(
            "unused units", count - collapse.num_active, math.nan, f"of {count}", "units"
        )
    share = math.nan if holes is None else holes.share
    error = math.nan if holes is None else holes.standard_error
    meaning = holes_note
    if holes is not None:
        meaning = f"share of the prior where q_agg is low; {holes.quantile:.0%} if q_agg is p"
    return [unused, LedgerEntry("holes of the prior", share, error, meaning, "share")]


def _mean(name: str, values: Tensor | None, meaning: str, note: str = "") -> LedgerEntry:
    if values is None:
        return LedgerEntry(name, math.nan, math.nan, note)
    return LedgerEntry(name, values.mean().item(), standard_error(values), meaning)


def _difference(
    name: str, one: Tensor | None, other: Tensor | None, meaning: str, note: str = ""
) -> LedgerEntry:
    """Return the difference of the means of two independent samples."""
    if one is None or other is None:
        return LedgerEntry(name, math.nan, math.nan, note)
    error = math.hypot(standard_error(one), standard_error(other))
    return LedgerEntry(name, (one.mean() - other.mean()).item(), error, meaning)
