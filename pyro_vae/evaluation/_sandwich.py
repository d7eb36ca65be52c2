r"""The evidence of simulated data from both sides: bidirectional Monte Carlo."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch import Tensor

from pyro_vae._capture import Capture, check_capture
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.terms import terms
from pyro_vae._utils.checks import check_call, positive_integer
from pyro_vae._utils.interrupts import Interrupted
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
    r"""Bounds on log p(x) of data that the model drew, in nats, float64 on the CPU.

    Args:
        lower: of each datum, shape (N,): below log p(x) on average.
        upper: likewise, above it.
        lower_errors: standard error of each, of the chains alone, shape (N,).
        upper_errors: likewise. The chains of a datum begin at one draw from the posterior: what
            it leaves in them is seen in :attr:`gap_error` alone.
        data: the simulated x and the covariates, each of N rows.
        num_chains: of each datum and direction.
    """

    lower: Tensor
    upper: Tensor
    lower_errors: Tensor
    upper_errors: Tensor
    data: Batch
    num_chains: int

    @property
    def gap(self) -> float:
        """The average of upper less lower: both bounds are off by no more, on average."""
        return (self.upper - self.lower).mean().item()

    @property
    def gap_error(self) -> float:
        """Standard error of the gap; NaN for one datum."""
        return standard_error(self.upper - self.lower)

    def __str__(self) -> str:
        return (
            f"{self.lower.mean().item():.2f} <= log p(x) <= {self.upper.mean().item():.2f} nats, "
            f"gap {self.gap:.3f} ± {self.gap_error:.3f} "
            f"({len(self.lower)} simulated data, {self.num_chains} chains)"
        )


def sandwich(
    model: Program,
    guide: Program | None = None,
    *,
    like: Data,
    ais: AIS | None = None,
    batch_size: int = 100,
    pairs_per_pass: int = 5_000,
    vectorize_particles: bool = True,
    capture: Capture = "auto",
    seed: int | None = None,
    resume: Interrupted | None = None,
    progress: bool | Progress = False,
    description: str = "sandwich",
) -> Sandwich:
    r"""Bound log p(x) from both sides on simulated data (Grosse, Ghahramani & Adams 2015).

    .. math::
        E \log \frac1C \sum_c w_c \;\le\; \log p(x) \;\le\;
        -E \log \frac1C \sum_c \frac{1}{w'_c}, \qquad (x, z) \sim p(x, z)

    The model draws x and z together, so that z is an exact draw from p(z|x): it must look at x to
    observe it, and for nothing else. Annealed importance sampling gives the weights w; the same
    chains, walked backwards from z to the start, give w', whose inverses have the mean 1/p(x).
    Where the two meet, both are right: and so, for data like these, is ``evidence(method=ais)``.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x), if the chains are to start there, or if the pair was fitted.
        like: data of the right shape, as :func:`pyro_vae.fit` takes them: for each row one is
            simulated. Covariates are kept.
        ais: settings; an :class:`AIS` as it comes if not given, which starts from the
            guide if there is one.
        batch_size: data points at a time.
        pairs_per_pass: (chain, datum) pairs in one run of the programs.
        vectorize_particles: run many chains at once; see :func:`pyro_vae.terms`.
        capture: replay the operations of a gradient as compiled code; see :func:`pyro_vae.fit`.
        seed: fixes the draws and leaves the process's random numbers as they were.
        resume: the exception of an interrupted call (Ctrl-C) with the same arguments.
        progress: show a bar; or a rich Progress to add one to.
        description: text before the bar.

    Returns:
        The :class:`Sandwich`. Processes of a group share the minibatches; each has the whole of it.

    Raises:
        Interrupted: a KeyboardInterrupt, with the bounds on the data that were done.
        ValueError: what :func:`pyro_vae.evidence` refuses; the model cannot be shown what it
            draws, because it observes something else than its arguments, or parts of them; or what
            it draws depends on the x that it is given.
        TypeError: ``ais`` is no :class:`pyro_vae.evaluation.AIS`.

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
    pairs_per_pass = positive_integer("pairs_per_pass", pairs_per_pass)
    check_capture(capture)
    ais = AIS(start="prior" if guide is None else "guide") if ais is None else ais
    if not isinstance(ais, AIS):
        raise TypeError(f"ais must be a pyro_vae.evaluation.AIS, got {ais!r}")
    if guide is None and ais.start == "guide":
        raise ValueError(
            'AIS(start="guide") starts from the guide, and none is given: pass one, or take '
            'AIS(start="prior")'
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
                terms(model, guide, *batch)  # while values are validated
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
    """Warn the caller's caller of bounds that lie the wrong way round."""
    if bounds.gap < -3 * bounds.gap_error:
        warnings.warn(
            f"the upper bound lies {-bounds.gap:.3f} ± {bounds.gap_error:.3f} nats below the lower "
            "one: they cannot both be right. Take more temperatures, or float64",
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
    """Return the lower bounds and their errors, then the upper ones, each (B,)."""

    def status(text: str) -> None:
        advance(0, text)

    step_sizes = annealer.step_sizes(batch, num_parts, status)
    forward, _ = annealer.forward(batch, step_sizes, num_parts, status)
    inverse = WeightStream(len(rows))
    inverse.add(-annealer.backward(batch, rows, step_sizes, num_parts, status))
    return forward.log_mean(), forward.error(), -inverse.log_mean(), inverse.error()
