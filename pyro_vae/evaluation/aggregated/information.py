r"""How much a code tells about its datum: log q(z|x_n) - log q_agg(z) for codes z drawn for x_n.

With q_agg(z) = (1/N) sum_j q(z|x_j), its average is the mutual information I_q[n, z] (Hoffman &
Johnson 2016, sec. 3). Each code is scored under the posteriors of all N data points: by matrix
products if they are diagonal Gaussians, else by running the guide on the given codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_vae.evaluation.aggregated.gaussians import DiagonalGaussians
from pyro_vae.evaluation.aggregated.pairs import log_sum_of_ratios
from pyro_vae.evaluation.scoring import guide_log_prob
from pyro_vae.minibatches import Minibatches
from pyro_vae.traces import Program

LOG_DENSITIES_AT_A_TIME = 4_000_000  # 32 MB of float64


def _ignore(count: int) -> None:
    """Show no progress."""


def gaussian_information(
    q: DiagonalGaussians, codes: Tensor, advance: Callable[[int], None] = _ignore
) -> Tensor:
    """Return log q(z|x_n) - log q_agg(z), averaged over the codes z of each datum.

    Args:
        q: the posteriors of all N data points.
        codes: draws from them, (K, N, d).
        advance: called with the number of codes that were scored.

    Returns:
        Shape (N,), in nats.
    """
    log_sums = [log_sum_of_ratios(q.loc, q.scale, z, advance) for z in codes]
    return math.log(len(q.loc)) - torch.stack(log_sums).mean(0)


def scored_information(
    guide: Program,
    batches: Minibatches,
    codes: Sequence[dict[str, Tensor]],
    log_guide: Tensor,
    plate_nesting: int,
    vectorize_particles: bool,
    advance: Callable[[int], None] = _ignore,
) -> Tensor:
    """Return log q(z|x_n) - log q_agg(z) for given codes, by running the guide on them.

    Args:
        guide: program of q(z|x).
        batches: all N data points.
        codes: for each minibatch, the codes by latent site, each ``(K, B, *inner plates, *event)``.
        log_guide: log q(z|x_n) of each code under its own datum, (K, N).
        plate_nesting: how many batch dimensions the guide uses.
        vectorize_particles: score many codes in one run of the guide.
        advance: called with the number of codes that were scored.

    Returns:
        Shape (N,), averaged over the K codes of each datum, in nats.

    Raises:
        ValueError: the guide cannot be scored at given codes.
    """
    log_q_agg = []
    for code in codes:
        shape = next(iter(code.values())).shape[:2]
        flat = {name: value.flatten(0, 1) for name, value in code.items()}
        rows_at_a_time = max(1, LOG_DENSITIES_AT_A_TIME // (100 * batches.batch_size))
        total = []
        for start in range(0, shape.numel(), rows_at_a_time):
            rows = {name: value[start : start + rows_at_a_time] for name, value in flat.items()}
            scores = [
                guide_log_prob(
                    guide,
                    batch,
                    rows,
                    plate_nesting=plate_nesting,
                    vectorize_particles=vectorize_particles,
                ).double()
                for batch in batches
            ]
            total.append(torch.cat(scores, dim=1).logsumexp(1))
            advance(len(total[-1]))
        log_q_agg.append(torch.cat(total).reshape(shape))
    log_q_agg = torch.cat(log_q_agg, dim=1) - math.log(log_guide.shape[1])
    return (log_guide.double() - log_q_agg).mean(0)
