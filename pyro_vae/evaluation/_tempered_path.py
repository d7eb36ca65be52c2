r"""A path of densities from a distribution that is easy to sample to :math:`p(x, z)`."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyro_vae._programs.evaluation import gradients_of_values
from pyro_vae._programs.latent_sites import inside, latent_sites, surroundings
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.particles import Vectorize
from pyro_vae._programs.sites import is_discrete, to_particle_layout
from pyro_vae._programs.terms import Terms, terms
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.numerics import gradient_or_zeros
from pyro_vae._utils.random import separate_draws
from pyro_vae.evaluation._delta_sites import point, prior_sites
from pyro_vae.evaluation._scoring import log_prob_given

Start = Literal["guide", "prior"]


class State(NamedTuple):
    """The latents of all chains, with the log-densities of the path and their gradients.

    Args:
        rows: the unconstrained latents, ``(C, B, D)``.
        start: log-density of the start, ``(C, B)``.
        slope: log-density of the end minus that of the start, ``(C, B)``.
        gradient_of_start: gradient of ``start`` with respect to the rows, ``(C, B, D)``.
        gradient_of_slope: gradient of ``slope`` with respect to the rows, ``(C, B, D)``.
    """

    rows: Tensor
    start: Tensor
    slope: Tensor
    gradient_of_start: Tensor
    gradient_of_slope: Tensor

    def log_density(self, temperature: float) -> Tensor:
        """Return the unnormalized log-density of the path, ``(C, B)``."""
        return self.start + temperature * self.slope

    def gradient(self, temperature: float) -> Tensor:
        """Return the gradient of :meth:`log_density` with respect to the rows, ``(C, B, D)``."""
        return torch.add(self.gradient_of_start, self.gradient_of_slope, alpha=temperature)


class TemperedPath:
    r"""The geometric path from the start to the joint density, for each data point of a minibatch.

    .. math::
        \log p_b(z) = (1 - b) \log p_0(z) + b \log p(x, z), \qquad 0 \le b \le 1

    where :math:`p_0` is the guide's q(z|x) or the prior p(z). With the prior, the path is
    :math:`p(z)\,p(x|z)^b`. Densities are those of the unconstrained latents. They include the
    Jacobians of the bijections onto the supports.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x). It is not run if the path starts at the prior.
        batch: the first minibatch, x and covariates. It is used to find the latents.
        start: ``"guide"`` or ``"prior"``.
        plate_nesting: the number of batch dimensions that the programs use.
        vectorize_particles: True runs all chains at once. Otherwise each chain is run alone.

    Raises:
        ValueError: A latent variable is discrete, or its support does not allow steps along
            gradients. The guide cannot score latents that it did not sample, or a density differs
            from call to call.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        batch: tuple[Tensor, ...],
        *,
        start: Start,
        plate_nesting: int,
        vectorize_particles: Vectorize = True,
    ):
        self._model, self._guide = model, guide
        self._from_prior = start == "prior"
        self._nesting = plate_nesting
        self._vectorize = vectorize_particles is True
        self._enumerates = False
        self._refuse_discrete(batch)
        # The nesting of the pair: an observation may be inside more plates than any latent.
        self._sites = tuple(
            replace(site, nesting=plate_nesting) for site in latent_sites(model, *batch)
        )
        self._refuse_dependent_supports(batch)
        self._refuse_what_changes(batch)

    @property
    def num_dimensions(self) -> int:
        """D, the number of latent dimensions per data point."""
        return sum(site.shape.numel() for site in self._sites)

    def draw(self, num_chains: int, *batch: Tensor) -> Tensor:
        """Sample latents from the start of the path, as rows ``(C, B, D)``."""
        if num_chains > 1 and not self._vectorize:
            return torch.cat([self.draw(1, *batch) for _ in range(num_chains)])
        if not self._from_prior:
            return self.rows_of(self._terms(self._guide, batch, num_chains).samples)
        particle_dim = None if num_chains == 1 else -1 - self._nesting
        sites = prior_sites(self._model, batch, num_chains, self._nesting)
        return self.rows_of(
            {n: to_particle_layout(s["value"], s, particle_dim) for n, s in sites.items()}
        )

    def rows_of(self, values: dict[str, Tensor]) -> Tensor:
        """Return latents ``(C, B, *inner plates, *event)`` as unconstrained rows ``(C, B, D)``.

        Raises:
            ValueError: A value is outside the support of its site in the model.
        """
        rows = []
        for site in self._sites:
            value = values[site.name]
            num_chains, batch_size = value.shape[:2]
            event_shape = site.bijection.forward_shape(site.event_shape)
            value = _leading(value.reshape(num_chains, batch_size, -1))
            unconstrained = site.bijection.inv(site.from_rows(value, event_shape))
            each = site.to_rows(unconstrained, batch_size, len(site.event_shape))
            if not each.isfinite().all():
                raise ValueError(
                    f"latent site {site.name!r} was sampled outside its support in the model, or "
                    "on its edge, and chains cannot start there. Give the guide the support of the "
                    'prior, or use AIS(start="prior")'
                )
            rows.append(each.reshape(num_chains, batch_size, -1))
        return torch.cat(rows, -1)

    def moving(self, *batch: Tensor) -> Tensor | None:
        """Return which latent numbers are unmasked, ``(B, D)``, or None if no site has a mask."""
        _, masks = surroundings(self._sites, self._model, *batch)
        if not masks:
            return None
        x, rows = batch[0], []
        for site in self._sites:
            mask = torch.as_tensor(masks.get(site.name, True), device=x.device)
            mask = mask.reshape(mask.shape + (1,) * len(site.event_shape))
            mask = mask.expand(mask.shape[: mask.dim() - len(site.event_shape)] + site.event_shape)
            rows.append(site.to_rows(mask, len(x), len(site.event_shape)))
        return torch.cat(rows, -1)

    def evaluate(self, rows: Tensor, *batch: Tensor) -> list[Tensor]:
        """Return the fields of a :class:`State` except its rows, as a list of tensors."""
        with gradients_of_values():
            rows = rows.detach().requires_grad_()
            start, other = self._densities(rows, batch)
            gradients = [
                gradient_or_zeros(density, rows, retain_graph=True) for density in (start, other)
            ]
        start, other = start.detach(), other.detach()
        if self._from_prior:  # here other is log p(x|z)
            return [start, other, *gradients]
        return [start, other - start, gradients[0], gradients[1] - gradients[0]]

    def _densities(self, rows: Tensor, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return log p(z) and log p(x|z), or log q(z|x) and log p(x, z), each (C, B).

        Either pair defines the path, and no part of it needs two backward passes.
        """
        if len(rows) > 1 and not self._vectorize:
            singles = [self._densities(row.unsqueeze(0), batch) for row in rows]
            first, second = zip(*singles, strict=True)
            return torch.cat(first), torch.cat(second)
        plates, masks = surroundings(self._sites, self._model, *batch)
        values, log_volume = self._values(rows)

        def points(*_: Tensor) -> None:
            for site in self._sites:
                with inside(site, plates, masks):
                    event_shape = site.bijection.forward_shape(site.event_shape)
                    point(site.name, values[site.name], len(event_shape))

        t = self._terms(points, batch, len(rows))
        if self._from_prior:
            return t.log_prior + log_volume, t.log_likelihood
        return self._log_guide(values, batch, len(rows)) + log_volume, t.log_joint + log_volume

    def _values(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Map rows onto the supports, and return the values and the log-Jacobians, (C, B).

        The Jacobian of a masked number is constant, because the number does not move.
        """
        num_chains, batch_size = rows.shape[:2]
        values, log_volume = {}, rows.new_zeros(num_chains, batch_size)
        counts = [site.shape.numel() for site in self._sites]
        for site, part in zip(self._sites, _leading(rows).split(counts, -1), strict=True):
            numbers = site.from_rows(part, site.event_shape)
            values[site.name] = value = site.bijection(numbers)
            change = site.bijection.log_abs_det_jacobian(numbers, value)
            change = sum_rightmost(change, len(site.event_shape) - site.bijection.domain.event_dim)
            change = site.to_rows(change, batch_size, 0).sum(-1)
            log_volume = log_volume + change.reshape(num_chains, batch_size)
        return values, log_volume

    def _log_guide(
        self, values: dict[str, Tensor], batch: tuple[Tensor, ...], num_chains: int
    ) -> Tensor:
        in_plate = None if num_chains == 1 else num_chains
        try:
            return log_prob_given(self._guide, batch, values, in_plate, self._nesting)
        except ValueError as error:
            raise ValueError(
                f'{first_line(error)}. Or use AIS(start="prior"), which does not score the guide'
            ) from error

    def _terms(self, guide: Program, batch: tuple[Tensor, ...], num_chains: int) -> Terms:
        t = terms(
            self._model,
            guide,
            *batch,
            num_particles=num_chains,
            plate_nesting=self._nesting,
            vectorize_particles=True,
            enumerates=self._enumerates,
        )
        self._enumerates = t.enumerates
        return t

    def _refuse_discrete(self, batch: tuple[Tensor, ...]) -> None:
        for name, site in prior_sites(self._model, batch, 1, self._nesting).items():
            if is_discrete(site["fn"]):
                raise ValueError(
                    f"AIS moves latents along gradients, but latent site {name!r} is discrete. "
                    'Enumerate it in the model (infer={"enumerate": "parallel"}) and leave it out '
                    'of the guide, or use evidence(method="importance")'
                )

    def _refuse_dependent_supports(self, batch: tuple[Tensor, ...]) -> None:
        """Raise ValueError if the support of a latent is another one for other earlier latents."""
        with separate_draws("other values of the latents"):
            others = latent_sites(self._model, *batch)
        for site, other in zip(self._sites, others, strict=True):
            zeros = torch.zeros(site.event_shape, device=batch[0].device)
            ends = [
                each(sign * torch.ones_like(zeros))
                for sign in (-1, 1)
                for each in (site.bijection, other.bijection)
            ]
            if not (torch.equal(ends[0], ends[1]) and torch.equal(ends[2], ends[3])):
                raise ValueError(
                    f"the support of latent {site.name!r} depends on other latents, and AIS needs "
                    'one support. Use method="importance" or "naive", or scale the latent inside '
                    "of the model"
                )

    def _refuse_what_changes(self, batch: tuple[Tensor, ...]) -> None:
        rows = self.draw(2, *batch)
        first, second = (self.evaluate(rows, *batch)[:2] for _ in range(2))
        for what, one, other in zip(("start", "target"), first, second, strict=True):
            if not torch.allclose(one, other, rtol=1e-4, atol=1e-4, equal_nan=True):
                raise ValueError(
                    f"the density of the {what} of AIS differs from call to call at the same "
                    "latents. The guide may refine itself by random steps, or a program may sample "
                    'noise outside of sites. Fix this noise, or use AIS(start="prior"), which does '
                    "not score the guide."
                )


def _leading(rows: Tensor) -> Tensor:
    """Remove the dimension of the chains if there is one chain, as in the programs."""
    return rows.squeeze(0) if len(rows) == 1 else rows
