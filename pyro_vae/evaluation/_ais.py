r"""Annealed importance sampling: the evidence by chains that walk from a start to the posterior."""

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
from pyro_vae._utils.checks import positive_integer, positive_number, real_number
from pyro_vae.evaluation._hamiltonian import transition
from pyro_vae.evaluation._tempered_path import Start, State, TemperedPath
from pyro_vae.evaluation._weights import WeightStream

_STEEPNESS = 4.0  # of the sigmoid schedule, between -4 and 4
_PILOT_TRANSITIONS = 100  # at the least, where temperatures are few
_PILOT_WARMUP = 30
_PILOT_GAIN = 0.25


@dataclass(frozen=True)
class AIS:
    r"""Annealed importance sampling (Neal 2001), for ``evidence(method=...)``.

    .. math::
        \log \hat p(x) = \log \frac1C \sum_{c=1}^C \prod_{t=1}^T
        \frac{p_{b_t}(z_{c,t-1})}{p_{b_{t-1}}(z_{c,t-1})}, \qquad
        p_b(z) \propto p_0(z)^{1-b} \, p(x, z)^b

    with :math:`z_{c,0} \sim p_0`, and :math:`z_{c,t}` by a step of Hamiltonian Monte Carlo from
    :math:`z_{c,t-1}` that leaves :math:`p_{b_t}` as it is. The average of the weights is p(x)
    without bias, whatever the number of temperatures and the step sizes, because these do not
    depend on the chains: they are tuned, for each datum and temperature, in a pilot run of other
    chains. Decoders were judged so by Wu et al. 2017.

    Args:
        num_chains: C.
        num_temperatures: T.
        start: :math:`p_0`, q(z|x) (``"guide"``) or p(z) (``"prior"``).
        leapfrog_steps: of a step.
        target_acceptance: what the pilot run tunes the step sizes to.
        pilot: how many chains that run has.
        step_size: of all data and temperatures, in place of the pilot run.
        schedule: of the temperatures: ``"sigmoid"`` (dense at both ends; Wu et al. 2017),
            ``"linear"``, or numbers that rise from 0 to 1, which then set T.

    Raises:
        ValueError: a number is out of its range, or a word unknown.
        TypeError: what should be a number is none.

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
        if self.start not in ("guide", "prior"):
            raise ValueError(f'start must be "guide" or "prior", got {self.start!r}')
        if positive_number("target_acceptance", self.target_acceptance) >= 1:
            raise ValueError(
                f"target_acceptance must lie between 0 and 1, got {self.target_acceptance}"
            )
        if self.step_size is not None:
            positive_number("step_size", self.step_size)
        if isinstance(self.schedule, str):
            if self.schedule not in ("sigmoid", "linear"):
                raise ValueError(
                    'schedule must be "sigmoid", "linear" or numbers that rise from 0 to 1, got '
                    f"{self.schedule!r}"
                )
            return
        schedule = self.schedule.tolist() if hasattr(self.schedule, "tolist") else self.schedule
        if not isinstance(schedule, Iterable):
            raise TypeError(
                'schedule must be "sigmoid", "linear" or numbers that rise from 0 to 1, got '
                f"{self.schedule!r}"
            )
        numbers = tuple(real_number("each number of schedule", b) for b in schedule)
        rising = all(a < b for a, b in pairwise(numbers))
        if len(numbers) < 2 or numbers[0] != 0 or numbers[-1] != 1 or not rising:
            raise ValueError(
                f"schedule must rise from 0 to 1, each number above the last, got {numbers}"
            )
        object.__setattr__(self, "schedule", numbers)
        object.__setattr__(self, "num_temperatures", len(numbers) - 1)

    @property
    def temperatures(self) -> Tensor:
        """From b_0 = 0 to b_T = 1, shape (T + 1,), float64."""
        if not isinstance(self.schedule, str):
            return torch.tensor(self.schedule, dtype=torch.float64)
        even = torch.linspace(0, 1, self.num_temperatures + 1, dtype=torch.float64)
        if self.schedule == "linear":
            return even
        bent = (_STEEPNESS * (2 * even - 1)).sigmoid()
        return (bent - bent[0]) / (bent[-1] - bent[0])


@dataclass(frozen=True)
class Annealing:
    r"""What annealed importance sampling saw on its way, float64 on the CPU.

    Args:
        settings: of it.
        log_normalizers: estimates of :math:`\log \int p_b(z) dz`, shape (T + 1, N); the first is
            zero, the last is log p(x).
        monte_carlo_errors: their standard errors, shape (T + 1, N).
        acceptance: average probability of acceptance at the temperatures between the first and
            the last, shape (T - 1, N).
        step_sizes: of these, shape (T - 1, N).
    """

    settings: AIS
    log_normalizers: Tensor
    monte_carlo_errors: Tensor
    acceptance: Tensor
    step_sizes: Tensor

    @property
    def temperatures(self) -> Tensor:
        """b, shape (T + 1,)."""
        return self.settings.temperatures

    @property
    def by_datum(self) -> list[Tensor]:
        """All but the settings, a row for each datum."""
        seen = (self.log_normalizers, self.monte_carlo_errors, self.acceptance, self.step_sizes)
        return [each.T for each in seen]

    @classmethod
    def of_data(cls, settings: AIS, by_datum: Sequence[Tensor]) -> Annealing:
        """Make it again of what :attr:`by_datum` gives."""
        return cls(settings, *(each.T for each in by_datum))


class Annealer:
    """Runs the chains of annealed importance sampling, minibatch after minibatch.

    Args:
        ais: its settings.
        path: from the start to p(x, z).
        watch: the programs, by name, for the capture.
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
        """Tune the step sizes at all temperatures between the ends, each ``(B,)``.

        The pilot's chains go the same way. At each temperature the logarithm of a datum's step
        size follows the acceptance that its chains see.
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
        """Walk from the start to the posterior; return the weights, and what was seen.

        Args:
            batch: x and covariates.
            step_sizes: as :meth:`step_sizes` gives them.
            num_batches: how many such minibatches are to come, None where that is not known.
            status: told the temperature.
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
        """Walk from the posterior to the start; return the log-weights of the way there, (C, B).

        Args:
            batch: x and covariates.
            rows: exact draws from the posterior, ``(C, B, D)``.
            step_sizes: as :meth:`step_sizes` gives them.
            num_batches: how many such minibatches are to come, None where that is not known.
            status: told the temperature.
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
        """Return what evaluates the path for so many chains; one capture for each shape."""
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
            # The next call may overwrite what a capture gives.
            return State(rows, *(part.clone() for part in captured(rows.contiguous(), *batch)))

        return evaluate


def _stack(parts: Sequence[Tensor], size: int) -> Tensor:
    if not parts:
        return torch.zeros(0, size, dtype=torch.float64)
    return torch.stack([part.double().cpu() for part in parts])
