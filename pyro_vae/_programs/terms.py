"""The terms of every objective: log-densities of a model and a guide for each data point.

:func:`terms` runs a pair of Pyro programs. It returns ``log p(x|z)``, ``log p(z)`` and
``log q(z|x)`` as tensors of shape (K, B), for K particles and the B data points of a minibatch.
All objectives and nearly all estimators are short reductions of these tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_vae._programs import divergences, predictions
from pyro_vae._programs.agreement import count_numbers, is_delta
from pyro_vae._programs.ancestral import JointSample
from pyro_vae._programs.baselines import Baseline, baselines_of, less_baseline
from pyro_vae._programs.data_plate import name_data_plate
from pyro_vae._programs.held_samples import path_adjoints
from pyro_vae._programs.pair_trace import PairTrace, Program
from pyro_vae._programs.particles import Vectorize, run_particles
from pyro_vae._programs.sites import mask_of, require_one_observation
from pyro_vae._utils.checks import positive_integer, require_callable, truth_value


def terms(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 1,
    vectorize_particles: Vectorize = None,
    plate: str | None = None,
    plate_nesting: int | None = None,
    hold_samples: bool = False,
    enumerates: bool = False,
    **kwargs: Any,
) -> Terms:
    r"""Run ``guide(*args)``, then ``model(*args)`` on the same latents, and score all sites.

    Args:
        model: program of :math:`p(x, z)`.
        guide: program of :math:`q(z|x)`.
        *args: the arguments of both programs: a minibatch whose leading dimension is the batch,
            then any covariates.
        num_particles: K, the number of samples of z for each data point.
        vectorize_particles: ``True`` draws all K particles in one run, under an outer plate whose
            dimension comes first. ``False`` runs the programs K times. By default, one run is tried
            first. If a program does not allow the extra dimension, for example because of
            ``BatchNorm1d`` in its decoder, the programs run K times, with one warning. ``"fold"``
            makes the particles rows of the minibatch, K copies of each row, with one run and no
            extra dimension. Evaluation tries this before it runs the programs K times, and
            compares the densities of two copies with those of separate runs. Pass it only for
            programs in evaluation mode whose rows do not depend on each other. The distribution
            of the terms is the same in all cases. With K = 1 there is never an extra dimension.
        plate: the name of the plate of the data points in both programs. By default, the plate is
            found, because its size changes with the number of rows of x (docs/contract.md). Pass
            the name if an error says that several plates do. It is stored with the programs, so
            one call is enough.
        plate_nesting: the number of batch dimensions of the programs, without the dimension of the
            particles. By default, a run of the programs determines it.
        hold_samples: detach the samples of the guide, so that no gradient of the terms passes
            through them. :meth:`Terms.path` returns the gradient along the samples.
        enumerates: whether a latent has ``infer={"enumerate": "parallel"}``. If it is
            False and a latent has it, the programs run once more.
        **kwargs: keyword arguments of both programs.

    Returns:
        The :class:`Terms` of the run, in nats.

    Raises:
        ValueError: No site is inside the plate ``"data"``. A latent of the model is missing in the
            guide, or the guide has a latent that the model does not have. The plates of the two
            programs disagree.

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
    if plate is not None:
        name_data_plate(plate, model, guide)
    if vectorize_particles not in (None, "fold"):
        truth_value("vectorize_particles", vectorize_particles)
    truth_value("hold_samples", hold_samples)
    truth_value("enumerates", enumerates)
    if plate_nesting is not None:
        plate_nesting = positive_integer("plate_nesting", plate_nesting, minimum=0)
    options = {"hold_samples": hold_samples, "enumerates": enumerates}
    layout = {"plate_nesting": plate_nesting, "vectorize_particles": vectorize_particles}
    return Terms(run_particles(model, guide, args, kwargs, num_particles, **layout, **options))


class Terms:
    r"""Log-densities of a pair, in nats: K particles for each of B data points.

    Attributes without ``_global`` in their names hold the sites inside the plate ``"data"``.
    Attributes named ``..._global`` hold all other sites, with one value per particle.

    Args:
        runs: the runs of the pair; their particles are concatenated along the first dimension.
    """

    def __init__(self, runs: Sequence[PairTrace]):
        self._runs = runs
        self._first = runs[0]

    def __repr__(self) -> str:
        particles, rows = self.log_weight.shape
        sites = ", ".join(name for name, site in self._first.guide.items() if not site.observed)
        return f"terms of {rows} data points and {particles} particles; latent sites: {sites}"

    @cached_property
    def log_likelihood(self) -> Tensor:
        r""":math:`\log p(x_b|z_{kb})`, shape (K, B)."""
        return self._sum_of_model(lambda run: (f for f in run.model.values() if f.observed))

    @cached_property
    def log_prior(self) -> Tensor:
        r""":math:`\log p(z_{kb})`, shape (K, B)."""
        return self._sum_of_model(lambda run: (f for f in run.model.values() if not f.observed))

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
        r""":math:`\log q(z|x) - \log p(z)`, or its expectation if known, shape (K, B).

        Each site contributes :math:`\mathrm{KL}(q \| p)` where torch or Pyro has a closed form,
        and the sampled difference elsewhere. All sites contribute the sampled difference if the
        guide samples the latents in another order than the model. A closed form would then hold
        fixed the sites that depend on the site.
        """
        return torch.cat([divergences.kl(run, local=True) for run in self._runs])

    def kl_of_sites(self) -> dict[str, Tensor]:
        """Return :attr:`kl` for each latent in the plate ``"data"``, each of shape (K, B).

        Raises:
            ValueError: The guide or the model has one joint density for several latents.
        """
        return _concatenate([divergences.kl_of_sites(run) for run in self._runs])

    def kl_of_dimensions(self) -> dict[str, Tensor]:
        """Return :attr:`kl` for each dimension of each latent.

        Returns:
            By latent, ``(K, B, *inner plates, *event)``.

        Raises:
            ValueError: The dimensions are masked or scaled, or not independent under both programs.
        """
        return _concatenate([divergences.kl_of_dimensions(run) for run in self._runs])

    def log_guide_of_pairs(self) -> Tensor:
        r"""Return :math:`\log q(z_{kbd}|x_c)` for each dimension d, shape (K, B, B, D).

        Raises:
            ValueError: There is more than one local latent, or its dimensions are not independent.
            TypeError: The latent is not Gaussian under the guide.
        """
        return torch.cat([divergences.log_guide_of_pairs(run) for run in self._runs])

    def path(self, weights: Tensor) -> Tensor:
        r"""Return zeros whose gradient is that of weighted log-weights along the samples.

        .. math::
            \sum_k c_k \, \frac{\partial \log w_k}{\partial z_k} \,
            \frac{\partial z_k}{\partial\phi}

        All parameters inside :math:`\log w` are held fixed, including those of the guide's
        density. This holds for any distributions. The terms need ``hold_samples=True``.

        Args:
            weights: c, without a gradient, shape (K, B).

        Returns:
            Shape (B,). The gradient is that of the sum over the data, not of each data point.

        Raises:
            ValueError: The terms were computed without ``hold_samples``.
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
        r"""Return the loss that the guide itself adds, a scalar averaged over the particles.

        It is the sum of the log-factors of the guide's ``pyro.factor`` statements and observed
        auxiliary sites, such as a classifier's likelihood. These factors are not part of
        :math:`\log q(z|x)`, of any log-weight or of any KL. As in Pyro's ELBOs, they enter the
        loss with a plus sign.

        The gradient is that of :math:`\mathbb{E}_q`. It is reparameterized, or uses the score
        function where a site has no reparameterized sample.
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
        """Log-density of the observations that all data points share, shape (K,); zero if none."""
        return self._sum(lambda run: (f for f in run.model.values() if f.observed), local=False)

    @cached_property
    def log_weight_global(self) -> Tensor:
        """Log-weight of all sites that all data points share, shape (K,); zero if none."""
        log_joint = self._sum(lambda run: run.model.values(), local=False)
        return log_joint - self._sum(lambda run: run.guide.values(), local=False)

    @cached_property
    def kl_global(self) -> Tensor:
        """:attr:`kl` of the latents that all data points share, shape (K,); zero if none."""
        return torch.cat([divergences.kl(run, local=False) for run in self._runs])

    @cached_property
    def score(self) -> Tensor | None:
        """Log-density of the guide's sites without a reparameterized sample, shape (K, B).

        Its gradient is the score function, without any scale. None if every site is
        reparameterized.
        """
        if not self.not_reparameterized:
            return None
        return torch.cat([run.score() for run in self._runs])

    @cached_property
    def log_guide_of_score(self) -> Tensor:
        """The part of :attr:`log_guide` from the sites of :attr:`score`, shape (K, B)."""
        return self._sum(lambda run: (f for f in run.guide.values() if not f.reparameterized))

    @cached_property
    def baselines(self) -> dict[str, Baseline]:
        """The baselines for score functions that the guide requests, by site.

        Raises:
            ValueError: A site has unknown options, or options that contradict each other.
            TypeError: An option has the wrong type.
        """
        return baselines_of(self._first)

    def less_baselines(self, signal: Tensor, averages: Mapping[str, Tensor]) -> Tensor:
        r"""Return zeros whose gradient subtracts the baselines from a signal and trains them.

        .. math::
            \frac1K \sum_k \sum_i -b_{ki} \nabla \log q_i(z_k|x) - \nabla (s_k - b_{ki})^2

        over the sites i that have a baseline b. The signal s weights their score.

        Args:
            signal: s, shape (K, B).
            averages: moving averages of the signal in earlier steps, for the sites that need one.

        Returns:
            Shape (B,).

        Raises:
            ValueError: A baseline does not have the batch shape of its site.
            TypeError: A baseline is not a tensor.
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

    def masked_numbers(self) -> dict[str, Tensor]:
        """Return which numbers of the latents are masked, ``(B, *inner plates, *event)``.

        Only for the sites with a mask. Both programs have the same mask.
        """
        run, found = self._first, {}
        for factor in (run.guide[name] for name in run.latents):
            if factor.local and (mask := mask_of(factor.site)) is not None:
                mask = torch.as_tensor(mask, device=self.log_weight.device)
                found[factor.name] = ~run.to_particle_layout(mask, factor.site)[0]
        return found

    def masked_data(self) -> Tensor:
        """Return whether the model masks any number of the latents of each data point, (B,)."""
        masked = [each.reshape(len(each), -1).any(1) for each in self.masked_numbers().values()]
        none = self.log_weight.new_zeros(self.log_weight.shape[1], dtype=torch.bool)
        return torch.stack([none, *masked]).any(0)

    @property
    def observations(self) -> dict[str, Tensor]:
        """Values of the observed sites of the plate ``"data"``, ``(B, *inner plates, *event)``.

        Raises:
            ValueError: The value of a site differs between particles or enumerated values.
        """
        first, *others = [run.observations() for run in self._runs]
        for name, value in first.items():
            for other in others:
                require_one_observation(name, value, other[name])
        return first

    def masked_observations(self) -> dict[str, Tensor]:
        """Return which numbers of :attr:`observations` the model masks, in the same shapes."""
        runs = [run.masked_observations() for run in self._runs]
        return {name: torch.stack([each[name] for each in runs]).all(0) for name in runs[0]}

    def predict(self) -> dict[str, Tensor]:
        r"""Sample the observed sites of the plate ``"data"`` given the latents.

        The model runs once more without its observations. Latents c that were summed out are
        sampled from :math:`p(c|z)`, so the samples follow
        :math:`p(x'|z) = \sum_c p(c|z) \, p(x'|z, c)`.

        Returns:
            By site, ``(K, B, *inner plates, *event)``.

        Raises:
            ValueError: The guide enumerates a site, so it has no sampled latents.
        """
        return _concatenate([predictions.predict(run) for run in self._runs])

    def sample_joint(self) -> JointSample:
        """Sample latents and data together from the model, as many as the minibatch has rows."""
        return self._first.sample_joint()

    @property
    def scale(self) -> float:
        """N/B if the plate ``"data"`` is a subsample of B from N data points, else 1."""
        return self._first.scale

    @property
    def not_reparameterized(self) -> list[str]:
        """Names of the guide's sites without a reparameterized sample."""
        return [f.name for f in self._first.guide.values() if not f.reparameterized]

    @property
    def global_sites(self) -> list[str]:
        """Names of the sites of both programs outside the plate ``"data"``."""
        return self._names(lambda factor: not factor.local)

    @property
    def points(self) -> list[str]:
        """Names of the latents to which the guide gives one point, a Delta.

        A Delta may also be a function of an auxiliary site, as in Pyro's AutoGuides. Then it has a
        density. This is so if the auxiliary sites have as many numbers as all Deltas.
        """
        guide, model = self._first.guide, self._first.model
        deltas = [n for n in self._first.latents if n in guide and is_delta(guide[n].site)]
        auxiliary = [guide[name].site for name in self._auxiliary]
        drawn = sum(site["value"].numel() for site in auxiliary)
        if count_numbers(model[name].site for name in deltas) <= drawn:
            return []
        functions = {name for name in deltas if any(a.startswith(name) for a in self._auxiliary)}
        return [name for name in deltas if name not in functions] or deltas

    @property
    def _auxiliary(self) -> list[str]:
        """Names of the guide's samples that are not latents of the model."""
        latents = self._first.latents
        return [f.name for f in self._first.guide.values() if not (f.observed or f.name in latents)]

    @property
    def enumerates(self) -> bool:
        """Whether a latent is enumerated: summed out, or averaged under the guide."""
        return self._first.enumerates

    @property
    def plate_nesting(self) -> int:
        """The number of batch dimensions of the programs' plates, without the particles."""
        return self._first.plate_nesting

    @property
    def scaled_sites(self) -> list[str]:
        """Names of the sites with a scale other than the subsampling of the plate ``"data"``."""
        return self._names(lambda factor: factor.scaled)

    def require_independent_data(self, who: str, *, points: bool = False) -> None:
        """Raise ValueError unless the log-weights are those of independent data points.

        Args:
            who: the objective or estimator that needs them, the first words of the message.
            points: whether the guide may give a latent one point.

        Raises:
            ValueError: A site is global, scaled, a point, or averaged over.
        """
        if self.global_sites:
            if self.global_sites[0] in self._auxiliary:  # all latents of the model are local
                raise ValueError(
                    f"{who} weighs each data point by itself, but the guide samples the latents of "
                    f"all data points together, at the auxiliary site {self.global_sites[0]!r} "
                    'outside the plate "data". Use AutoNormal, whose samples are inside that '
                    "plate, or a guide of the library."
                )
            raise ValueError(
                f"{who} weighs each data point by itself, but site {self.global_sites[0]!r} is "
                'outside the plate "data" and shared by all data points. Move it into the plate, '
                "or use objectives.ELBO, which accepts global sites."
            )
        if self.points and not points:
            raise ValueError(
                f"{who} needs a density, but the guide gives latent site {self.points[0]!r} one "
                "point (a Delta), and p(x, z) at a point is not a bound on p(x). Use a guide with "
                "a density, or objectives.ELBO, which then finds the most probable latents."
            )
        if averaged := self._first.averaged:
            raise ValueError(
                f"{who} weighs each sample by itself, but the guide averages over all values of "
                f"site {averaged[0]!r}. Remove that site from the guide, so that the model's "
                "enumeration sums it out, or use objectives.ELBO."
            )
        if self.scaled_sites:
            raise ValueError(
                f"{who} needs unscaled log-densities, but site {self.scaled_sites[0]!r} is scaled "
                "by poutine.scale or by an inner plate that subsamples. A scale inside an "
                "importance weight gives no bound on log p(x). If the scale was for training, "
                "pass pv.unscaled(model) and pv.unscaled(guide)."
            )

    def require_held_samples(self, who: str) -> None:
        """Raise ValueError unless the terms hold the guide's samples fixed.

        Args:
            who: the method or objective that needs such terms, the first words of the message.

        Raises:
            ValueError: The terms were computed without ``hold_samples``.
        """
        if not self._first.holds_samples:
            raise ValueError(
                f"{who} needs terms that hold the samples fixed: pass hold_samples=True to "
                "pyro_vae.terms, or set hold_samples = True in the class of the objective"
            )

    def require_reparameterized(
        self,
        who: str,
        remedy: str = "Use objectives.ELBO, which falls back on the score function.",
    ) -> None:
        """Raise ValueError if a site of the guide has no reparameterized sample.

        Args:
            who: the objective that needs such samples, the first words of the message.
            remedy: the last sentence of the message.

        Raises:
            ValueError: A site has no reparameterized sample.
        """
        if self.not_reparameterized:
            raise ValueError(
                f"{who} needs a reparameterized sample at every site of the guide; site "
                f"{self.not_reparameterized[0]!r} has none. {remedy}"
            )

    def require_no_baselines(self, who: str, sites: Sequence[str] | None = None) -> None:
        """Raise ValueError if the guide requests a baseline that the objective would not use.

        Args:
            who: the objective, the first word of the message.
            sites: the sites at which the objective uses baselines; none by default.

        Raises:
            ValueError: Another site requests a baseline, or its options are unknown.
            TypeError: An option has the wrong type.
        """
        if unused := [name for name in self.baselines if name not in (sites or [])]:
            raise ValueError(
                f"{who} takes no score function at guide site {unused[0]!r}, or none with a "
                "baseline, so infer={'baseline': ...} would be ignored there. Remove it, or use "
                "objectives.ScoreFunction, or objectives.ELBO at sites without a reparameterized "
                "sample."
            )

    def _sum_of_model(self, factors: Callable) -> Tensor:
        """Return the sum of factors of the model, with minus infinity for NaN at excluded samples.

        There, distributions after the latent may have no density. An example is a Poisson whose
        rate is a negative latent.
        """
        total, excluded = self._sum(factors), [run.excluded for run in self._runs]
        if any(each is None for each in excluded):
            return total
        return torch.where(torch.cat(excluded) & total.isnan(), -math.inf, total)

    def _sum(self, factors: Callable, local: bool = True) -> Tensor:
        return torch.cat([run.total(factors(run), local=local) for run in self._runs])

    def _names(self, condition: Callable) -> list[str]:
        factors = [*self._first.model.values(), *self._first.guide.values()]
        return list(dict.fromkeys(f.name for f in factors if condition(f)))


def weighted(weights: Tensor | float, values: Tensor) -> Tensor:
    """Multiply, with zero wherever a weight is zero, even for a value that is infinite or NaN."""
    if not isinstance(weights, Tensor):
        return weights * values if weights else torch.zeros_like(values)
    return weights * torch.where(weights == 0, 0.0, values)


def _concatenate(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
