"""Measure the gradient noise of objectives, to choose an objective before a long fit."""

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

from pyro_vae._programs.data_plate import name_data_plate
from pyro_vae._programs.evaluation import evaluation_mode
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import (
    device_of,
    parameter_store,
    parameters_of,
    require_programs,
    require_trainable_tensors,
)
from pyro_vae._programs.validation import check_pair
from pyro_vae._utils.checks import check_call, positive_integer
from pyro_vae._utils.modules import modules, remember_unnamed
from pyro_vae._utils.progress import task
from pyro_vae._utils.random import seeded
from pyro_vae.datasets._minibatches import Minibatches

if TYPE_CHECKING:
    import pandas as pd

PROGRAMS = ("model", "guide")


@dataclass(frozen=True)
class Moments:
    """Moments of one objective's gradient, per data point, for all P parameters of a program.

    Args:
        mean: average over the repeats, shape (P,).
        variance: variance of a single gradient, shape (P,).
        repeats: R, the number of gradients.
    """

    mean: Tensor
    variance: Tensor
    repeats: int

    @property
    def signal_to_noise(self) -> float:
        r""":math:`|\mathbb{E}\,g_p| / \mathrm{sd}(g_p)`, averaged over the parameters that vary.

        See Rainforth et al. (2018). If the true gradient is zero, this ratio is about
        :math:`\sqrt{2 / \pi R}`, from the noise of the mean alone.
        """
        varies = self.variance > 0
        if not varies.any():
            return math.inf if self.mean.any() else math.nan
        return (self.mean[varies].abs() / self.variance[varies].sqrt()).mean().item()

    def distance(self, other: Moments) -> tuple[float, float]:
        """Estimate the distance of two means, and the distance due to noise alone.

        The expected square of the noise is subtracted from the squared distance. A negative
        difference counts as zero.
        """
        noise = (self.variance / self.repeats + other.variance / other.repeats).sum().item()
        square = (self.mean - other.mean).square().sum().item()
        return math.sqrt(max(0.0, square - noise)), math.sqrt(noise)


@dataclass(frozen=True)
class GradientNoise:
    """The moments of several objectives' gradients on one minibatch.

    :func:`pyro_vae.plots.gradient_noise` draws their signal-to-noise ratios.

    Args:
        moments: moments by objective, then by ``"model"`` and ``"guide"``.
        reference: moments of the reference objective by ``"model"`` and ``"guide"``. None without a
            reference.
    """

    moments: dict[str, dict[str, Moments]]
    reference: dict[str, Moments] | None

    @property
    def table(self) -> pd.DataFrame:
        """One row per objective and program, in nats per data point and unit of the parameters.

        The columns are

        - ``norm``, the norm of the mean gradient;
        - ``standard_deviation``, the square root of the sum of the variances;
        - ``signal_to_noise``, averaged over the parameters that vary (Rainforth et al. 2018);
        - ``bias``, the norm of the difference between the means of the objective and the reference;
        - ``bias_noise``, the expected size of ``bias`` if there is no bias.

        The last two need a reference.
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

    def __repr__(self) -> str:
        rows = self.table.to_string(float_format="{:.3g}".format)
        return f"gradients of the bound in nats per data point\n{rows}"


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
    plate: str | None = None,
    seed: int | None = None,
    progress: bool | Progress = False,
    description: str = "gradient noise",
) -> GradientNoise:
    r"""Compute each objective's gradient on one minibatch many times and compare the moments.

    The pair is not changed. The gradients are those of the bound per data point, as in
    :func:`pyro_vae.fit`. Model and guide have separate results. A parameter that both programs use
    counts in both.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        x: the minibatch, ``(B, *event)``, or a tuple of x and covariates.
        objectives: a dictionary by name, or a sequence, which uses the printed objectives as names.
        repeats: R, the number of gradients of each objective, at least 2.
        reference: the objective whose mean gradient is taken as the true one. Use the same bound
            with many particles and an unbiased gradient estimator. For the model, the gradient of
            ``IWAE`` with many particles is close to the gradient of log p(x).
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        seed: of the samples. The random numbers of the process are restored afterwards.
        progress: show a progress bar, or add one to a rich Progress.
        description: text before the bar.

    Returns:
        The :class:`GradientNoise`.

    Raises:
        ValueError: There are no objectives, two objectives have the same name, or ``repeats`` is
            below 2. Data are invalid, or the pair breaks a rule (docs/contract.md). An objective
            does not accept the pair or a site, or its bound depends on no parameter. The pair has
            no parameters, or was made under ``torch.inference_mode``.
        TypeError: An objective is not a ``pyro.infer.ELBO``.

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
    name_data_plate(plate, model, guide)
    repeats = positive_integer("repeats", repeats, minimum=2)  # one gradient has no variance
    require_programs(model, guide)
    require_trainable_tensors(model, guide)
    named = _named(objectives)
    taken = named if reference is None else {**named, **_named({None: reference}, "reference")}
    columns = tuple(x) if isinstance(x, list) else x
    batches = Minibatches(
        columns, 2**31, device=device_of(model, guide), name="x", programs=(model, guide)
    )
    batch = batches.first()
    with contextlib.ExitStack() as stack:
        stack.enter_context(seeded(seed))
        stack.enter_context(parameter_store(model, guide))
        with evaluation_mode(model, guide), remember_unnamed(model, guide):
            trace = check_pair(model, guide, batch, batches)
        stack.enter_context(_as_before(model, guide, taken))
        count = trace.scale * len(batch[0])
        parameters = parameters_of(model, guide, trace)
        parameters = {program: found for program, found in parameters.items() if found}
        if not parameters:
            raise ValueError("model and guide have no parameters that require a gradient")

        def bound(objective: pyro.infer.ELBO) -> Tensor:
            # With the current weights: these losses do not count as training steps.
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
    """Restore the buffers of modules and the state of objectives after the block."""
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
    """Compute the gradients and their moments by Welford's update, which keeps no gradient."""
    all_of_them = list(dict.fromkeys(p for found in parameters.values() for p in found))
    mean = [torch.zeros_like(p, dtype=torch.float64) for p in all_of_them]
    square = [torch.zeros_like(each) for each in mean]
    for number in range(1, repeats + 1):
        value = bound()
        if not value.requires_grad:
            raise ValueError(
                "the bound of this objective depends on no parameter of model and guide that "
                "requires a gradient. Pass another objective or pair"
            )
        gradients = torch.autograd.grad(value, all_of_them, allow_unused=True)
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
        raise TypeError(f"objectives must be a list or a dict of objectives, got {objectives!r}")
    by_name = isinstance(objectives, Mapping)
    named = list(objectives.items()) if by_name else [(str(each), each) for each in objectives]
    if not named:
        raise ValueError("objectives must contain at least one objective, got none")
    for _, objective in named:
        known = isinstance(objective, pyro.infer.ELBO)
        if not known or not hasattr(objective, "differentiable_loss"):
            raise TypeError(
                f"{argument} must be of type pyro.infer.ELBO, with a differentiable_loss, got "
                f"{objective!r}"
            )
    if len(dict(named)) < len(named):
        raise ValueError(
            f"objectives must have different names, got {[name for name, _ in named]}. Pass a dict "
            "of objectives by name."
        )
    return dict(named)
