"""The terms of every objective: per-datum log-densities of a model and a guide.

:func:`terms` runs a pair of Pyro programs and returns ``log p(x|z)``, ``log p(z)`` and
``log q(z|x)`` as tensors of shape (K, B): K particles for each of the B data points of a
minibatch. All objectives and nearly all estimators are short reductions of these tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae._programs import divergences, predictions
from pyro_vae._programs.agreement import is_delta
from pyro_vae._programs.ancestral import JointSample
from pyro_vae._programs.baselines import Baseline, baselines_of, less_baseline
from pyro_vae._programs.held_samples import path_adjoints
from pyro_vae._programs.pair_trace import PairTrace, Program
from pyro_vae._programs.sites import require_one_observation
from pyro_vae._utils.checks import positive_integer, require_callable, truth_value
from pyro_vae._utils.random import restored_generators


def terms(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 1,
    vectorize_particles: bool = True,
    plate_nesting: int | None = None,
    hold_samples: bool = False,
    enumerates: bool = False,
    **kwargs: Any,
) -> Terms:
    r"""Run ``guide(*args)``, then ``model(*args)`` on the same latents; take the log-densities.

    Args:
        model: program of :math:`p(x, z)`.
        guide: program of :math:`q(z|x)`.
        *args: what both programs are called with: a minibatch whose leading dimension is the
            batch, then any covariates.
        num_particles: K, the number of samples of z for each datum.
        vectorize_particles: draw the K particles in one run, under an outer plate whose dimension
            leads. ``False`` runs the programs K times, for programs that cannot take the extra
            dimension; the terms have the same law.
        plate_nesting: how many batch dimensions the programs use, the particles' apart; found by
            :func:`find_plate_nesting` when not given.
        hold_samples: let the terms depend on the parameters directly, and not through the
            reparameterised samples: what these carry, :meth:`Terms.path` gives.
        enumerates: whether some latent is known to ask for enumeration. If not, and one does, the
            programs are run once more.
        **kwargs: keyword arguments of both programs.

    Returns:
        The :class:`Terms` of the run, in nats.

    Raises:
        ValueError: no site stands in the plate ``"data"``; a latent site of the model is missing
            in the guide, or the other way round; the plates of the two disagree.

    Example:
        >>> import pyro, torch, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))  # the exact posterior
        >>> x = torch.tensor([0.5, -1.0])
        >>> t = pv.terms(model, guide, x, num_particles=3)
        >>> t.log_weight.shape
        torch.Size([3, 2])
        >>> log_evidence = dist.Normal(0.0, 2**0.5).log_prob(x)
        >>> torch.allclose(t.log_weight, log_evidence.expand(3, 2))
        True
    """
    require_callable("model", model)
    require_callable("guide", guide)
    num_particles = positive_integer("num_particles", num_particles)
    truth_value("vectorize_particles", vectorize_particles)
    truth_value("hold_samples", hold_samples)
    truth_value("enumerates", enumerates)
    if plate_nesting is not None:
        plate_nesting = positive_integer("plate_nesting", plate_nesting, minimum=0)
    if num_particles == 1 or not vectorize_particles:
        runs = [
            _run(
                model,
                guide,
                args,
                kwargs,
                plate_nesting=plate_nesting,
                hold_samples=hold_samples,
                enumerates=enumerates,
            )
            for _ in range(num_particles)
        ]
        return Terms(runs)
    if plate_nesting is None:
        plate_nesting = find_plate_nesting(model, guide, *args, **kwargs)
    trace = _run(
        model,
        guide,
        args,
        kwargs,
        num_particles=num_particles,
        plate_nesting=plate_nesting,
        hold_samples=hold_samples,
        enumerates=enumerates,
    )
    return Terms([trace])


def _run(model: Program, guide: Program, args: Any, kwargs: Any, **options: Any) -> PairTrace:
    """Run a pair; where that fails, look whether NaN in its arguments are the reason."""
    try:
        return PairTrace(model, guide, args, kwargs, **options)
    except ValueError as error:
        for number, column in enumerate(args):
            name = "x" if number == 0 else f"covariate {number} of x"
            if isinstance(column, Tensor) and not torch.isfinite(column).all():
                raise ValueError(
                    f"{name} has NaN or infinite values, with which the pair cannot run: {error}"
                ) from error
        raise


def find_plate_nesting(model: Program, guide: Program, *args: Any, **kwargs: Any) -> int:
    """Count the batch dimensions that the plates of both programs use, by running them.

    They are run once more with as many particles as no plate has data: particles that a program
    moved into the place of a plate of another size are found out.

    Raises:
        ValueError: the programs cannot take the particles' dimension.
    """
    with restored_generators(), torch.no_grad(), poutine.block():
        trace = _run(model, guide, args, kwargs)
        num_particles = next(k for k in itertools.count(2) if k not in trace.plate_sizes)
        try:
            PairTrace(
                model,
                guide,
                args,
                kwargs,
                num_particles=num_particles,
                plate_nesting=trace.plate_nesting,
            )
        except (RuntimeError, IndexError, ValueError) as error:
            raise ValueError(
                "model and guide run as they are, but not with a leading dimension of particles: "
                f"{str(error).rstrip('.')}. Let their networks take any leading dimensions, or "
                "pass vectorize_particles=False."
            ) from error
    return trace.plate_nesting


class Terms:
    r"""Per-datum log-densities of a pair, in nats: K particles for each of B data points.

    What belongs to a datum stands in the plate ``"data"``; the attributes named ``..._global``
    hold the rest, one value for each particle.

    Args:
        runs: where the particles come from, one run after another along the first dimension.
    """

    def __init__(self, runs: Sequence[PairTrace]):
        self._runs = runs
        self._first = runs[0]

    @cached_property
    def log_likelihood(self) -> Tensor:
        r""":math:`\log p(x_b|z_{kb})`, shape (K, B)."""
        return self._sum(lambda run: (f for f in run.model.values() if f.observed))

    @cached_property
    def log_prior(self) -> Tensor:
        r""":math:`\log p(z_{kb})`, shape (K, B)."""
        return self._sum(lambda run: (f for f in run.model.values() if not f.observed))

    @cached_property
    def log_guide(self) -> Tensor:
        r""":math:`\log q(z_{kb}|x_b)`, shape (K, B)."""
        return self._sum(lambda run: run.guide.values())

    @property
    def log_joint(self) -> Tensor:
        r""":math:`\log p(x_b, z_{kb})`, shape (K, B)."""
        return self.log_likelihood + self.log_prior

    @cached_property
    def log_weight(self) -> Tensor:
        r""":math:`\log w_{kb} = \log p(x_b, z_{kb}) - \log q(z_{kb}|x_b)`, shape (K, B)."""
        return self.log_likelihood + self.log_prior - self.log_guide

    @cached_property
    def kl(self) -> Tensor:
        r""":math:`\log q(z|x) - \log p(z)`, its expectation where it is known, shape (K, B).

        Site by site: :math:`\mathrm{KL}(q \| p)` in closed form where torch or Pyro knows it, the
        sampled difference elsewhere; and everywhere if the guide samples the latents in another
        order than the model, for then what depends on a site would be held fixed.
        """
        return torch.cat([divergences.kl(run, local=True) for run in self._runs])

    def kl_of_sites(self) -> dict[str, Tensor]:
        """Return :attr:`kl` by latent of the plate ``"data"``, each (K, B).

        Raises:
            ValueError: the guide or the model has one density for several of them.
        """
        return _concatenate([divergences.kl_of_sites(run) for run in self._runs])

    def kl_of_dimensions(self) -> dict[str, Tensor]:
        """Return :attr:`kl` by latent and by its numbers, ``(K, B, *inner plates, *event)``.

        Raises:
            ValueError: the dimensions are not independent under both programs, or masked, or
                scaled.
        """
        return _concatenate([divergences.kl_of_dimensions(run) for run in self._runs])

    def log_guide_of_pairs(self) -> Tensor:
        r"""Return :math:`\log q(z_{kbd}|x_c)`, dimension by dimension, shape (K, B, B, D).

        Raises:
            ValueError: there is more than one local latent, or its dimensions are not independent.
            TypeError: it is no Gaussian under the guide.
        """
        return torch.cat([divergences.log_guide_of_pairs(run) for run in self._runs])

    def path(self, weights: Tensor) -> Tensor:
        r"""Return zeros with the gradient that weighted log-weights send along the samples.

        .. math::
            \sum_k c_k \, \frac{\partial \log w_k}{\partial z_k} \,
            \frac{\partial z_k}{\partial\phi}

        The parameters inside :math:`\log w` are held fixed, those of the guide's density among
        them, whatever its distributions are. Needs terms taken with ``hold_samples``.

        Args:
            weights: c, without a gradient, shape (K, B).

        Returns:
            Shape (B,). The gradient belongs to the sum over the data, not to each of them.

        Raises:
            ValueError: the terms were taken otherwise.
        """
        self.require_held_samples("Terms.path")
        zeros = self.log_weight.new_zeros(self.log_weight.shape[1])
        target = weighted(weights.detach(), self.log_weight).sum()
        return zeros + self._along(target) / len(zeros)

    def _along(self, target: Tensor) -> Tensor | float:
        """Return zero, with the gradient of a scalar along the held samples."""
        samples = [pair for run in self._runs for pair in run.held_samples()]
        if not samples or not target.requires_grad or not torch.is_grad_enabled():
            return 0.0
        drawn, held = zip(*samples, strict=True)
        adjoints = path_adjoints(target, drawn, held)
        along = sum((a * z).sum() for a, z in zip(adjoints, drawn, strict=True) if a is not None)
        return along - along.detach() if isinstance(along, Tensor) else 0.0

    def loss_of_guide(self) -> Tensor | float:
        r"""Return the loss that the guide itself adds, averaged over the particles, a scalar.

        It is the sum of the log-factors of the guide's ``pyro.factor`` statements and observed
        auxiliary sites, such as a classifier's likelihood. They are no part of
        :math:`\log q(z|x)`: no log-weight and no KL contains them. In Pyro's ELBOs they enter the
        loss with a plus sign, as here.

        Its gradient is that of :math:`\mathbb{E}_q`: reparameterized, or by the score function
        where a site has no reparameterized sample.
        """
        if not self._first.guide_losses:
            return 0.0
        local = self._sum(lambda run: run.guide_losses)
        total = self.scale * local.mean(0).sum()
        shared = self._sum(lambda run: run.guide_losses, local=False)
        total = total + shared.mean()
        if self._first.holds_samples:
            total = total + self._along(total)
        if self.score is not None:
            score = self.score - self.score.detach()
            signal = self.scale * local.detach() + shared.detach().unsqueeze(1)
            total = total + (signal * score).mean(0).sum()
        return total

    @cached_property
    def log_likelihood_global(self) -> Tensor:
        """Log-density of the observations that all data share, shape (K,); zero if none."""
        return self._sum(lambda run: (f for f in run.model.values() if f.observed), local=False)

    @cached_property
    def log_weight_global(self) -> Tensor:
        """Log-weight of everything that all data share, shape (K,); zero if nothing."""
        log_joint = self._sum(lambda run: run.model.values(), local=False)
        return log_joint - self._sum(lambda run: run.guide.values(), local=False)

    @cached_property
    def kl_global(self) -> Tensor:
        """What :attr:`kl` is, for the latents that all data share, shape (K,); zero if none."""
        return torch.cat([divergences.kl(run, local=False) for run in self._runs])

    @cached_property
    def score(self) -> Tensor | None:
        """Log-density of the guide's sites without a reparameterised sample, shape (K, B).

        Its gradient is the score function: no scale belongs to it. None if every site is
        reparameterised.
        """
        if not self.not_reparameterized:
            return None
        return torch.cat([run.score() for run in self._runs])

    @cached_property
    def log_guide_of_score(self) -> Tensor:
        """The part of :attr:`log_guide` that belongs to the sites of :attr:`score`, (K, B)."""
        return self._sum(lambda run: (f for f in run.guide.values() if not f.reparameterized))

    @cached_property
    def baselines(self) -> dict[str, Baseline]:
        """Baselines of score functions that the guide asks for, by site.

        Raises:
            ValueError: a site has unknown options, or some that contradict each other.
            TypeError: an option is of another type than expected.
        """
        return baselines_of(self._first)

    def less_baselines(self, signal: Tensor, averages: Mapping[str, Tensor]) -> Tensor:
        r"""Return zeros whose gradient subtracts the baselines from a signal, and trains them.

        .. math::
            \frac1K \sum_k \sum_i -b_{ki} \nabla \log q_i(z_k|x) - \nabla (s_k - b_{ki})^2

        for the sites i that have a baseline b. The signal s is that which weights their score.

        Args:
            signal: s, shape (K, B).
            averages: of the signal in steps before, by site, for those that ask for one.

        Returns:
            Shape (B,).

        Raises:
            ValueError: a baseline is not of the batch shape of its site.
            TypeError: a baseline is no tensor.
        """
        rows = signal.split([run.num_particles for run in self._runs])
        found = [
            less_baseline(run, name, baseline, its_signal, averages.get(name))
            for run, its_signal in zip(self._runs, rows, strict=True)
            for name, baseline in baselines_of(run).items()
        ]
        return sum(part.sum(0) for part in found) / len(signal)

    @property
    def samples(self) -> dict[str, Tensor]:
        """Values of the latents of the plate ``"data"``, each ``(K, B, *inner plates, *event)``."""
        return _concatenate([run.samples() for run in self._runs])

    @property
    def observations(self) -> dict[str, Tensor]:
        """Values of the observed sites of the plate ``"data"``, ``(B, *inner plates, *event)``.

        Raises:
            ValueError: the value of a site differs from particle to particle, or among enumerated
                values.
        """
        first, *others = [run.observations() for run in self._runs]
        for name, value in first.items():
            for other in others:
                require_one_observation(name, value, other[name])
        return first

    def predict(self) -> dict[str, Tensor]:
        r"""Draw the observed sites of the plate ``"data"`` given the latents.

        Runs the model once more, its observations taken away. Latents c that were summed out are
        drawn from :math:`p(c|z)`, so that the draws are those of
        :math:`p(x'|z) = \sum_c p(c|z) \, p(x'|z, c)`.

        Returns:
            By site, ``(K, B, *inner plates, *event)``.

        Raises:
            ValueError: the guide enumerates a site, and so draws no latents.
        """
        return _concatenate([predictions.predict(run) for run in self._runs])

    def sample_joint(self) -> JointSample:
        """Let the model draw latents and data together, one for each of the minibatch."""
        return self._first.sample_joint()

    @property
    def scale(self) -> float:
        """N/B where the plate ``"data"`` stands for N data points by a subsample of B; else 1."""
        return self._first.scale

    @property
    def not_reparameterized(self) -> list[str]:
        """Names of the guide's sites without a reparameterised sample."""
        return [f.name for f in self._first.guide.values() if not f.reparameterized]

    @property
    def global_sites(self) -> list[str]:
        """Names of the sites of both programs that stand outside the plate ``"data"``."""
        return self._names(lambda factor: not factor.local)

    @property
    def points(self) -> list[str]:
        """Names of the latents that the guide gives one point, no auxiliary site behind them."""
        guide, latents = self._first.guide, self._first.latents
        if any(not f.observed and f.name not in latents for f in guide.values()):
            return []
        return [name for name in latents if is_delta(guide[name].site)]

    @property
    def enumerates(self) -> bool:
        """Whether a latent is enumerated: summed out, or averaged over under the guide."""
        return self._first.enumerates

    @property
    def plate_nesting(self) -> int:
        """How many batch dimensions the programs' plates use, the particles' apart."""
        return self._first.plate_nesting

    @property
    def scaled_sites(self) -> list[str]:
        """Names of the sites scaled by anything but the subsampling of the plate ``"data"``."""
        return self._names(lambda factor: factor.scaled)

    def require_independent_data(self, who: str, *, points: bool = False) -> None:
        """Refuse a pair whose log-weights are not those of independent data points.

        Args:
            who: the objective or estimator that needs them; it opens the message.
            points: whether the guide may give a latent one point.

        Raises:
            ValueError: a site is global, or scaled, or a point, or averaged over.
        """
        if self.global_sites:
            raise ValueError(
                f"{who} weighs each datum by itself, but site {self.global_sites[0]!r} stands "
                'outside the plate "data" and is shared by all data. Move it into the plate, or '
                "use objectives.ELBO, which accepts global sites."
            )
        if self.points and not points:
            raise ValueError(
                f"{who} needs a density, but the guide gives latent site {self.points[0]!r} one "
                "point (a Delta): p(x, z) at a point is no bound on p(x). Use objectives.ELBO, "
                "which then finds the most probable latents, or a guide with a density."
            )
        if averaged := self._first.averaged:
            raise ValueError(
                f"{who} weighs each sample by itself, but the guide averages over all values of "
                f"site {averaged[0]!r}. Leave that site out of the guide: enumerated in the model "
                "alone, it is summed out. Or use objectives.ELBO."
            )
        if self.scaled_sites:
            raise ValueError(
                f"{who} needs log-densities as they are, but site {self.scaled_sites[0]!r} is "
                "scaled, by poutine.scale or by an inner plate that subsamples. A scale inside an "
                "importance weight gives no bound on log p(x): remove it."
            )

    def require_held_samples(self, who: str) -> None:
        """Refuse terms whose samples are not held fixed.

        Args:
            who: what needs them; it opens the message.

        Raises:
            ValueError: they were taken without ``hold_samples``.
        """
        if not self._first.holds_samples:
            raise ValueError(
                f"{who} needs terms at samples held fixed: pass hold_samples=True to "
                "pyro_vae.terms, or set hold_samples = True in the class of the objective"
            )

    def require_reparameterized(self, who: str) -> None:
        """Refuse a guide that has a site without a reparameterised sample.

        Args:
            who: the objective that needs them; it opens the message.

        Raises:
            ValueError: a site has none.
        """
        if self.not_reparameterized:
            raise ValueError(
                f"{who} needs a reparameterised sample at every site of the guide; site "
                f"{self.not_reparameterized[0]!r} has none. Use objectives.ELBO, which falls back "
                "on the score function."
            )

    def require_no_baselines(self, who: str, sites: Sequence[str] | None = None) -> None:
        """Refuse a guide that asks for a baseline where none would be used.

        Args:
            who: the objective; it opens the message.
            sites: where it would be used; nowhere by default.

        Raises:
            ValueError: a site elsewhere asks for one, or by unknown options.
            TypeError: an option is of another type than expected.
        """
        if unused := [name for name in self.baselines if name not in (sites or [])]:
            raise ValueError(
                f"{who} takes no score function at guide site {unused[0]!r}, or none with a "
                "baseline: what the site asks for by infer={'baseline': ...} would be ignored. "
                "Remove it, or use objectives.ELBO, at sites without a reparameterized sample, or "
                "objectives.ScoreFunction."
            )

    def _sum(self, factors: Callable, local: bool = True) -> Tensor:
        return torch.cat([run.total(factors(run), local=local) for run in self._runs])

    def _names(self, condition: Callable) -> list[str]:
        factors = [*self._first.model.values(), *self._first.guide.values()]
        return list(dict.fromkeys(f.name for f in factors if condition(f)))


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Multiply, where zero times anything is zero: that of minus infinity would be NaN."""
    return weights * torch.where(weights == 0, 0.0, values)


def _concatenate(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
