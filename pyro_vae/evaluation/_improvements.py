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
    decoder: bool,
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
        decoder: whether to train the correction of a decoder.
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
        first = batches.first()
        try:
            names = list(terms(model, guide, *first).samples)
            latents = UnconstrainedLatents(model, first, names)
            members = local_members(guide, first)
        except (ValueError, TypeError) as error:
            note = first_line(error)
            return Improvements(None, None, note, note)
        try:
            codes = [
                _codes(model, guide, own or members, columns, rows, latents, count, options, device)
                for (own, rows), columns, count in zip(
                    posteriors,
                    (train, test),
                    (_PARTICLES_OF_FIT, _PARTICLES_OF_GAIN),
                    strict=True,
                )
            ]
            prior = fit_prior(codes[0])
        except (ValueError, torch.linalg.LinAlgError) as error:
            note = first_line(error)
            return Improvements(None, None, note, note)
        of_prior = codes[1].gains(prior)
        if not decoder:
            return Improvements(of_prior, None, "", "it was not asked for")
        try:
            of_decoder = _decoder_gain(
                model, members, latents, names, prior, train, test, options, device, advance
            )
        except ValueError as error:
            return Improvements(of_prior, None, "", first_line(error))
    return Improvements(of_prior, of_decoder)


def _codes(
    model: Program,
    guide: Program,
    members: LocalMembers,
    columns: Batch,
    parameters: Tensor | None,
    latents: UnconstrainedLatents,
    num_particles: int,
    options: dict[str, Any],
    device: torch.device,
) -> WeightedCodes:
    """Sample the latents of some data from the best members, or from the guide."""
    rows = None if parameters is None else parameters.to(device).split(_BATCH_SIZE)

    def draw(number: int, batch: Batch) -> Terms:
        def member(*batch: Tensor) -> Any:
            return members.sample(rows[number], *batch)

        program = guide if rows is None else member
        return terms(model, program, *batch, num_particles=num_particles, **options)

    batches = list(Minibatches(columns, _BATCH_SIZE, device=device))
    return WeightedCodes.of(draw, batches, latents)


def _decoder_gain(
    model: Program,
    members: LocalMembers,
    latents: UnconstrainedLatents,
    names: list[str],
    prior: GaussianMixture | None,
    train: Batch,
    test: Batch,
    options: dict[str, Any],
    device: torch.device,
    advance: Callable[[int], None],
) -> Tensor:
    """Return log p(x) of each test data point with a corrected decoder, minus that without.

    A corrected encoder is trained first, with the decoder as it is, and again with the correction
    of the decoder. So errors of the encoder cancel in the difference.
    """
    train, test = (tuple(column.to(device) for column in columns) for columns in (train, test))
    first = tuple(column[:_BATCH_SIZE] for column in train)
    decoder = CorrectedDecoder(model, first, names)
    rows = members.parameters_of(*first)
    encoder = Correction(rows_of_numbers(train[0]).to(rows.dtype), rows.shape[1])
    before = CorrectedPair(model, members, latents, prior, encoder, None, options)
    train_corrections(before, train, advance)
    samples = decoder.features(before.terms(first, 1).samples)
    decoder.net = Correction(samples, decoder.num_outputs)
    after = replace(before, encoder=copy.deepcopy(encoder), decoder=decoder)
    train_corrections(after, train, advance)
    gains = []
    for number in range(0, len(test[0]), _BATCH_SIZE):
        batch = tuple(column[number : number + _BATCH_SIZE] for column in test)
        old, new = (_log_evidence(pair, batch) for pair in (before, after))
        gains.append(new - old)
    return torch.cat(gains).cpu()


def _log_evidence(pair: CorrectedPair, batch: Batch) -> Tensor:
    log_weight = pair.log_weight(batch, _PARTICLES_OF_GAIN).double()
    return log_weight.logsumexp(0) - math.log(len(log_weight))
