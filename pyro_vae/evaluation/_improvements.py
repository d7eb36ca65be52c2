"""The gain in log p(x) of held-out data from a better prior, and from a larger decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae._programs.local_offsets import LocalMembers, local_members
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import device_of
from pyro_vae._programs.terms import Terms, terms
from pyro_vae._utils.messages import first_line
from pyro_vae.datasets._minibatches import Batch, Minibatches
from pyro_vae.evaluation._context import evaluation_context
from pyro_vae.evaluation._decoder_fit import (
    CorrectedDecoder,
    CorrectedPair,
    Correction,
    rows_of_numbers,
    train_corrections,
)
from pyro_vae.evaluation._prior_fit import (
    GaussianMixture,
    UnconstrainedLatents,
    WeightedCodes,
    fit_prior,
)

_PARTICLES_OF_FIT = 50
_PARTICLES_OF_GAIN = 500
_BATCH_SIZE = 100
# Far from the encoder, rounding errors of log q(z|x) could be larger than the ELBO.
_MOST_OF_ENCODER = 4.0  # change of a parameter of the guide, in unconstrained space


@dataclass(frozen=True)
class Improvements:
    """Gains in log p(x) of the test data, in nats, float64 on the CPU.

    Attributes:
        prior: the gain of each data point from the best mixture of Gaussians in place of the prior,
            shape (N,). None if it is unknown.
        decoder: the further gain from a network that corrects the decoder, shape (N,). None if it
            is unknown.
        prior_note: the reason why ``prior`` is None.
        decoder_note: the reason why ``decoder`` is None.
    """

    prior: Tensor | None
    decoder: Tensor | None
    prior_note: str = ""
    decoder_note: str = ""


def improvements(
    model: Program,
    guide: Program,
    train: Batch,
    test: Batch,
    posteriors: Sequence[tuple[LocalMembers | None, Tensor | None]],
    *,
    decoder_data: Batch | None,
    vectorize_particles: bool | None,
    seed: int | None,
    advance: Callable[[int], None],
) -> Improvements:
    """Estimate what a better prior and a larger decoder gain in log p(x) of the test data.

    Both are fitted to the training data, and measured on the test data.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        train: training data in random order, in memory.
        test: test data, in memory.
        posteriors: for both, the members and the parameters (N, P) from which latents are sampled.
            Members of None are those of the guide's family. Parameters of None sample from the
            guide itself.
        decoder_data: training data in random order for the correction of the decoder, in memory.
            None does not train it.
        vectorize_particles: see :func:`pyro_vae.terms`.
        seed: of all samples and networks.
        advance: called with the number of finished epochs.
    """
    device = device_of(model, guide)
    batches = Minibatches(train, _BATCH_SIZE, device=device)
    with evaluation_context(
        "diagnose",
        model,
        guide,
        batches,
        vectorize_particles=vectorize_particles,
        seed=seed,
        needs_latents=True,
        may_fold=False,
    ) as options:
        pair = _EvaluatedPair(model, guide, options, device)
        first = batches.first()
        try:
            names = list(terms(model, guide, *first).samples)
            latents = UnconstrainedLatents(model, first, names)
            codes_of_train, codes_of_test = (
                pair.codes(columns, latents, *posterior, num_particles)
                for columns, posterior, num_particles in zip(
                    (train, test), posteriors, (_PARTICLES_OF_FIT, _PARTICLES_OF_GAIN), strict=True
                )
            )
        except (ValueError, torch.linalg.LinAlgError) as error:
            note = first_line(error)
            return Improvements(None, None, note, note)
        prior, prior_note = None, ""
        try:
            prior = fit_prior(codes_of_train)
        except (ValueError, torch.linalg.LinAlgError) as error:
            prior_note = first_line(error)
        of_prior = codes_of_test.gains(prior)
        shown = None if prior_note else of_prior
        if decoder_data is None:
            return Improvements(shown, None, prior_note)
        try:
            corrected = pair.corrected(decoder_data, latents, prior, names)
            train_corrections(corrected, tuple(c.to(device) for c in decoder_data), advance)
        except (ValueError, TypeError) as error:
            return Improvements(shown, None, prior_note, first_line(error))
        before = codes_of_test.log_evidence() + of_prior
        batches = Minibatches(test, _BATCH_SIZE, device=device)
        after = torch.cat([_log_evidence(corrected, batch) for batch in batches]).cpu()
        return Improvements(shown, after - before, prior_note)


@dataclass(frozen=True)
class _EvaluatedPair:
    """A pair in evaluation mode, with ``options`` of :func:`pyro_vae.terms`."""

    model: Program
    guide: Program
    options: dict[str, Any]
    device: torch.device

    def codes(
        self,
        columns: Batch,
        latents: UnconstrainedLatents,
        members: LocalMembers | None,
        parameters: Tensor | None,
        num_particles: int,
    ) -> WeightedCodes:
        """Sample the latents of some data from given posteriors; see :func:`improvements`."""
        rows = None if parameters is None else parameters.to(self.device).split(_BATCH_SIZE)
        if rows is not None and members is None:
            members = local_members(self.guide, self._first(columns))

        def draw(number: int, batch: Batch) -> Terms:
            def member(*batch: Tensor) -> Any:
                return members.sample(rows[number], *batch)

            program = self.guide if rows is None else member
            options = {"num_particles": num_particles, **self.options}
            return terms(self.model, program, *batch, **options)

        batches = Minibatches(columns, _BATCH_SIZE, device=self.device)
        return WeightedCodes.of(draw, list(batches), latents)

    def corrected(
        self,
        columns: Batch,
        latents: UnconstrainedLatents,
        prior: GaussianMixture | None,
        names: list[str],
    ) -> CorrectedPair:
        """Return the pair with another prior, and corrections that are not trained.

        Raises:
            ValueError: The parameters of the guide or of the likelihood are not known.
        """
        first = self._first(columns)
        decoder = CorrectedDecoder(self.model, first, names)
        members = local_members(self.guide, first)
        parameters = members.parameters_of(*first)
        inputs = rows_of_numbers(columns[0]).to(parameters)
        encoder = Correction(inputs, parameters.shape[1], bound=_MOST_OF_ENCODER)
        samples = terms(self.model, self.guide, *first).samples
        decoder.net = Correction(decoder.features(samples), decoder.num_outputs)
        return CorrectedPair(self.model, members, latents, prior, encoder, decoder, self.options)

    def _first(self, columns: Batch) -> Batch:
        return tuple(column[:_BATCH_SIZE].to(self.device) for column in columns)


def _log_evidence(pair: CorrectedPair, batch: Batch) -> Tensor:
    log_weight = pair.log_weight(batch, _PARTICLES_OF_GAIN).double()
    return log_weight.logsumexp(0) - math.log(len(log_weight))
