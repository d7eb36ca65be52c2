"""The log-density of the aggregated posterior at given values of the latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Container

import torch
from torch import Tensor

from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.runs import as_guide, trace_of
from pyro_vae._programs.sites import data_frame, is_loss_of_guide, mask_of, random_sites
from pyro_vae.datasets._minibatches import Batch, Minibatches
from pyro_vae.evaluation._scoring import guide_log_prob
from pyro_vae.evaluation._surgery.gaussians import DiagonalGaussians
from pyro_vae.evaluation._surgery.pairwise import LOG_DENSITIES_AT_A_TIME, log_densities


class Aggregate:
    r"""The aggregated posterior :math:`q_{agg}(z) = \frac1N \sum_n q(z|x_n)` of N data points.

    Args:
        guide: program of q(z|x).
        batches: the data. Their order must not change.
        plate_nesting: the number of batch dimensions that the guide uses.
        vectorize_particles: score many latents in one run of the guide.
    """

    def __init__(
        self, guide: Program, batches: Minibatches, *, plate_nesting: int, vectorize_particles: bool
    ):
        self._guide, self._batches = guide, batches
        self._how = {"plate_nesting": plate_nesting, "vectorize_particles": vectorize_particles}
        self._gaussians: DiagonalGaussians | None = None
        self.num_data = sum(len(batch[0]) for batch in batches)
        first = batches.first()
        if (
            DiagonalGaussians.is_diagonal_gaussian(guide, first)
            and DiagonalGaussians.read(guide, first).real
        ):
            parts = [DiagonalGaussians.read(guide, batch) for batch in batches]
            self._gaussians = DiagonalGaussians.concatenate(parts)

    def log_prob(
        self,
        values: dict[str, Tensor],
        without: Tensor | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> Tensor:
        """Return log q_agg of M values.

        Args:
            values: by latent site, ``(M, *inner plates, *event)``.
            without: for each value, the number of a data point to leave out of q_agg, (M,). The
                average is then over N - 1 posteriors.
            advance: called with the number of values that were scored.

        Returns:
            Shape (M,), in nats, float64.

        Raises:
            ValueError: The guide cannot score values that it did not sample.
        """
        count = len(next(iter(values.values())))
        at_once = self.num_data
        if self._gaussians is None:  # running the guide costs more than a density per pair
            at_once = max(at_once, 100 * self._batches.batch_size)
        rows_at_a_time = max(1, LOG_DENSITIES_AT_A_TIME // at_once)
        found = []
        for start in range(0, count, rows_at_a_time):
            rows = slice(start, start + rows_at_a_time)
            scores = self._pairs({name: value[rows] for name, value in values.items()})
            if without is not None:
                scores = scores.scatter(1, without[rows].unsqueeze(1), -math.inf)
            found.append(scores.logsumexp(1))
            advance(len(found[-1]))
        return torch.cat(found) - math.log(self.num_data - (without is not None))

    def _pairs(self, values: dict[str, Tensor]) -> Tensor:
        """Score M values under the posterior of each of N data points, (M, N)."""
        if (q := self._gaussians) is not None:
            rows = [values[name].double().reshape(len(values[name]), -1) for name in q.sites]
            return log_densities(q.loc, q.scale, torch.cat(rows, dim=1))
        scores = [
            guide_log_prob(self._guide, batch, values, **self._how) for batch in self._batches
        ]
        return torch.cat(scores, dim=1).double()


def require_one_mask(guide: Program, batches: Minibatches) -> None:
    """Raise ValueError unless each mask of the guide is the same for all data points.

    Masked elements then count under no posterior. So q_agg is a density of the other elements.

    Args:
        guide: program of q(z|x).
        batches: the data. If the guide has no masks on the first minibatch, no other one is read.

    Raises:
        ValueError: A mask differs between data points.
    """
    known = _mask_rows(guide, batches.first())
    for batch in batches if known else ():
        for name, row in _mask_rows(guide, batch, known).items():
            if name not in known or not torch.equal(*torch.broadcast_tensors(row, known[name])):
                raise _differs(name)


def _mask_rows(guide: Program, batch: Batch, known: Container[str] = ()) -> dict[str, Tensor]:
    """Return the mask of the first data point, by site, for sites with a mask or of known names.

    Raises:
        ValueError: The mask of a site differs between two data points.
    """
    rows = {}
    for site in random_sites(trace_of(as_guide(guide), *batch)):
        mask = None if is_loss_of_guide(site) else mask_of(site)
        if mask is None and site["name"] not in known:
            continue
        mask = torch.as_tensor(True if mask is None else mask)
        first, dim = mask, data_frame(site).dim - site["fn"].event_dim
        if mask.dim() >= -dim:
            first = mask.narrow(dim, 0, 1)
            if not (mask == first).all():
                raise _differs(site["name"])
        rows[site["name"]] = first
    return rows


def _differs(name: str) -> ValueError:
    return ValueError(
        f"guide site {name!r} has a mask that differs between data points. The aggregated "
        "posterior needs the density of each code under the posteriors of all data points. Pass a "
        "guide without such masks"
    )


def refuse_masks(guide: Program, batch: Batch) -> None:
    """Raise ValueError if a mask of the guide can differ between data points.

    A guide with such a mask has no aggregated posterior.

    Raises:
        ValueError: The guide has such a mask.
    """
    for site in random_sites(trace_of(as_guide(guide), *batch)):
        mask = None if is_loss_of_guide(site) else mask_of(site)
        if isinstance(mask, Tensor) and mask.numel() > 1:
            raise ValueError(
                f"guide site {site['name']!r} has a mask that may differ between data points. The "
                "aggregated posterior needs the density of each code under the posteriors of all "
                "data points. Pass a guide without such masks"
            )
