"""The gain in log p(x) of held-out data from a better prior, and from a larger decoder."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
            prior = fit_prior(codes_of_train)
        except (ValueError, torch.linalg.LinAlgError) as error:
            note = first_line(error)
            return Improvements(None, None, note, note)
        of_prior = codes_of_test.gains(prior)
        if decoder_data is None:
            return Improvements(of_prior, None, "", "it was not asked for")
        try:
            before = pair.with_correction(decoder_data, latents, prior)
            correction = CorrectedDecoder(model, first, names)
        except (ValueError, TypeError) as error:
            return Improvements(of_prior, None, "", first_line(error))
        of_decoder = _decoder_gain(before, correction, decoder_data, test, advance)
        return Improvements(of_prior, of_decoder)


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

    def with_correction(
        self, columns: Batch, latents: UnconstrainedLatents, prior: GaussianMixture | None
    ) -> CorrectedPair:
        """Return the pair with another prior, and a correction of the encoder that is not trained.

        Raises:
            ValueError: The guide has no parameters for each data point.
        """
        first = self._first(columns)
        members = local_members(self.guide, first)
        parameters = members.parameters_of(*first)
        inputs = rows_of_numbers(columns[0]).to(parameters)
        encoder = Correction(inputs, parameters.shape[1])
        return CorrectedPair(self.model, members, latents, prior, encoder, None, self.options)

    def _first(self, columns: Batch) -> Batch:
        return tuple(column[:_BATCH_SIZE].to(self.device) for column in columns)


def _decoder_gain(
    before: CorrectedPair,
    decoder: CorrectedDecoder,
    train: Batch,
    test: Batch,
    advance: Callable[[int], None],
) -> Tensor:
    """Return log p(x) of each test data point with a corrected decoder, minus that without.

    A correction of the encoder is trained first, with the decoder as it is, and again with the
    correction of the decoder. So errors of the encoder cancel in the difference.
    """
    device = before.encoder.loc.device
    train, test = (tuple(column.to(device) for column in columns) for columns in (train, test))
    train_corrections(before, train, advance)
    first = tuple(column[:_BATCH_SIZE] for column in train)
    decoder.net = Correction(decoder.features(before.terms(first, 1).samples), decoder.num_outputs)
    after = replace(before, encoder=copy.deepcopy(before.encoder), decoder=decoder)
    train_corrections(after, train, advance)
    gains = []
    for start in range(0, len(test[0]), _BATCH_SIZE):
        batch = tuple(column[start : start + _BATCH_SIZE] for column in test)
        gains.append(_log_evidence(after, batch) - _log_evidence(before, batch))
    return torch.cat(gains).cpu()


def _log_evidence(pair: CorrectedPair, batch: Batch) -> Tensor:
    log_weight = pair.log_weight(batch, _PARTICLES_OF_GAIN).double()
    return log_weight.logsumexp(0) - math.log(len(log_weight))
