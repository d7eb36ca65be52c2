"""Sample codes for ELBO surgery, and score them under the posteriors of other data points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyro_vae._programs.terms import Terms, terms
from pyro_vae._utils.random import seeded
from pyro_vae.datasets._minibatches import Batch, Minibatches
from pyro_vae.evaluation._delta_sites import has_one_prior
from pyro_vae.evaluation._group import lazy_batches
from pyro_vae.evaluation._runner import Part, Runner
from pyro_vae.evaluation._scoring import guide_log_prob, require_one_density
from pyro_vae.evaluation._surgery.aggregate import require_one_mask
from pyro_vae.evaluation._surgery.codes import Codes, TermAverages
from pyro_vae.evaluation._surgery.control import moments
from pyro_vae.evaluation._surgery.dimensions import (
    has_independent_prior,
    information_of_dimensions,
)
from pyro_vae.evaluation._surgery.gaussians import DiagonalGaussians
from pyro_vae.evaluation._surgery.information import (
    Block,
    Rows,
    of_gaussians,
    of_guide,
    score_all,
)
from pyro_vae.evaluation._surgery.pairwise import log_densities
from pyro_vae.evaluation._surgery.random_part import RandomPart
from pyro_vae.evaluation._surgery.subsets import Estimator, random_subsets, subset_information

# The codes that are scored by default if the guide is run on all pairs.
_PAIRS = 10_000_000  # at most, which takes some minutes
_FEWEST_BY_DEFAULT = 200  # data points


@dataclass(frozen=True)
class CodeScores:
    """The terms and scores of the codes of N data points, float64 on the CPU.

    Args:
        averages: averages of the terms, from the runs of the pair.
        information: moments of log q(z|x_n) - log q_agg(z) over the codes of each data point,
            (N, 2).
        done: whether the information of a data point is computed, (N,).
        part: the data points whose codes are scored; None for all.
        of_dimensions: contribution of each data point to the mutual information of each dimension,
            summed over the dimensions, (N,); None if it is not known.
        one_prior: whether all data points have the same prior.
        num_data: N, the number of all data points, with or without codes.
        num_particles: K.
        parts: results that a resumed call does not compute again.
    """

    averages: TermAverages
    information: Tensor
    done: Tensor
    part: RandomPart | None
    of_dimensions: Tensor | None
    one_prior: bool
    num_data: int
    num_particles: int
    parts: list[Part]


class CodeScorer:
    """Draws codes for a process's share of the data, and scores them.

    Args:
        runner: of the evaluation.
        num_particles: K.

    Raises:
        ValueError: The guide has masks that differ between data points.
    """

    def __init__(self, runner: Runner, num_particles: int):
        self._runner, self._group, self._num_particles = runner, runner.group, num_particles
        model, guide, batches = runner.model, runner.guide, runner.batches
        self._model, self._guide, self._batches = model, guide, batches
        self._first = batches.first()
        require_one_mask(guide, batches)
        self._gaussian = DiagonalGaussians.is_diagonal_gaussian(guide, self._first)
        self._one_prior = has_one_prior(model, guide, batches.spread())
        if not self._gaussian and batches.columns is None:
            # The guide runs on all data once per block, and a stream may differ each time.
            columns = batches.in_memory()
            self._batches = Minibatches(columns, batches.batch_size, device=batches.device)
        self._codes: list[Codes] = []
        self._posteriors: list[DiagonalGaussians] = []
        if self._gaussian:  # a start without rows, for a process without data
            self._posteriors.append(DiagonalGaussians.read(guide, self._first).none())

    def exact(self, num_scored: int | None) -> CodeScores:
        """Score codes under the posteriors of all data points.

        A resumed call samples the same codes, and scores those without a score. Sampling takes far
        less time than scoring, and an interrupt of it leaves no result.

        Args:
            num_scored: the number of random data points whose codes are scored. None is all data
                points for diagonal Gaussians, and otherwise as many as keep the pairs below a
                limit.

        Raises:
            KeyboardInterrupt: An interrupt came before any code was scored.
            ValueError: The interrupted call had another number of data points.
        """
        parts = self._runner.map_batches(self._draw, lazy_batches(self._batches), last=False)
        if self._runner.interrupted:
            raise KeyboardInterrupt
        index = self._own_data(parts)
        averages = TermAverages.of_parts(parts)
        num_data = len(averages.rate)
        information = torch.zeros(num_data, 2, dtype=torch.float64)
        done = torch.zeros(num_data, dtype=torch.bool)
        if self._runner.done:
            ((information, done),) = self._runner.done
            if len(done) != num_data:
                raise ValueError(
                    f"resume is of a call with {len(done)} data points, got {num_data} data "
                    "points. Pass the data of that call"
                )
        part = self._part(averages.rate, num_scored)
        information, done, of_dimensions = information[index], done[index], None
        # All rows are a slice, because an index would copy the codes.
        rows: Rows = slice(None)
        if part is not None:
            rows = torch.isin(index, part.chosen).nonzero().squeeze(1)
        some, some_done = information[rows], done[rows]
        none = torch.zeros(self._num_particles, 0, dtype=torch.float64)
        try:
            block = self._block(index, rows, num_data, int((~some_done).sum()))
            noise = torch.cat([none, *(each.noise for each in self._codes)], dim=1)[:, rows]
            score_all(self._group, block, noise, some, some_done, self._advance_scored)
            if part is not None:
                self._advance_scored(num_data - len(part.chosen))
            of_dimensions = self._of_dimensions()
        except KeyboardInterrupt:
            self._group.stop()
        information[rows], done[rows] = some, some_done
        (information, done), of_dimensions = self._gather(index, (information, done), of_dimensions)
        if not done.any():
            raise KeyboardInterrupt
        return CodeScores(
            averages=averages,
            information=information,
            done=done,
            part=part,
            of_dimensions=of_dimensions,
            one_prior=self._one_prior,
            num_data=num_data,
            num_particles=self._num_particles,
            parts=[(information, done)],
        )

    def of_subsets(self, estimator: Estimator, size: int) -> CodeScores:
        """Score the codes of random minibatches under the posteriors of each.

        Args:
            estimator: "weighted" or "stratified".
            size: M, data points of a minibatch.

        Raises:
            KeyboardInterrupt: An interrupt came before any code was scored.
            ValueError: A minibatch has fewer than two data points.
        """
        columns, known = self._batches.in_memory(), self._runner.done
        num_data, all_rows = len(columns[0]), random_subsets(len(columns[0]), size)

        def read(rows: Tensor) -> Batch:
            return tuple(column[rows.to(column.device)] for column in columns)

        def score(batch: Batch) -> Part:
            t = self._run(batch)
            codes = Codes.of(t, self._read(batch))
            self._keep(codes.posteriors)
            pairs = self._pairs(batch, codes)
            information = subset_information(pairs, num_data, estimator).cpu()
            return *TermAverages.part(t), moments(information, codes.noise)

        for rows in all_rows[: len(known)][self._group.rank :: self._group.num_processes]:
            with seeded(0):  # the samples of the guide are not used
                self._keep(self._read(read(rows)))
        parts = self._runner.map_batches(
            score,
            [(len(rows), partial(read, rows)) for rows in all_rows],
            done=known,
            steps_per_row=1 + self._num_particles,
            last=False,
        )
        of_dimensions = None
        if not self._runner.interrupted:
            try:
                of_dimensions = self._of_dimensions()
            except KeyboardInterrupt:
                self._group.stop()
            _, of_dimensions = self._gather(self._own_data(parts, len(known)), (), of_dimensions)
        information = torch.cat([part[-1] for part in parts])
        return CodeScores(
            averages=TermAverages.of_parts([part[:-1] for part in parts]),
            information=information,
            done=torch.ones(len(information), dtype=torch.bool),
            part=None,
            of_dimensions=of_dimensions,
            one_prior=self._one_prior,
            num_data=num_data,
            num_particles=self._num_particles,
            parts=parts,
        )

    def _run(self, batch: Batch) -> Terms:
        options = {"num_particles": self._num_particles, **self._runner.particle_options}
        return terms(self._model, self._guide, *batch, **options)

    def _draw(self, batch: Batch) -> Part:
        t = self._run(batch)
        self._codes.append(Codes.of(t, self._read(batch)))
        self._keep(self._codes[-1].posteriors)
        return TermAverages.part(t)

    def _read(self, batch: Batch) -> DiagonalGaussians | None:
        return DiagonalGaussians.read(self._guide, batch) if self._gaussian else None

    def _keep(self, posteriors: DiagonalGaussians | None) -> None:
        if posteriors is not None:
            self._posteriors.append(posteriors)

    def _own_data(self, parts: Sequence[Part], num_known: int = 0) -> Tensor:
        """Return the numbers of this process's data points, in the order of its posteriors."""
        rank, step = self._group.rank, self._group.num_processes
        numbers = torch.arange(sum(len(part[0]) for part in parts))
        of_parts = numbers.split([len(part[0]) for part in parts])
        own = [*of_parts[:num_known][rank::step], *of_parts[num_known:][rank::step]]
        return torch.cat([numbers[:0], *own])

    def _part(self, rate: Tensor, num_scored: int | None) -> RandomPart | None:
        """Return the data points whose codes are scored, the same for a seed; None for all.

        The part has strata by rate, because the information and the rate rise together.
        """
        if num_scored is None and not self._gaussian:
            num_scored = max(_FEWEST_BY_DEFAULT, _PAIRS // (self._num_particles * len(rate)))
        if num_scored is None or num_scored >= len(rate):
            return None
        return RandomPart.choose(rate, num_scored, self._runner.seed)

    def _advance_scored(self, num_data: int) -> None:
        self._runner.advance(num_data * self._num_particles)

    def _block(self, index: Tensor, rows: Rows, num_data: int, num_to_score: int) -> Block:
        """Return the scoring of codes.

        Args:
            index: the number of each data point of this process among all.
            rows: the data points of this process whose codes are scored, rows of ``index``.
            num_data: N.
            num_to_score: how many of these have no score yet.
        """
        codes = self._codes
        if self._gaussian:
            q = DiagonalGaussians.concatenate(self._posteriors)
            none = q.loc[:0].expand(self._num_particles, -1, -1)
            values = torch.cat([none, *(some.values for some in codes)], dim=1)
            return of_gaussians(self._group, q, values[:, rows], rows)
        names = codes[0].values if codes else ()
        by_site = {name: torch.cat([some.values[name] for some in codes], dim=1) for name in names}
        none = torch.zeros(self._num_particles, 0, device=self._batches.device)
        log_guide = torch.cat([none, *(some.log_guide for some in codes)], dim=1)
        return of_guide(
            self._group,
            self._guide,
            self._batches,
            {name: value[:, rows] for name, value in by_site.items()},
            log_guide[:, rows],
            index=index[rows],
            num_data=num_data,
            num_to_score=num_to_score,
            **self._runner.particle_options,
        )

    def _pairs(self, batch: Batch, codes: Codes) -> Tensor:
        """Score the codes of a minibatch under the posteriors of its M data points, (K, M, M)."""
        if (q := codes.posteriors) is not None:
            return log_densities(q.loc, q.scale, codes.values)
        rows = {name: value.flatten(0, 1) for name, value in codes.values.items()}
        log_prob = guide_log_prob(self._guide, batch, rows, **self._runner.particle_options)
        pairs = log_prob.reshape(*codes.log_guide.shape, -1)
        require_one_density(codes.log_guide, pairs.diagonal(dim1=1, dim2=2))
        return pairs

    def _of_dimensions(self) -> Tensor | None:
        """Return each data point's information, summed over dimensions.

        None if it is unknown, or if the dimensions of the prior are dependent. The dimension-wise
        KL is then not the rate minus this information.
        """
        self._runner.advance(0, "dimensions")
        if not self._gaussian or not self._one_prior:
            return None
        q = DiagonalGaussians.concatenate(self._posteriors)
        if not q.real or len(q.sites) != 1:
            return None
        if not has_independent_prior(self._model, self._guide, self._first):
            return None
        parts = information_of_dimensions(q, self._group)
        return None if parts is None else parts.sum(1).cpu()

    def _gather(
        self, index: Tensor, columns: Sequence[Tensor], of_dimensions: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Gather the columns of all processes, in the order of the data points."""
        shares = self._group.gather_last((index, columns, of_dimensions))
        indices, columns_of, of_dimensions_of = zip(*shares, strict=True)
        order = torch.cat(indices).argsort()
        columns = [torch.cat(each)[order] for each in zip(*columns_of, strict=True)]
        if any(each is None for each in of_dimensions_of):
            return columns, None
        return columns, torch.cat(of_dimensions_of)[order]
