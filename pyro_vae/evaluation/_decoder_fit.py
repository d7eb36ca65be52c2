"""Train corrections of a decoder and an encoder, to see what a larger decoder would gain."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae._programs.local_offsets import LocalMembers
from pyro_vae._programs.mapped_sites import (
    MapSites,
    parameters_of_site,
    require_known_parameters,
)
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.runs import trace_of
from pyro_vae._programs.sites import data_frame, is_deterministic, random_sites
from pyro_vae._programs.terms import Terms, terms
from pyro_vae._utils.random import seeded
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._minibatches import Batch
from pyro_vae.distributions._parameter_maps import Parameter
from pyro_vae.evaluation._prior_fit import GaussianMixture, UnconstrainedLatents

_WIDTH = 128  # of the two hidden layers of a correction
_FIRST_SCALE = 0.03  # of the outputs of a correction before the training
_BATCH_SIZE = 100
_LEARNING_RATE = 2e-3
_HELD_OUT_SHARE = 0.2
_WARM_UP = 200  # steps in which the weight of the KL rises
_FIRST_WEIGHT = 0.1  # of the KL
_PATIENCE = 200  # steps without a higher ELBO of the held-out rows, after the warm-up
_MOST_STEPS = 2000
_FEWEST_ROWS = 5  # of which one is held out
_HELD_OUT_PARTICLES = 3


class Correction(nn.Module):
    """A network whose output is small before the training.

    It is not zero. If a decoder ignores the latents, zero corrections of both programs would be a
    saddle point of the ELBO.

    Args:
        inputs: rows of inputs, which set the units of the inputs.
        num_outputs: the number of outputs.
        bound: the largest absolute value of an output.
    """

    def __init__(self, inputs: Tensor, num_outputs: int, bound: float = math.inf):
        super().__init__()
        self.bound = bound
        rows = inputs.detach().double()
        scale = rows.std(0).nan_to_num(nan=1.0)
        self.register_buffer("loc", rows.mean(0).to(inputs.dtype))
        self.register_buffer("scale", scale.where(scale > 0, 1.0).to(inputs.dtype))
        last = nn.Linear(_WIDTH, num_outputs)
        nn.init.normal_(last.weight, std=_FIRST_SCALE / math.sqrt(_WIDTH))
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(
            nn.Linear(inputs.shape[1], _WIDTH),
            nn.ReLU(),
            nn.Linear(_WIDTH, _WIDTH),
            nn.ReLU(),
            last,
        ).to(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the correction of each row."""
        outputs = self.layers((inputs - self.loc) / self.scale)
        return outputs if self.bound == math.inf else self.bound * (outputs / self.bound).tanh()


@dataclass(frozen=True)
class Slot:
    """The place of a parameter of an observed site in the outputs of a correction.

    Attributes:
        columns: of the outputs.
        shape: of the parameter right of the data points' dimension.
    """

    columns: slice
    shape: tuple[int, ...]


class CorrectedDecoder(Messenger):
    """Add a function of the latents to the parameters of the observed sites.

    Args:
        model: program of p(x, z).
        args: a minibatch x, and covariates.
        latents: names of the latents.

    Raises:
        ValueError: A site has another plate, or a dimension right of the data. Or the parameters of
            an observed site are not known.
    """

    def __init__(self, model: Program, args: Batch, latents: list[str]):
        super().__init__()
        self._latents = latents
        self._slots: dict[tuple[str, str], Slot] = {}
        self._values: dict[str, Tensor] = {}
        self.net: Correction | None = None
        self.num_outputs = 0
        for site in random_sites(trace_of(model, *args)):
            if data_frame(site) is None:
                continue
            if len([f for f in site["cond_indep_stack"] if f.vectorized]) > 1:
                raise ValueError(f"site {site['name']!r} has a plate besides that of the data")
            if data_frame(site).dim != -1:
                raise ValueError(
                    f"site {site['name']!r} has a batch dimension right of the data points"
                )
            if site["is_observed"] and not is_deterministic(site):
                self._add(site)
        if not self._slots:
            raise ValueError("no observed site has a parameter in unconstrained space")
        self._sites = MapSites({name for name, _ in self._slots}, self._corrected)

    def _add(self, site: dict[str, Any]) -> None:
        try:
            require_known_parameters(site)
        except ValueError as error:
            raise ValueError(
                f"the parameters of site {site['name']!r} are not known: {error}"
            ) from error
        for parameter in parameters_of_site(site):
            if parameter.is_mapped:
                inner = parameter.value.shape[parameter.value.dim() - parameter.inner_dims :]
                columns = slice(self.num_outputs, self.num_outputs + inner.numel())
                self._slots[site["name"], parameter.name] = Slot(columns, tuple(inner))
                self.num_outputs += inner.numel()

    def features(self, samples: dict[str, Tensor]) -> Tensor:
        """Return the latents of a run, each ``(K, B, *event)``, as rows (K B, D)."""
        rows = [samples[name].flatten(0, 1) for name in self._latents]
        return torch.cat([values.reshape(len(values), -1) for values in rows], 1)

    def __enter__(self) -> CorrectedDecoder:
        self._values.clear()
        self._sites.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> Any:
        result = super().__exit__(*exception)
        self._sites.__exit__(*exception)
        return result

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self._latents:
            value = msg["value"]
            event_dim = msg["fn"].event_dim
            batch = value.shape[: value.dim() - event_dim]
            self._values[msg["name"]] = value.reshape(*batch, -1)

    def _corrected(self, site: str, parameter: Parameter) -> Tensor:
        slot = self._slots.get((site, parameter.name))
        if slot is None or self.net is None:
            return parameter.value
        if missing := [name for name in self._latents if name not in self._values]:
            raise ValueError(f"site {site!r} is sampled before the latents {missing}")
        values = [self._values[name] for name in self._latents]
        batch = torch.broadcast_shapes(*(value.shape[:-1] for value in values))
        latents = torch.cat([value.expand(*batch, -1) for value in values], -1)
        added = self.net(latents)[..., slot.columns].reshape(*batch, *slot.shape)
        return parameter.value + added


@dataclass(frozen=True)
class CorrectedPair:
    """A pair with another prior, and a corrected encoder and decoder.

    Attributes:
        model: program of p(x, z).
        members: the members of the guide's family.
        latents: the latents in unconstrained space.
        prior: replaces the model's prior; None keeps it.
        encoder: the correction of the encoder, a function of x.
        decoder: the corrected decoder.
        options: ``plate_nesting`` and ``vectorize_particles`` of :func:`pyro_vae.terms`.
    """

    model: Program
    members: LocalMembers
    latents: UnconstrainedLatents
    prior: GaussianMixture | None
    encoder: Correction
    decoder: CorrectedDecoder
    options: dict[str, Any]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the corrections."""
        return [*self.encoder.parameters(), *self.decoder.net.parameters()]

    def log_weight(self, batch: Batch, num_particles: int) -> Tensor:
        """Return the log-weights (K, B) of a minibatch."""
        t = self.terms(batch, num_particles)
        return t.log_weight + self._log_ratio_of_priors(t)

    def elbo(self, batch: Batch, num_particles: int, kl_weight: float = 1.0) -> Tensor:
        """Return samples (K, B) of the ELBO, with a weight of the KL.

        The KL to the model's prior is in closed form if it is known.
        """
        t = self.terms(batch, num_particles)
        return t.log_likelihood - kl_weight * (t.kl - self._log_ratio_of_priors(t))

    def _log_ratio_of_priors(self, t: Terms) -> Tensor | float:
        """Return the log-density of the new prior minus that of the model's, (K, B)."""
        if self.prior is None:
            return 0.0
        codes, jacobian = self.latents(t.samples)
        return self.prior.log_prob(codes) - jacobian - t.log_prior

    def terms(self, batch: Batch, num_particles: int) -> Terms:
        """Run the corrected programs on a minibatch."""
        x, *covariates = batch

        def guide(*args: Any) -> Any:
            added = self.encoder(rows_of_numbers(x))
            return self.members.sample(
                self.members.parameters_of(x, *covariates) + added, x, *covariates
            )

        return terms(
            self.decoder(self.model), guide, *batch, num_particles=num_particles, **self.options
        )


def train_corrections(pair: CorrectedPair, columns: Batch, advance: Callable[[int], None]) -> None:
    """Maximize the ELBO over the corrections, and keep the best epoch of the held-out rows.

    If no epoch raises their ELBO, the corrections become zero.

    Args:
        pair: a pair with corrections, which are trained in place.
        columns: training data in random order. The last fifth of the rows are held out.
        advance: called with the number of epochs that are done.

    Raises:
        ValueError: There are too few rows. Or the model samples x before a latent.
    """
    if len(columns[0]) < _FEWEST_ROWS:
        raise ValueError(f"a decoder needs at least {_FEWEST_ROWS} rows of training data")
    count = math.ceil(len(columns[0]) * (1 - _HELD_OUT_SHARE))
    fitted, held_out = (
        tuple(column[rows] for column in columns) for rows in (slice(0, count), slice(count, None))
    )
    optimizer = torch.optim.Adam(pair.parameters, lr=_LEARNING_RATE)
    step, last_improvement = 0, 0
    with values_checked(False), torch.inference_mode(False), torch.enable_grad():
        best, kept = _without_corrections(pair, held_out)
        while step < min(_MOST_STEPS, max(last_improvement, _WARM_UP) + _PATIENCE):
            for rows in torch.randperm(count).split(_BATCH_SIZE):
                weight = min(1.0, _FIRST_WEIGHT + step / _WARM_UP)
                batch = tuple(column[rows] for column in fitted)
                loss = -pair.elbo(batch, 1, weight).mean()
                gradients = torch.autograd.grad(loss, pair.parameters, allow_unused=True)
                for parameter, gradient in zip(pair.parameters, gradients, strict=True):
                    parameter.grad = (
                        None if gradient is None else gradient.nan_to_num(0.0, 0.0, 0.0)
                    )
                optimizer.step()
                step += 1
            reached = _mean_elbo(pair, held_out)
            if reached > best:
                best, kept, last_improvement = reached, copy.deepcopy(pair.parameters), step
            advance(1)
        with torch.no_grad():
            for parameter, value in zip(pair.parameters, kept, strict=True):
                parameter.copy_(value)


@torch.no_grad()
def _without_corrections(pair: CorrectedPair, columns: Batch) -> tuple[float, list[nn.Parameter]]:
    """Return the ELBO of rows without corrections, and parameters of corrections that are zero.

    The first corrections are small, but may be large in the units of a parameter.
    """
    first = copy.deepcopy(pair.parameters)
    for net in (pair.encoder, pair.decoder.net):
        for parameter in net.layers[-1].parameters():
            parameter.zero_()
    elbo, zero = _mean_elbo(pair, columns), copy.deepcopy(pair.parameters)
    for parameter, value in zip(pair.parameters, first, strict=True):
        parameter.copy_(value)
    return elbo, zero


@torch.no_grad()
def _mean_elbo(pair: CorrectedPair, columns: Batch) -> float:
    """Return the ELBO of rows, with the same noise in each call."""
    batches = zip(*(column.split(_BATCH_SIZE) for column in columns), strict=True)
    with seeded(0):
        sums = [pair.elbo(batch, _HELD_OUT_PARTICLES).mean(0).sum() for batch in batches]
    return sum(sums).item() / len(columns[0])


def rows_of_numbers(x: Tensor) -> Tensor:
    """Return x as rows of floating-point numbers (B, D), with zeros for missing numbers."""
    rows = x.reshape(len(x), -1)
    if not rows.is_floating_point():
        return rows.to(torch.get_default_dtype())
    return rows.where(rows.isfinite(), 0.0)
