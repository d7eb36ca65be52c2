"""The base class of objectives: each reduces :class:`~pyro_vae.Terms` to one scalar loss.

Every objective is a :class:`pyro.infer.ELBO`. So it works in ``pyro.infer.SVI(..., loss=...)`` and
in :func:`pyro_vae.fit`. A bound is maximized and a loss minimized; both are in nats.
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
from pyro_vae._programs.particles import particle_options
from pyro_vae._programs.terms import Terms, terms, weighted
from pyro_vae._programs.trial_runs import OUT_OF_MEMORY
from pyro_vae._utils.checks import positive_integer, truth_value
from pyro_vae._utils.modules import modules
from pyro_vae.objectives._loss_module import LossModule
from pyro_vae.objectives._schedules import LAST_STEP, Constant, Schedule, schedules_in

# Not an attribute of the objective, because a captured step watches the attributes.
_counting: ContextVar[bool] = ContextVar("counting", default=True)
_found: ContextVar[list[Terms] | None] = ContextVar("found", default=None)


class Objective(pyro.infer.ELBO):
    """A lower bound on the evidence, to be maximized.

    A new objective is a subclass that computes :meth:`bound`, one value per data point. The base
    class sums it over the data and multiplies by N/B if the plate ``"data"`` subsamples. Then it
    adds :meth:`shared`, the part that does not belong to single data points. A guide can add a loss
    by ``pyro.factor`` or an observed auxiliary site. Every objective includes that loss.

    Set ``hold_samples`` if the gradient is not the derivative of the value. The terms then depend
    on the parameters directly, and not through the samples. Compute the gradient by
    :func:`gradient`.

    Args:
        num_particles: K, samples of z per data point and gradient step.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Attributes:
        hold_samples: whether the terms are computed at fixed samples.
        takes_baselines: whether it uses the baselines of guide sites,
            ``infer={"baseline": ...}``; other objectives reject them.
        step: number of training steps so far; schedules are functions of it. Each loss computed
            with gradients enabled counts as one step. A second fit continues the count. Create a
            new objective to restart it.
        averages: decaying averages of the signal, by guide site, for baselines that decay. They
            change with each gradient.

    Raises:
        ValueError: ``num_particles`` is less than one.
    """

    hold_samples = False
    takes_baselines = False

    def __init__(self, num_particles: int = 1, *, vectorize_particles: bool | None = None):
        num_particles = positive_integer("num_particles", num_particles)
        if vectorize_particles is not None:
            vectorize_particles = truth_value("vectorize_particles", vectorize_particles)
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)
        self.step = torch.zeros(())
        self.averages: dict[str, Tensor] = {}
        self._layouts: _Layouts | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_particles={self.num_particles})"

    def __call__(self, model: Program, guide: Program) -> LossModule:
        """Return a torch module that computes the loss of model and guide on a minibatch."""
        return LossModule(model, guide, self)

    @abstractmethod
    def bound(self, terms: Terms) -> Tensor:
        """Reduce the terms to the bound of each data point, shape (B,), in nats."""

    def shared(self, terms: Terms) -> Tensor | float:
        """Return the contribution of global sites, a scalar. By default, raise if there are any."""
        terms.require_independent_data(type(self).__name__)
        return 0.0

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        r"""Return the differentiable loss, minus the bound summed over the batch.

        Args:
            model: program of :math:`p(x, z)`.
            guide: program of :math:`q(z|x)`.
            *args: the minibatch and any covariates.
            **kwargs: keyword arguments of both programs.

        While gradients are enabled, each call counts as a training step. So schedules advance
        in :func:`pyro_vae.fit`, in Pyro's ``SVI``, and in a plain PyTorch loop with
        ``loss_fn = objective(model, guide)`` and ``loss_fn(x).backward()``.

        Returns:
            A scalar tensor, in nats.

        Raises:
            ValueError: Model or guide breaks the contract, or a site is not supported.
        """
        with self.not_counting():  # a subclass may call other objectives inside
            t = self._terms(model, guide, args, kwargs)
            if (found := _found.get()) is not None:
                found.append(t)
            if not self.takes_baselines:
                t.require_no_baselines(type(self).__name__)
            shared = self.shared(t)
            loss = -(t.scale * self.bound(t).sum() + shared) + t.loss_of_guide()
            loss = loss + t.scale * self.loss_of_data(guide, *args)
        if torch.is_grad_enabled() and _counting.get():
            for each in self._with_inner():
                each.step = each.step + 1  # not in place: backward comes later
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
        """Move the state of the objective to a device. ``fit`` calls it for captured steps."""
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
        """Compute losses inside the block without counting them as training steps."""
        token = _counting.set(False)
        try:
            yield
        finally:
            _counting.reset(token)

    def advance(self) -> None:
        """Count a training step, in place. ``fit`` and ``loss_and_grads`` call it."""
        for each in self._with_inner():
            each.step.add_(1)

    @property
    def has_schedules(self) -> bool:
        """Whether a weight of the objective changes with the step."""
        return any(_has_schedules(value) for value in vars(self).values())

    def with_last_values(self) -> Objective:
        """Return a copy of the objective with each schedule at its last value.

        Its step counter is at the end. ``fit`` uses the copy for validation, because only losses
        with equal weights can be compared across a run.

        Raises:
            ValueError: A schedule has no last value.
        """
        found = copy.copy(self)
        for name, value in vars(self).items():
            setattr(found, name, _at_last(value))
        found.step = torch.full_like(self.step, LAST_STEP)
        return found

    def has_settled(self) -> bool:
        """Return whether every schedule has reached its last value; patience counts from then."""
        return all(
            schedule.has_settled(float(each.step))
            for each in self._with_inner()
            for value in vars(each).values()
            for schedule in schedules_in(value)
        )

    def check_num_data(self, num_data: int) -> None:
        """Raise ValueError if the objective was built for fewer rows; ``fit`` calls it.

        Args:
            num_data: number of rows of the training data.

        Raises:
            ValueError: The objective was built with a smaller ``num_data``.
        """

    def _with_inner(self) -> Iterator[Objective]:
        """Yield the objective and the objectives in its attributes."""
        yield self
        for value in vars(self).values():
            for each in _objectives_in(value):
                yield from each._with_inner()

    def loss_of_data(self, guide: Program, *args: Any) -> Tensor | float:
        """Return a loss that is not a function of the terms, summed over the minibatch."""
        return 0.0

    def less_baselines(self, bound: Tensor, terms: Terms, signal: Tensor) -> Tensor:
        """Return the bound with the guide's baselines subtracted in its score function gradient.

        The decaying averages are updated while gradients are enabled, and not in evaluation.

        Args:
            bound: shape (B,).
            terms: the terms of the bound.
            signal: weight of the score of each site, shape (K, B).
        """
        if not terms.baselines:
            return bound
        signal, before = torch.where(signal.isinf(), 0.0, signal).detach(), {}
        for name, baseline in terms.baselines.items():
            if baseline.decay is not None:
                average = self.averages.setdefault(name, signal.new_zeros((), dtype=torch.float64))
                before[name] = average.clone()
                if torch.is_grad_enabled():
                    average.lerp_(signal.mean().to(average), 1 - baseline.decay)
        return bound + terms.less_baselines(signal, before)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_layouts": None}  # they refer to the last pair

    def _get_trace(self, model, guide, args, kwargs):
        raise TypeError(f"{type(self).__name__} works on pyro_vae.terms, not on a single trace")

    def _terms(self, model, guide, args, kwargs) -> Terms:
        """Return the terms of a run, with a layout that an earlier run has found if it fits.

        It does not fit if the programs open deeper plates for other arguments, or for other values.
        """
        layouts = self._layouts
        same = layouts is not None and layouts.pair == (model, guide)
        options = {"num_particles": self.num_particles, "hold_samples": self.hold_samples}
        if same and (layout := layouts.get()) is not None:
            try:
                return terms(model, guide, *args, **options, **layout, **kwargs)
            except OUT_OF_MEMORY:
                raise
            except (IndexError, RuntimeError, ValueError):  # of the wrong dimensions, or any other
                layouts.forget()
        layout = self._layout(model, guide, args, kwargs)
        t = terms(model, guide, *args, **options, **layout, **kwargs)
        if t.enumerates:
            layout = layout | {"plate_nesting": t.plate_nesting, "enumerates": True}
            self._layouts_of(model, guide).keep(layout)
        return t

    def _layout(self, model, guide, args, kwargs) -> dict[str, Any]:
        """Return how to run particles, and keep it for the pair in the modes of its modules."""
        if self.num_particles == 1 or self.vectorize_particles is False:
            return {"vectorize_particles": self.vectorize_particles}
        layout = particle_options(model, guide, args, kwargs, self.vectorize_particles)
        self._layouts_of(model, guide).keep(layout)
        return layout

    def _layouts_of(self, model: Program, guide: Program) -> _Layouts:
        if self._layouts is None or self._layouts.pair != (model, guide):
            self._layouts = _Layouts(model, guide)
        return self._layouts


@contextlib.contextmanager
def terms_of_losses() -> Iterator[list[Terms]]:
    """Collect in a list the terms of each loss that an objective computes inside the block."""
    found: list[Terms] = []
    token = _found.set(found)
    try:
        yield found
    finally:
        _found.reset(token)


class _Layouts:
    """How to run the particles of a pair, by the modes of its modules.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
    """

    def __init__(self, model: Program, guide: Program):
        self.pair = (model, guide)
        self._modules = modules(model, guide)
        self._by_modes: dict[tuple[bool, ...], dict[str, Any]] = {}

    def get(self) -> dict[str, Any] | None:
        """Return the layout for the present modes, or None."""
        return self._by_modes.get(self._modes())

    def keep(self, layout: dict[str, Any]) -> None:
        """Keep a layout for the present modes."""
        self._by_modes[self._modes()] = layout

    def forget(self) -> None:
        """Forget the layout for the present modes."""
        self._by_modes.pop(self._modes(), None)

    def _modes(self) -> tuple[bool, ...]:
        return tuple(module.training for module in self._modules)


def _objectives_in(value: Any) -> Iterator[Objective]:
    """Yield the objectives in a value, itself included."""
    if isinstance(value, Objective):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _objectives_in(each)


def _has_schedules(value: Any) -> bool:
    inner = any(each.has_schedules for each in _objectives_in(value))
    return inner or any(schedules_in(value))


def _at_last(value: Any) -> Any:
    """Return an attribute of an objective with its schedules at their last values."""
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
    r"""Return zeros with the gradient below, given by three weights.

    .. math::
        \sum_k a_k \nabla_\theta \log p(x, z_k) - b_k \nabla_\phi \log q(z_k|x)
        + c_k \frac{\partial \log w_k}{\partial z_k} \nabla_\phi z_k

    With a = b = c = 1/K this is the reparameterized gradient of the ELBO. With the normalized
    importance weights, it is the gradient of the IWAE.

    Args:
        terms: computed with ``hold_samples=True``.
        joint: a, shape (K, B).
        guide: b.
        path: c.

    Returns:
        Shape (B,).

    Raises:
        ValueError: The terms were computed without ``hold_samples``.
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
    """Detach weights and zero the tiny ones, whose denormal gradients would be slow."""
    weights = weights.detach()
    size = weights.abs()
    return torch.where(size < 1e-21 * size.amax(0), 0.0, weights)


def _zero(values: Tensor) -> Tensor:
    values = torch.where(values.detach().isinf(), 0.0, values)
    return (values - values.detach()).sum(0)
