"""How noisy an objective's gradient is: which of them suits a problem, before a long run."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from rich.progress import Progress
from torch import Tensor

from pyro_vae._programs.pair_trace import PairTrace, Program
from pyro_vae._programs.parameters import (
    device_of,
    evaluation_mode,
    parameter_store,
    parameters_of,
    require_programs,
    require_trainable_tensors,
)
from pyro_vae._utils.checks import check_call, positive_integer
from pyro_vae._utils.extras import require
from pyro_vae._utils.modules import modules, remember_unnamed
from pyro_vae._utils.progress import task
from pyro_vae._utils.random import seeded
from pyro_vae.datasets._minibatches import as_tensor

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PROGRAMS = ("model", "guide")


@dataclass(frozen=True)
class Moments:
    """Of one objective's gradient per datum, all parameters of a program in one row.

    Args:
        mean: over the repeats, shape (P,).
        variance: of one gradient, shape (P,).
        repeats: R.
    """

    mean: Tensor
    variance: Tensor
    repeats: int

    @property
    def signal_to_noise(self) -> float:
        r""":math:`|\mathbb{E}\,g_p| / \mathrm{sd}(g_p)`, averaged over the parameters that vary.

        Rainforth et al. (2018). The noise of the estimated mean adds some
        :math:`\sqrt{2 / \pi R}` where there is no signal.
        """
        varies = self.variance > 0
        if not varies.any():
            return math.inf if self.mean.any() else math.nan
        return (self.mean[varies].abs() / self.variance[varies].sqrt()).mean().item()

    def distance(self, other: Moments) -> tuple[float, float]:
        """Estimate the norm of the difference of two means, and what noise alone would make it.

        The square of the first is unbiased, less what noise adds; where that is negative, zero.
        """
        noise = (self.variance / self.repeats + other.variance / other.repeats).sum().item()
        square = (self.mean - other.mean).square().sum().item()
        return math.sqrt(max(0.0, square - noise)), math.sqrt(noise)


@dataclass(frozen=True)
class GradientNoise:
    """The gradients of several objectives on one minibatch, taken many times.

    Args:
        moments: by objective, then of ``"model"`` and of ``"guide"``.
        reference: likewise of the objective that biases are told against; None without one.
    """

    moments: dict[str, dict[str, Moments]]
    reference: dict[str, Moments] | None

    @property
    def table(self) -> pd.DataFrame:
        """A row for each objective and program, in nats per datum and unit of the parameters.

        ``norm`` of the mean gradient, ``standard_deviation`` (of the whole gradient: the root of
        the sum of variances), ``signal_to_noise``; with a reference, ``bias``, the norm of the
        difference of the means, and ``bias_noise``, what the repeats would make of no bias.
        """
        import pandas as pd

        rows = []
        for name, by_program in self.moments.items():
            for program, moments in by_program.items():
                row = {
                    "objective": name,
                    "program": program,
                    "norm": moments.mean.norm().item(),
                    "standard_deviation": moments.variance.sum().sqrt().item(),
                    "signal_to_noise": moments.signal_to_noise,
                }
                if self.reference is not None:
                    bias, noise = moments.distance(self.reference[program])
                    row |= {"bias": bias, "bias_noise": noise}
                rows.append(row)
        return pd.DataFrame(rows).set_index(["objective", "program"])

    def __str__(self) -> str:
        return self.table.to_string(float_format="{:.3g}".format)

    def plot(self) -> Figure:
        """Draw the signal-to-noise ratios, those of the model beside those of the guide.

        Raises:
            ImportError: The extra ``report`` is not installed.
        """
        figure = require("matplotlib.figure", "report", "A plot").Figure(
            figsize=(8, 1 + 0.4 * len(self.moments)), layout="constrained"
        )
        axes = figure.subplots(1, 2, sharey=True)
        names = [*self.moments][::-1]
        for each, program in zip(axes, PROGRAMS, strict=True):
            ratios = [self.moments[name].get(program) for name in names]
            widths = [math.nan if r is None else r.signal_to_noise for r in ratios]
            each.barh(range(len(names)), widths, color="#4477aa")
            each.set(title=program, xlabel="signal-to-noise ratio of the gradient")
        axes[0].set_yticks(range(len(names)), names)
        return figure


@torch.inference_mode(False)
@torch.enable_grad()
def gradient_noise(
    model: Program,
    guide: Program,
    x: Tensor | Sequence[Tensor],
    objectives: Mapping[str, pyro.infer.ELBO] | Sequence[pyro.infer.ELBO],
    *,
    repeats: int = 100,
    reference: pyro.infer.ELBO | None = None,
    seed: int | None = None,
    progress: bool | Progress = False,
    description: str = "gradient noise",
) -> GradientNoise:
    r"""Take each objective's gradient on one minibatch many times, and compare their moments.

    The pair stays as it is. Gradients are of the bound per datum, as :func:`pyro_vae.fit` ascends
    it, by the parameters of model and guide apart; a parameter that both use counts in both.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        x: the minibatch, ``(B, *event)``, or a tuple of it and covariates.
        objectives: by name, or a sequence, named as they are printed.
        repeats: R, how often each gradient is taken, at least 2.
        reference: the objective whose mean gradient biases are told against: the same bound with
            many particles and an estimator that is unbiased for it. For the model's gradient,
            ``IWAE`` with many particles is close to that of log p(x).
        seed: fixes the draws and leaves the process's random numbers as they were.
        progress: show a bar; or a rich Progress to add one to.
        description: text before the bar.

    Returns:
        The :class:`GradientNoise`.

    Raises:
        ValueError: no objectives, two of one name, fewer than two repeats; a pair or a site that
            an objective refuses; a pair without parameters, or made under
            ``torch.inference_mode``.
        TypeError: an objective is no ``pyro.infer.ELBO``.

    Example:
        >>> import torch, pyro_vae as pv
        >>> data = pv.datasets.load("digits")
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [16], 64)),
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(64, [16]))
        >>> objectives = [pv.objectives.ELBO(), pv.objectives.ScoreFunction()]
        >>> noise = pv.gradient_noise(model, guide, data.train[:20], objectives, seed=0)
        >>> ratios = noise.table.signal_to_noise
        >>> first, second = map(str, objectives)
        >>> bool(ratios[first, "guide"] > 5 * ratios[second, "guide"])  # the noise of scores
        True
    """
    check_call(gradient_noise, locals())
    repeats = positive_integer("repeats", repeats, minimum=2)  # one has no variance
    require_programs(model, guide)
    require_trainable_tensors(model, guide)
    named = _named(objectives)
    taken = named if reference is None else {**named, **_named({None: reference}, "reference")}
    columns = x if isinstance(x, (tuple, list)) else (x,)
    device = device_of(model, guide)
    batch = tuple(as_tensor(column, "x", finite=False).to(device) for column in columns)
    with contextlib.ExitStack() as stack:
        stack.enter_context(seeded(seed))
        stack.enter_context(parameter_store(model, guide))
        with evaluation_mode(model, guide), remember_unnamed(model, guide):
            trace = PairTrace(model, guide, batch)
        stack.enter_context(_as_before(model, guide, taken))
        count = trace.scale * len(batch[0])
        parameters = parameters_of(model, guide, trace)
        parameters = {program: found for program, found in parameters.items() if found}
        if not parameters:
            raise ValueError("model and guide have no parameters that require a gradient")

        def bound(objective: pyro.infer.ELBO) -> Tensor:
            # At the weights of the moment: these losses are no steps of training.
            with getattr(objective, "not_counting", contextlib.nullcontext)():
                return -objective.differentiable_loss(model, guide, *batch) / count

        with task(progress, description, len(taken) * repeats) as advance:
            moments = {
                name: _moments(functools.partial(bound, objective), parameters, repeats, advance)
                for name, objective in taken.items()
            }
    return GradientNoise({name: moments[name] for name in named}, moments.get(None))


@contextlib.contextmanager
def _as_before(model: Program, guide: Program, objectives: Mapping) -> Iterator[None]:
    """Put back what runs change: buffers of modules, and what objectives remember."""
    tensors = [b for module in modules(model, guide) for b in module.buffers()]
    for objective in objectives.values():
        for name, value in vars(objective).items():
            if isinstance(value, Tensor) and value.is_inference():
                setattr(objective, name, value.clone())
        tensors += [value for value in vars(objective).values() if isinstance(value, Tensor)]
    saved = [tensor.clone() for tensor in tensors]
    averages = [(o, dict(o.averages)) for o in objectives.values() if hasattr(o, "averages")]
    try:
        for objective, before in averages:
            objective.averages = {name: value.clone() for name, value in before.items()}
        yield
    finally:
        for tensor, before in zip(tensors, saved, strict=True):
            tensor.copy_(before)
        for objective, before in averages:
            objective.averages = before


def _moments(
    bound: Callable[[], Tensor],
    parameters: dict[str, list[Tensor]],
    repeats: int,
    advance: Callable[[int], None],
) -> dict[str, Moments]:
    """Differentiate again and again; by Welford's update, so that no gradient is kept."""
    all_of_them = list(dict.fromkeys(p for found in parameters.values() for p in found))
    mean = [torch.zeros_like(p, dtype=torch.float64) for p in all_of_them]
    square = [torch.zeros_like(each) for each in mean]
    for number in range(1, repeats + 1):
        gradients = torch.autograd.grad(bound(), all_of_them, allow_unused=True)
        for i, g in enumerate(gradients):
            away = (0.0 if g is None else g.double()) - mean[i]
            mean[i] += away / number
            square[i] += away * away * ((number - 1) / number)
        advance(1)
    where = {id(p): i for i, p in enumerate(all_of_them)}

    def row(values: list[Tensor], found: list[Tensor]) -> Tensor:
        return torch.cat([values[where[id(p)]].flatten() for p in found]).cpu()

    return {
        program: Moments(row(mean, found), row(square, found) / (repeats - 1), repeats)
        for program, found in parameters.items()
    }


def _named(objectives: Any, argument: str = "objectives") -> dict[str, pyro.infer.ELBO]:
    if isinstance(objectives, pyro.infer.ELBO):
        objectives = [objectives]
    if not isinstance(objectives, Iterable) or isinstance(objectives, str | Tensor | np.ndarray):
        raise TypeError(f"objectives must be a list or a dict of them, got {objectives!r}")
    by_name = isinstance(objectives, Mapping)
    named = list(objectives.items()) if by_name else [(str(each), each) for each in objectives]
    if not named:
        raise ValueError("objectives must hold at least one, got none")
    for _, objective in named:
        known = isinstance(objective, pyro.infer.ELBO)
        if not known or not hasattr(objective, "differentiable_loss"):
            raise TypeError(
                f"{argument} must be of pyro.infer.ELBO, with a differentiable_loss, got "
                f"{objective!r}"
            )
    if len(dict(named)) < len(named):
        raise ValueError(
            f"two objectives have one name: {[name for name, _ in named]}. Pass a dict."
        )
    return dict(named)
