r"""Bounds on the evidence of simulated data from both sides: bidirectional Monte Carlo."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch import Tensor

from pyro_vae._capture import Capture, check_capture
from pyro_vae._programs.data_plate import name_data_plate
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.terms import terms
from pyro_vae._utils.checks import check_call, positive_integer
from pyro_vae._utils.interrupts import Interrupted
from pyro_vae._utils.precision import Precision, check_precision
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._minibatches import Batch, Data
from pyro_vae.evaluation._ais import AIS, Annealer
from pyro_vae.evaluation._delta_sites import prior_guide
from pyro_vae.evaluation._log_evidence import UnreliableEvidence, standard_error
from pyro_vae.evaluation._runner import Runner
from pyro_vae.evaluation._simulated import simulate
from pyro_vae.evaluation._tempered_path import TemperedPath
from pyro_vae.evaluation._weights import WeightStream


@dataclass(frozen=True)
class Sandwich:
    r"""Bounds on log p(x) of data simulated from the model, in nats, float64 on the CPU.

    Args:
        lower: lower bound for each data point, shape (N,). It is below log p(x) on average.
        upper: upper bound for each data point, shape (N,). It is above log p(x) on average.
        lower_errors: standard error of each lower bound, from the chains alone, shape (N,).
        upper_errors: standard error of each upper bound, from the chains alone, shape (N,). All
            chains of a data point start at the same sample from the posterior. Only
            :attr:`gap_error` includes the variation of that sample.
        data: the simulated x and the covariates, each with N rows.
        num_chains: chains per data point and direction.
    """

    lower: Tensor
    upper: Tensor
    lower_errors: Tensor
    upper_errors: Tensor
    data: Batch
    num_chains: int

    @property
    def gap(self) -> float:
        """The average of upper minus lower. On average, no bound has a larger error."""
        return (self.upper - self.lower).mean().item()

    @property
    def gap_error(self) -> float:
        """Standard error of the gap, or NaN for one data point."""
        return standard_error(self.upper - self.lower)

    def __repr__(self) -> str:
        return (
            f"{self.lower.mean().item():.2f} <= log p(x) <= {self.upper.mean().item():.2f} nats, "
            f"gap {self.gap:.3f} ± {self.gap_error:.3f} "
            f"({len(self.lower)} simulated data points, {self.num_chains} chains)"
        )


def sandwich(
    model: Program,
    guide: Program | None = None,
    *,
    like: Data,
    ais: AIS | None = None,
    batch_size: int = 100,
    pairs_per_pass: int = 5_000,
    vectorize_particles: bool | None = None,
    plate: str | None = None,
    capture: Capture = "auto",
    precision: Precision | None = None,
    seed: int | None = None,
    resume: Interrupted | None = None,
    progress: bool | Progress = False,
    description: str = "sandwich",
) -> Sandwich:
    r"""Bound log p(x) from both sides on simulated data (Grosse, Ghahramani & Adams 2015).

    .. math::
        E \log \frac1C \sum_c w_c \;\le\; \log p(x) \;\le\;
        -E \log \frac1C \sum_c \frac{1}{w'_c}, \qquad (x, z) \sim p(x, z)

    The model samples x and z jointly, so z is an exact sample from p(z|x). The model may use x only
    to observe it. The weights w come from annealed importance sampling. Chains of the same kind,
    run backwards from z to the start, have the weights w', and the mean of 1/w' is 1/p(x). If the
    two bounds agree, both are accurate. Then ``evidence(method=ais)`` is accurate for similar data.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x). Pass it if the chains start there, or if the pair was fitted.
        like: data of the right shape, as in :func:`pyro_vae.fit`. One data point is simulated for
            each row, with the covariates of that row.
        ais: settings of annealed importance sampling. The default is :class:`AIS` with the guide
            as start, or with the prior if there is no guide.
        batch_size: data points at a time.
        pairs_per_pass: pairs of a chain and a data point in one run of the programs.
        vectorize_particles: run many chains at once; see :func:`pyro_vae.terms`.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        capture: replay the operations of a gradient as compiled code; see :func:`pyro_vae.fit`.
        precision: of float32 matrix products; see :func:`pyro_vae.fit`.
        seed: of the samples. The random numbers of the process are restored afterwards.
        resume: the exception of an interrupted call (Ctrl-C) with the same arguments.
        progress: show a progress bar, or add one to a rich Progress.
        description: text before the bar.

    Returns:
        The :class:`Sandwich`. In a group of processes (torch.distributed), each process does its
        share of the minibatches and returns the whole result.

    Raises:
        Interrupted: Ctrl-C was pressed. It is a KeyboardInterrupt, and ``.partial`` has the bounds
            for the first data points.
        ValueError: :func:`pyro_vae.evidence` with :class:`AIS` would raise it. Or the model
            observes a tensor that is neither an argument nor a view of one. Or the model uses x
            for more than observation.
        TypeError: ``ais`` is not a :class:`pyro_vae.evaluation.AIS`.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> ais = pv.evaluation.AIS(num_temperatures=20, start="prior", step_size=0.5)
        >>> bounds = pv.sandwich(model, like=torch.zeros(50), ais=ais, seed=0)
        >>> exact = dist.Normal(0.0, 2**0.5).log_prob(bounds.data[0]).double().mean()
        >>> bool(bounds.lower.mean() - 0.02 < exact < bounds.upper.mean() + 0.02)
        True
        >>> bounds.gap < 0.1
        True
    """
    check_call(sandwich, locals())
    name_data_plate(plate, model, guide)
    pairs_per_pass = positive_integer("pairs_per_pass", pairs_per_pass)
    check_capture(capture)
    check_precision(precision)
    ais = AIS(start="prior" if guide is None else "guide") if ais is None else ais
    if not isinstance(ais, AIS):
        raise TypeError(f"ais must be a pyro_vae.evaluation.AIS, got {ais!r}")
    if guide is None and ais.start == "guide":
        raise ValueError(
            'AIS(start="guide") needs a guide, but guide is None. Pass a guide, or '
            'ais=AIS(start="prior")'
        )
    guide = prior_guide(model) if guide is None else guide
    max_rows = max(1, pairs_per_pass // ais.num_chains)
    with Runner.open(
        "sandwich",
        model,
        guide,
        like,
        data_name="like",
        batch_size=batch_size,
        vectorize_particles=vectorize_particles,
        precision=precision,
        seed=seed,
        resume=resume,
        settings={"ais": ais},
        progress=progress,
        description=description,
        needs_latents=True,
    ) as runner:
        batches = runner.batches
        num_parts = batches.num_data and runner.group.max_share(
            -(-batches.num_data // min(max_rows, batch_size))
        )
        path = TemperedPath(
            model, guide, batches.first(), start=ais.start, **runner.particle_options
        )
        annealer = Annealer(ais, path, watch=runner.programs, capture=capture)

        def bounds(given: Batch) -> tuple[Tensor, ...]:
            batch, latents = simulate(model, given)
            if ais.start == "guide":
                terms(model, guide, *batch)  # validate values
            with values_checked(False):
                rows = path.rows_of(latents).expand(ais.num_chains, -1, -1)
                return *_bounds(annealer, batch, rows, num_parts, runner.advance), *batch

        parts = runner.map_batches(bounds, done=runner.done, max_rows=max_rows)
    lower, lower_errors, upper, upper_errors, *data = map(torch.cat, zip(*parts, strict=True))
    result = Sandwich(lower, upper, lower_errors, upper_errors, tuple(data), ais.num_chains)
    runner.raise_if_interrupted(result, len(lower), parts)
    warn_of_crossing(result)
    return result


def warn_of_crossing(bounds: Sandwich) -> None:
    """Warn, at the line that called the estimator, if the upper bound is below the lower one."""
    if bounds.gap < -3 * bounds.gap_error:
        warnings.warn(
            f"the upper bound is {-bounds.gap:.3f} ± {bounds.gap_error:.3f} nats below the lower "
            "bound, so one of them must be wrong. Use more temperatures or float64",
            UnreliableEvidence,
            stacklevel=3,  # the caller of sandwich
        )


def _bounds(
    annealer: Annealer,
    batch: Batch,
    rows: Tensor,
    num_parts: int | None,
    advance: Callable[..., None],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return lower bounds, their errors, upper bounds and their errors, each (B,)."""

    def status(text: str) -> None:
        advance(0, text)

    step_sizes = annealer.step_sizes(batch, num_parts, status)
    forward, _ = annealer.forward(batch, step_sizes, num_parts, status)
    inverse = WeightStream(len(rows))
    inverse.add(-annealer.backward(batch, rows, step_sizes, num_parts, status))
    return forward.log_mean(), forward.error(), -inverse.log_mean(), inverse.error()
