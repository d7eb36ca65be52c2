"""The codes that ELBO surgery draws, and how likely each is under the posteriors of other data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.terms import Terms, terms
from pyro_vae._utils.random import seeded
from pyro_vae.datasets._minibatches import Batch, Minibatches
from pyro_vae.evaluation._delta_sites import has_one_prior
from pyro_vae.evaluation._scoring import guide_log_prob, require_one_density
from pyro_vae.evaluation._surgery.aggregate import refuse_masks
from pyro_vae.evaluation._surgery.codes import Codes, TermAverages
from pyro_vae.evaluation._surgery.dimensions import dimension_wise_kl, independent_prior
from pyro_vae.evaluation._surgery.gaussians import DiagonalGaussians
from pyro_vae.evaluation._surgery.information import Block, of_gaussians, of_guide, score_all
from pyro_vae.evaluation._surgery.pairwise import log_densities
from pyro_vae.evaluation._surgery.subsets import Estimator, random_subsets, subset_information
from pyro_vae.evaluation._together import Together
from pyro_vae.evaluation._walking import Sized, minibatches, walk

Part = tuple[Tensor, ...]


@dataclass(frozen=True)
class CodeScores:
    """What was drawn and scored for N data, float64 on the CPU.

    Args:
        averages: of the runs of the pair.
        information: log q(z|x_n) - log q_agg(z), averaged over the codes of each datum, (N,).
        done: for which data it is there, (N,).
        of_dimensions: what each adds to the dimension-wise KL, (N,); None where it is not known.
        one_prior: whether all data have one prior.
        num_data: N, data that were not drawn for included.
        stopped: whether an interrupt ended it.
        parts: if so, what to go on from.
    """

    averages: TermAverages
    information: Tensor
    done: Tensor
    of_dimensions: Tensor | None
    one_prior: bool
    num_data: int
    stopped: bool
    parts: list[Part]


class CodeScorer:
    """Draws codes for a process's share of the data, and scores them.

    Args:
        together: the processes.
        model: program of p(x, z).
        guide: program of q(z|x).
        batches: all data.
        num_particles: K.
        how: plate_nesting and vectorize_particles; see :func:`pyro_vae.terms`.
        advance: called with the number of codes that were drawn or scored.

    Raises:
        ValueError: the guide has masks that differ from datum to datum.
    """

    def __init__(
        self,
        together: Together,
        model: Program,
        guide: Program,
        batches: Minibatches,
        *,
        num_particles: int,
        how: dict[str, object],
        advance: Callable[..., None],
    ):
        self._together, self._model, self._guide, self._batches = together, model, guide, batches
        self._num_particles, self._how, self._advance = num_particles, how, advance
        self._first = batches.first()
        refuse_masks(guide, self._first)
        self._gaussian = DiagonalGaussians.is_diagonal_gaussian(guide, self._first)
        self._one_prior = has_one_prior(model, guide, batches.spread())
        if not self._gaussian and batches.tensors is None:
            # The guide is run on all data for each block of codes: a stream might draw them anew.
            columns = batches.in_memory()
            self._batches = Minibatches(columns, batches.batch_size, device=batches.device)
        self._codes: list[Codes] = []
        self._posteriors: list[DiagonalGaussians] = []
        if self._gaussian:  # those of no data, lest a process have no part
            self._posteriors.append(DiagonalGaussians.read(guide, self._first).none())

    def exact(self, known: Sequence[Part]) -> CodeScores:
        """Score each code under the posteriors of all data.

        An interrupt while codes are drawn, which takes far less time, leaves nothing.

        Args:
            known: the parts of what was stopped: its codes are drawn again, but not scored again.

        Raises:
            KeyboardInterrupt: there came an interrupt before any code was scored.
            ValueError: what is known is of another number of data.
        """
        parts, stopped = self._walk(minibatches(self._batches), self._draw)
        if stopped:
            raise KeyboardInterrupt
        index = self._own_data(parts)
        averages = TermAverages.of_parts(parts)
        num_data = len(averages.rate)
        information = torch.zeros(num_data, dtype=torch.float64)
        done = torch.zeros(num_data, dtype=torch.bool)
        if known:
            ((information, done),) = known
            if len(done) != num_data:
                raise ValueError(f"resume is of {len(done)} data, not of {num_data}")
        information, done, of_dimensions = information[index], done[index], None
        try:
            block = self._block(index, num_data)
            score_all(self._together, block, information, done, self._advance)
            of_dimensions = self._of_dimensions()
        except KeyboardInterrupt:
            self._together.stop()
        columns = [information, done]
        (information, done), of_dimensions, stopped = self._gathered(index, columns, of_dimensions)
        if not done.any():
            raise KeyboardInterrupt
        state = [(information, done)]
        found = (averages, information, done, of_dimensions, self._one_prior, num_data)
        return CodeScores(*found, stopped, state)

    def of_subsets(self, estimator: Estimator, size: int, known: Sequence[Part]) -> CodeScores:
        """Score the codes of random minibatches under the posteriors of each.

        Args:
            estimator: "weighted" or "stratified".
            size: M, data of a minibatch.
            known: the parts of what was stopped.

        Raises:
            KeyboardInterrupt: there came an interrupt before any code was scored.
            ValueError: there are fewer than two data in a minibatch.
        """
        columns = self._batches.in_memory()
        num_data, all_rows = len(columns[0]), random_subsets(len(columns[0]), size)

        def read(rows: Tensor) -> Batch:
            return tuple(column[rows.to(column.device)] for column in columns)

        def score(batch: Batch) -> Part:
            t = self._run(batch)
            codes = Codes.of(t, self._read(batch))
            self._keep(codes.posteriors)
            pairs = self._pairs(batch, codes)
            return *TermAverages.part(t), subset_information(pairs, num_data, estimator)

        for number, rows in enumerate(all_rows[: len(known)]):
            if number % self._together.num_processes == self._together.rank:
                with seeded(0):  # what the guide draws is not looked at
                    self._keep(self._read(read(rows)))
        sized = [(len(rows), partial(read, rows)) for rows in all_rows]
        parts, stopped = self._walk(sized, score, known, 1 + self._num_particles)
        of_dimensions = None
        if not stopped:
            try:
                of_dimensions = self._of_dimensions()
            except KeyboardInterrupt:
                self._together.stop()
            index = self._own_data(parts, len(known))
            _, of_dimensions, stopped = self._gathered(index, [], of_dimensions)
        information = torch.cat([part[-1] for part in parts])
        averages = TermAverages.of_parts([part[:-1] for part in parts])
        done = torch.ones(len(information), dtype=torch.bool)
        found = (averages, information, done, of_dimensions, self._one_prior, num_data)
        return CodeScores(*found, stopped, parts)

    def _walk(
        self,
        sized: Iterable[Sized],
        estimate: Callable[[Batch], Part],
        known: Sequence[Part] = (),
        steps: int = 1,
    ) -> tuple[list[Part], bool]:
        return walk(
            self._together,
            sized,
            estimate,
            done=known,
            advance=lambda count: self._advance(steps * count),
            last=False,
        )

    def _run(self, batch: Batch) -> Terms:
        how = {"num_particles": self._num_particles, **self._how}
        return terms(self._model, self._guide, *batch, **how)

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
        """Return the numbers of this process's data, in the order that it has their posteriors."""
        rank, step = self._together.rank, self._together.num_processes
        numbers = torch.arange(sum(len(part[0]) for part in parts))
        of_parts = numbers.split([len(part[0]) for part in parts])
        own = [*of_parts[:num_known][rank::step], *of_parts[num_known:][rank::step]]
        return torch.cat([numbers[:0], *own])

    def _block(self, index: Tensor, num_data: int) -> Block:
        codes = self._codes
        if self._gaussian:
            q = DiagonalGaussians.concatenate(self._posteriors)
            none = q.loc[:0].expand(self._num_particles, -1, -1)
            values = torch.cat([none, *(some.values for some in codes)], dim=1)
            return of_gaussians(self._together, q, values)
        names = codes[0].values if codes else ()
        by_site = {name: torch.cat([some.values[name] for some in codes], dim=1) for name in names}
        none = torch.zeros(self._num_particles, 0, device=self._batches.device)
        log_guide = torch.cat([none, *(some.log_guide for some in codes)], dim=1)
        run = (self._together, self._guide, self._batches)
        numbers = {"index": index, "num_data": num_data}
        return of_guide(*run, by_site, log_guide, **numbers, **self._how)

    def _pairs(self, batch: Batch, codes: Codes) -> Tensor:
        """Score the codes of a minibatch under its own data, (K, M, M)."""
        if (q := codes.posteriors) is not None:
            return log_densities(q.loc, q.scale, codes.values)
        rows = {name: value.flatten(0, 1) for name, value in codes.values.items()}
        log_prob = guide_log_prob(self._guide, batch, rows, **self._how)
        pairs = log_prob.reshape(*codes.log_guide.shape, -1)
        require_one_density(codes.log_guide, pairs.diagonal(dim1=1, dim2=2))
        return pairs

    def _of_dimensions(self) -> Tensor | None:
        """Return what each datum adds to the dimension-wise KL, where dimensions make sense."""
        self._advance(0, "dimensions")
        if not self._gaussian or not self._one_prior:
            return None
        q = DiagonalGaussians.concatenate(self._posteriors)
        if not q.real or len(q.sites) != 1:
            return None
        log_prior = independent_prior(self._model, self._guide, self._first)
        if log_prior is None:
            return None
        parts = dimension_wise_kl(q, log_prior, self._together)
        return None if parts is None else parts.sum(1)

    def _gathered(
        self, index: Tensor, columns: Sequence[Tensor], of_dimensions: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None, bool]:
        """Gather what all processes have of their data, in the order of the data."""
        known = of_dimensions is not None
        last = of_dimensions.cpu() if known else torch.zeros(len(index), dtype=torch.float64)
        tensors = [torch.tensor([known]), index, *columns, last]
        shares, stopped = self._together.gather_last(tensors)
        known, index, *columns = (torch.cat(each) for each in zip(*shares, strict=True))
        *columns, last = (column[index.argsort()] for column in columns)
        return columns, last if known.all() else None, stopped
