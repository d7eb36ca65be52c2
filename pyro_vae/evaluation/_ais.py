r"""Annealed importance sampling: estimate log p(x) with chains from a start to the posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from pyro_vae._capture import Capture, Captured
from pyro_vae._programs.pair_trace import Program
from pyro_vae._utils.checks import positive_integer, positive_number, real_number, require_word
from pyro_vae.evaluation._hamiltonian import transition
from pyro_vae.evaluation._tempered_path import Start, State, TemperedPath
from pyro_vae.evaluation._weights import WeightStream

_STEEPNESS = 4.0  # the sigmoid schedule covers the arguments from -4 to 4
_PILOT_TRANSITIONS = 100  # at least, over all temperatures
_PILOT_WARMUP = 30
_PILOT_GAIN = 0.25


@dataclass(frozen=True)
class AIS:
    r"""Settings of annealed importance sampling (Neal 2001), for ``evidence(method=...)``.

    .. math::
        \log \hat p(x) = \log \frac1C \sum_{c=1}^C \prod_{t=1}^T
        \frac{p_{b_t}(z_{c,t-1})}{p_{b_{t-1}}(z_{c,t-1})}, \qquad
        p_b(z) \propto p_0(z)^{1-b} \, p(x, z)^b

    with :math:`z_{c,0} \sim p_0`. One step of Hamiltonian Monte Carlo, which leaves
    :math:`p_{b_t}` invariant, moves :math:`z_{c,t-1}` to :math:`z_{c,t}`. The average of the
    weights is an unbiased estimate of p(x) for any number of temperatures. The step sizes may have
    any values that do not depend on the chains. A pilot run of other chains tunes them for each
    data point and temperature. Wu et al. (2017) evaluate decoders in this way.

    Args:
        num_chains: C, the number of chains.
        num_temperatures: T, the number of temperatures after the first.
        start: :math:`p_0`, q(z|x) (``"guide"``) or p(z) (``"prior"``).
        leapfrog_steps: leapfrog steps in one step of Hamiltonian Monte Carlo.
        target_acceptance: acceptance probability to which the pilot run tunes the step sizes.
        pilot: number of chains in the pilot run.
        step_size: the same for all data points and temperatures. The default is to tune step sizes
            in the pilot run.
        schedule: ``"sigmoid"`` (dense at both ends; Wu et al. 2017), ``"linear"``, or the
            temperatures themselves, which increase from 0 to 1 and set T.

    Raises:
        ValueError: A number is out of range, or ``start`` or ``schedule`` is an unknown word.
        TypeError: A value has the wrong type.

    Example:
        >>> import pyro_vae as pv
        >>> pv.evaluation.AIS(num_temperatures=4, schedule="linear").temperatures.tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """

    num_chains: int = 100
    num_temperatures: int = 1000
    start: Start = "guide"
    leapfrog_steps: int = 10
    target_acceptance: float = 0.65
    pilot: int = 10
    step_size: float | None = None
    schedule: Literal["sigmoid", "linear"] | Sequence[float] = "sigmoid"

    def __post_init__(self):
        for name in ("num_chains", "num_temperatures", "leapfrog_steps", "pilot"):
            object.__setattr__(self, name, positive_integer(name, getattr(self, name)))
        require_word("start", self.start, ("guide", "prior"))
        if positive_number("target_acceptance", self.target_acceptance) >= 1:
            raise ValueError(
                f"target_acceptance must be between 0 and 1, got {self.target_acceptance}"
            )
        if self.step_size is not None:
            positive_number("step_size", self.step_size)
        if isinstance(self.schedule, str):
            other = "numbers that increase from 0 to 1"
            require_word("schedule", self.schedule, ("sigmoid", "linear"), other)
            return
        schedule = self.schedule.tolist() if hasattr(self.schedule, "tolist") else self.schedule
        if not isinstance(schedule, Iterable):
            raise TypeError(
                'schedule must be "sigmoid", "linear" or numbers that increase from 0 to 1, got '
                f"{self.schedule!r}"
            )
        numbers = tuple(real_number("each number of schedule", b) for b in schedule)
        rising = all(a < b for a, b in pairwise(numbers))
        if len(numbers) < 2 or numbers[0] != 0 or numbers[-1] != 1 or not rising:
            raise ValueError(
                f"schedule must increase from 0 to 1, each number above the last, got {numbers}"
            )
        object.__setattr__(self, "schedule", numbers)
        object.__setattr__(self, "num_temperatures", len(numbers) - 1)

    @property
    def temperatures(self) -> Tensor:
        """The temperatures from b_0 = 0 to b_T = 1, shape (T + 1,), float64."""
        if not isinstance(self.schedule, str):
            return torch.tensor(self.schedule, dtype=torch.float64)
        even = torch.linspace(0, 1, self.num_temperatures + 1, dtype=torch.float64)
        if self.schedule == "linear":
            return even
        bent = (_STEEPNESS * (2 * even - 1)).sigmoid()
        return (bent - bent[0]) / (bent[-1] - bent[0])


@dataclass(frozen=True)
class Annealing:
    r"""Results of annealed importance sampling at each temperature, float64 on the CPU.

    Args:
        settings: settings of the run.
        log_normalizers: estimates of :math:`\log \int p_b(z) dz`, shape (T + 1, N). The first is
            zero, and the last is log p(x).
        monte_carlo_errors: standard errors of ``log_normalizers``, shape (T + 1, N).
        acceptance: average acceptance probability at the temperatures between the first and the
            last, shape (T - 1, N).
        step_sizes: step sizes at the same temperatures, shape (T - 1, N).
    """

    settings: AIS
    log_normalizers: Tensor
    monte_carlo_errors: Tensor
    acceptance: Tensor
    step_sizes: Tensor

    @property
    def temperatures(self) -> Tensor:
        """The temperatures b, shape (T + 1,)."""
        return self.settings.temperatures

    @property
    def by_data_point(self) -> list[Tensor]:
        """All fields but the settings, with one row for each data point."""
        seen = (self.log_normalizers, self.monte_carlo_errors, self.acceptance, self.step_sizes)
        return [each.T for each in seen]

    @classmethod
    def of_data(cls, settings: AIS, by_data_point: Sequence[Tensor]) -> Annealing:
        """Build an object from the tensors of :attr:`by_data_point`."""
        return cls(settings, *(each.T for each in by_data_point))


class Annealer:
    """Runs the chains of annealed importance sampling, minibatch by minibatch.

    Args:
        ais: settings of the run.
        path: path from the start to p(x, z).
        watch: the programs by name, which the capture checks for changes.
        capture: replay the operations of a gradient as compiled code; see :func:`pyro_vae.fit`.
    """

    def __init__(
        self, ais: AIS, path: TemperedPath, *, watch: dict[str, Program], capture: Capture
    ):
        self._ais, self._path = ais, path
        self._watch, self._capture = watch, capture
        self._temperatures = ais.temperatures.tolist()
        self._captured: dict[tuple, Captured] = {}

    def step_sizes(
        self, batch: Sequence[Tensor], num_batches: int | None, status: Callable[[str], None]
    ) -> list[Tensor]:
        """Tune the step sizes at all temperatures between the first and the last, each ``(B,)``.

        The chains of the pilot run pass through the same temperatures. At each temperature, the
        acceptance of a data point's chains adjusts the logarithm of that data point's step size.
        """
        ais, inner = self._ais, self._temperatures[1:-1]
        size = len(batch[0])
        if ais.step_size is not None:
            return [batch[0].new_full((size,), ais.step_size, dtype=torch.float64) for _ in inner]
        state, evaluate, moving = self._begin(batch, ais.pilot, num_batches)
        first = math.log(0.5 / self._path.num_dimensions**0.25)
        log_step = batch[0].new_full((size,), first, dtype=torch.float64)
        sizes = []
        for number, b in enumerate(inner):
            status(f"pilot {number + 1}/{len(inner)}")
            repeats = -(-_PILOT_TRANSITIONS // len(inner)) + (number == 0) * _PILOT_WARMUP
            for repeat in range(repeats):
                gain = max(_PILOT_GAIN, 1 / (1 + repeat) ** 0.5) if number == 0 else _PILOT_GAIN
                state, acceptance = transition(
                    evaluate, state, b, log_step.exp(), ais.leapfrog_steps, moving
                )
                log_step = log_step + gain * (acceptance.mean(0) - ais.target_acceptance)
            sizes.append(log_step.exp())
        return sizes

    def forward(
        self,
        batch: Sequence[Tensor],
        step_sizes: Sequence[Tensor],
        num_batches: int | None,
        status: Callable[[str], None],
    ) -> tuple[WeightStream, Annealing]:
        """Move chains from the start to the posterior. Return the weights and the results.

        Args:
            batch: x and covariates.
            step_sizes: the result of :meth:`step_sizes`.
            num_batches: number of such minibatches still to come, None if unknown.
            status: called with the number of each temperature, as text.
        """
        ais, b = self._ais, self._temperatures
        state, evaluate, moving = self._begin(batch, ais.num_chains, num_batches)
        log_weights = torch.zeros_like(state.slope, dtype=torch.float64)
        means, errors = [log_weights[0]], [log_weights[0]]
        acceptances = []
        for t in range(1, len(b)):
            status(f"temperature {t}/{len(b) - 1}")
            log_weights = log_weights + (b[t] - b[t - 1]) * state.slope.double()
            weights = WeightStream(ais.num_chains)
            weights.add(log_weights)
            means.append(weights.log_mean())
            errors.append(weights.error())
            if t < len(b) - 1:
                state, acceptance = transition(
                    evaluate, state, b[t], step_sizes[t - 1], ais.leapfrog_steps, moving
                )
                acceptances.append(acceptance.mean(0))
        size = len(batch[0])
        seen = (means, errors, acceptances, step_sizes)
        return weights, Annealing(ais, *(_stack(s, size) for s in seen))

    def backward(
        self,
        batch: Sequence[Tensor],
        rows: Tensor,
        step_sizes: Sequence[Tensor],
        num_batches: int | None,
        status: Callable[[str], None],
    ) -> Tensor:
        """Move chains from the posterior to the start and return their log-weights, (C, B).

        Args:
            batch: x and covariates.
            rows: exact samples from the posterior, ``(C, B, D)``.
            step_sizes: the result of :meth:`step_sizes`.
            num_batches: number of such minibatches still to come, None if unknown.
            status: called with the number of each temperature, as text.
        """
        b = self._temperatures
        evaluate = self._evaluation(batch, len(rows), num_batches)
        moving = self._path.moving(*batch)
        state = evaluate(rows)
        log_weights = torch.zeros_like(state.slope, dtype=torch.float64)
        for t in range(len(b) - 1, 0, -1):
            status(f"backward, temperature {t}/{len(b) - 1}")
            log_weights = log_weights + (b[t] - b[t - 1]) * state.slope.double()
            if t > 1:
                state, _ = transition(
                    evaluate, state, b[t - 1], step_sizes[t - 2], self._ais.leapfrog_steps, moving
                )
        return log_weights

    def _begin(
        self, batch: Sequence[Tensor], num_chains: int, num_batches: int | None
    ) -> tuple[State, Callable[[Tensor], State], Tensor | None]:
        evaluate = self._evaluation(batch, num_chains, num_batches)
        rows = self._path.draw(num_chains, *batch)
        return evaluate(rows), evaluate, self._path.moving(*batch)

    def _evaluation(
        self, batch: Sequence[Tensor], num_chains: int, num_batches: int | None
    ) -> Callable[[Tensor], State]:
        """Return a function that evaluates the path for all chains, captured once per shape."""
        shape = (num_chains, *(column.shape for column in batch))
        if shape not in self._captured:
            captured = Captured(
                self._path.evaluate,
                watch=self._watch,
                name="a gradient of AIS",
                capture=self._capture,
            )
            steps = self._ais.leapfrog_steps * len(self._temperatures)
            captured.calls_left = num_batches and num_batches * steps
            self._captured[shape] = captured
        captured = self._captured[shape]
        captured.recheck()

        def evaluate(rows: Tensor) -> State:
            # The next call may overwrite the outputs of a capture.
            return State(rows, *(part.clone() for part in captured(rows.contiguous(), *batch)))

        return evaluate


def _stack(parts: Sequence[Tensor], size: int) -> Tensor:
    if not parts:
        return torch.zeros(0, size, dtype=torch.float64)
    return torch.stack([part.double().cpu() for part in parts])
