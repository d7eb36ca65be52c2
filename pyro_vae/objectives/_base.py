"""What an objective is: a reduction of :class:`~pyro_vae.Terms` to one scalar loss.

Every objective is a :class:`pyro.infer.ELBO`, so it serves in ``pyro.infer.SVI(..., loss=...)`` as
well as in :func:`pyro_vae.fit`. A bound is maximised and a loss minimised; both are in nats.
"""

from __future__ import annotations

import contextlib
import copy
from abc import abstractmethod
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import pyro.infer
import torch
from torch import Tensor

from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.terms import Terms, find_plate_nesting, terms, weighted
from pyro_vae._utils.checks import positive_integer, truth_value
from pyro_vae.objectives._loss_module import LossModule
from pyro_vae.objectives._schedules import LAST_STEP, Constant, Schedule, schedules_in

# Not an attribute of the objective: a captured step watches those.
_counting: ContextVar[bool] = ContextVar("counting", default=True)


class Objective(pyro.infer.ELBO):
    """A lower bound on the evidence, to be maximised.

    A subclass states its equation in :meth:`bound`, one value for each datum; the base class sums
    over the data, scales by N/B where the plate ``"data"`` subsamples, and adds :meth:`shared`,
    the part that belongs to no datum. That is all a new objective needs. The loss that a guide
    adds by ``pyro.factor`` or an observed auxiliary site is added to that of any objective.

    One whose gradient is not that of its value sets ``hold_samples``. Its terms then depend on the
    parameters directly, and not through the samples; it states the gradient by :func:`gradient`.

    Args:
        num_particles: K, samples of z for each datum and gradient step.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Attributes:
        hold_samples: whether the terms are taken at samples held fixed.
        takes_baselines: whether it uses the baselines that sites of the guide ask for by
            ``infer={"baseline": ...}``; others refuse them.
        step: how many steps of training the objective has led; schedules are functions of it.
            Each loss that is taken while gradients are enabled counts as one. A second fit goes on
            counting: give it an objective of its own to begin anew.
        averages: decaying averages, by guide site, of signals whose score has such a baseline. They
            change with each gradient that is taken.

    Raises:
        ValueError: ``num_particles`` is less than one.
    """

    hold_samples = False
    takes_baselines = False

    def __init__(self, num_particles: int = 1, *, vectorize_particles: bool = True):
        num_particles = positive_integer("num_particles", num_particles)
        vectorize_particles = truth_value("vectorize_particles", vectorize_particles)
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)
        self.step = torch.zeros(())
        self.averages: dict[str, Tensor] = {}
        self._layout_of: tuple[Program, Program, dict[str, Any]] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_particles={self.num_particles})"

    def __call__(self, model: Program, guide: Program) -> LossModule:
        """Return a torch module that gives the loss of the pair when it is called with data."""
        return LossModule(model, guide, self)

    @abstractmethod
    def bound(self, terms: Terms) -> Tensor:
        """Reduce the terms to the bound of each datum, shape (B,), in nats."""

    def shared(self, terms: Terms) -> Tensor | float:
        """Return what the bound gains from global sites, a scalar; refuses them by default."""
        terms.require_independent_data(type(self).__name__)
        return 0.0

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        r"""Return the loss, minus the bound summed over the batch, to be differentiated.

        Args:
            model: program of :math:`p(x, z)`.
            guide: program of :math:`q(z|x)`.
            *args: the minibatch and any covariates.
            **kwargs: keyword arguments of both programs.

        While gradients are enabled, each call counts as a step of training. So schedules advance
        in every way to train: by :func:`pyro_vae.fit`, by Pyro's ``SVI``, and by
        ``loss_fn = objective(model, guide)`` with ``loss_fn(x).backward()``.

        Returns:
            A scalar tensor, in nats.

        Raises:
            ValueError: the pair breaks the contract, or has a site the objective cannot take.
        """
        with self.not_counting():  # of objectives that a subclass calls inside
            t = terms(
                model,
                guide,
                *args,
                num_particles=self.num_particles,
                vectorize_particles=self.vectorize_particles,
                hold_samples=self.hold_samples,
                **self._layout(model, guide, args, kwargs),
                **kwargs,
            )
            if t.enumerates:
                layout = {"plate_nesting": t.plate_nesting, "enumerates": True}
                self._layout_of = (model, guide, layout)
            if not self.takes_baselines:
                t.require_no_baselines(type(self).__name__)
            shared = self.shared(t)
            loss = -(t.scale * self.bound(t).sum() + shared) + t.loss_of_guide()
        if torch.is_grad_enabled() and _counting.get():
            for each in self._with_inner():
                each.step = each.step + 1  # not in place: the loss is yet to be differentiated
        return loss

    @torch.no_grad()
    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the loss as a number, in nats; see :meth:`differentiable_loss`."""
        return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Accumulate the gradient of the loss and return the loss, detached and on its device."""
        with self.not_counting():
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        self.advance()
        return loss.detach()

    def to(self, device: torch.device) -> None:
        """Move what the objective remembers to a device; ``fit`` does, for captured steps."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                value = value.clone() if value.is_inference() else value
                setattr(self, name, value.to(device))
            for each in _objectives_in(value):
                each.to(device)
        self.averages = {name: value.to(device) for name, value in self.averages.items()}

    @staticmethod
    @contextlib.contextmanager
    def not_counting() -> Iterator[None]:
        """Take losses inside the block without counting them as steps of training."""
        token = _counting.set(False)
        try:
            yield
        finally:
            _counting.reset(token)

    def advance(self) -> None:
        """Count a step of training, in place; ``fit`` and ``loss_and_grads`` do."""
        for each in self._with_inner():
            each.step.add_(1)

    @property
    def has_schedules(self) -> bool:
        """Whether a weight of the objective changes with the number of steps."""
        return any(_has_schedules(value) for value in vars(self).values())

    def with_last_values(self) -> Objective:
        """Return the objective with each schedule at its last value, and the counter at its end.

        Losses of different times of a run can be compared under it alone: ``fit`` takes it for
        validation.

        Raises:
            ValueError: a schedule has no last value.
        """
        found = copy.copy(self)
        for name, value in vars(self).items():
            setattr(found, name, _at_last(value))
        found.step = torch.full_like(self.step, LAST_STEP)
        return found

    def has_settled(self) -> bool:
        """Tell whether each schedule has reached its last value; patience counts from then on."""
        return all(
            schedule.has_settled(float(each.step))
            for each in self._with_inner()
            for value in vars(each).values()
            for schedule in schedules_in(value)
        )

    def check_num_data(self, num_data: int) -> None:
        """Refuse data of which the objective was told otherwise; ``fit`` calls it.

        Args:
            num_data: how many rows the training data have.

        Raises:
            ValueError: the objective was told of fewer.
        """

    def _with_inner(self) -> Iterator[Objective]:
        """Yield the objective, and those that it holds."""
        yield self
        for value in vars(self).values():
            for each in _objectives_in(value):
                yield from each._with_inner()

    def less_baselines(self, bound: Tensor, terms: Terms, signal: Tensor) -> Tensor:
        """Return a bound whose score function gradient is less the baselines of the guide's sites.

        The averages among them move on with each gradient, and stay as they are in evaluation.

        Args:
            bound: shape (B,).
            terms: that it is of.
            signal: what weights the score of each site, shape (K, B).
        """
        if not terms.baselines:
            return bound
        signal, before = signal.detach(), {}
        for name, baseline in terms.baselines.items():
            if baseline.decay is not None:
                average = self.averages.setdefault(name, signal.new_zeros((), dtype=torch.float64))
                before[name] = average.clone()
                if torch.is_grad_enabled():
                    average.lerp_(signal.mean().to(average), 1 - baseline.decay)
        return bound + terms.less_baselines(signal, before)

    def _get_trace(self, model, guide, args, kwargs):
        raise TypeError(f"{type(self).__name__} reduces pyro_vae.terms; it takes no single trace")

    def _layout(self, model, guide, args, kwargs) -> dict[str, Any]:
        """Find out once for a pair: unlike Pyro's, an objective may meet many pairs."""
        if self._layout_of is not None and self._layout_of[:2] == (model, guide):
            return self._layout_of[2]
        if self.num_particles == 1 or not self.vectorize_particles:
            return {}
        layout = {"plate_nesting": find_plate_nesting(model, guide, *args, **kwargs)}
        self._layout_of = (model, guide, layout)
        return layout


def _objectives_in(value: Any) -> Iterator[Objective]:
    """Yield the objectives that a value is or holds."""
    if isinstance(value, Objective):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _objectives_in(each)


def _has_schedules(value: Any) -> bool:
    inner = any(each.has_schedules for each in _objectives_in(value))
    return inner or any(schedules_in(value))


def _at_last(value: Any) -> Any:
    """Return an attribute of an objective with what it holds of schedules at their last values."""
    if not _has_schedules(value):
        return value
    if isinstance(value, Objective):
        return value.with_last_values()
    if isinstance(value, Schedule):
        return Constant(value.last_value())
    if isinstance(value, dict):
        return {name: _at_last(each) for name, each in value.items()}
    parts = [_at_last(each) for each in value]
    if hasattr(value, "_fields"):  # a named tuple
        return type(value)(*parts)
    return type(value)(parts)


def gradient(
    terms: Terms,
    *,
    joint: Tensor | None = None,
    guide: Tensor | None = None,
    path: Tensor | None = None,
) -> Tensor:
    r"""Return zeros whose gradient is one of all that the estimators differ by: three weights.

    .. math::
        \sum_k a_k \nabla_\theta \log p(x, z_k) - b_k \nabla_\phi \log q(z_k|x)
        + c_k \frac{\partial \log w_k}{\partial z_k} \nabla_\phi z_k

    With a = b = c = 1/K this is the reparameterised gradient of the ELBO; with the normalised
    weights, that of the IWAE.

    Args:
        terms: taken with ``hold_samples``.
        joint: a, shape (K, B).
        guide: b.
        path: c.

    Returns:
        Shape (B,).

    Raises:
        ValueError: the terms were taken otherwise.
    """
    terms.require_held_samples("objectives.gradient")
    total = torch.zeros_like(terms.log_weight[0])
    if joint is not None:
        total = total + _zero(weighted(_without_denormals(joint), terms.log_joint))
    if guide is not None:
        total = total - _zero(weighted(_without_denormals(guide), terms.log_guide))
    if path is not None:
        total = total + terms.path(_without_denormals(path))
    return total


def _without_denormals(weights: Tensor) -> Tensor:
    """Detach weights, and make those zero that would send denormal numbers back, which are slow."""
    weights = weights.detach()
    size = weights.abs()
    return torch.where(size < 1e-21 * size.amax(0), 0.0, weights)


def _zero(values: Tensor) -> Tensor:
    return (values - values.detach()).sum(0)
