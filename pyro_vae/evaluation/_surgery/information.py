r"""The information of codes about their data points: log q(z|x_n) - log q_agg(z).

Here z is a code of x_n, and q_agg(z) = (1/N) sum_j q(z|x_j) is the aggregated posterior. The
average over codes is the mutual information I_q[x, z] (Hoffman & Johnson 2016, sec. 3).

Each code is scored under the posteriors of all N data points. Matrix products score diagonal
Gaussians. Any other guide is run on the given codes.

In a group, each process scores the codes of its own data points. It receives the Gaussians of the
other processes. A guide that is run on the codes runs in each process on all data, so nothing is
sent.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Normal

from pyro_vae._programs.pair_trace import Program
from pyro_vae._utils.random import seeded
from pyro_vae._utils.user_warnings import warn_user
from pyro_vae.datasets._minibatches import Minibatches
from pyro_vae.evaluation._group import Group
from pyro_vae.evaluation._scoring import guide_log_prob, require_one_density
from pyro_vae.evaluation._surgery.control import moments
from pyro_vae.evaluation._surgery.gaussians import DiagonalGaussians
from pyro_vae.evaluation._surgery.pairwise import (
    LOG_DENSITIES_AT_A_TIME,
    Extent,
    Gaussians,
    log_sums,
)

Rows = Tensor | slice  # numbers of rows on the CPU, which also index a tensor on a GPU

_GAUSSIANS_AT_A_TIME = 65_536  # between two checks for an interrupt, and in one message
_CODES = 16_384  # enough that scoring takes far longer than sending the Gaussians
_CODES_OF_A_THREAD = 4_096  # if nothing is sent; an interrupt loses some seconds of work
_LONG = 600.0  # seconds of scoring of which the user is warned
_MEASURED = 5.0  # seconds of scoring from which the whole time is estimated


@dataclass(frozen=True)
class Block:
    """The scoring of a process's codes, block by block.

    Args:
        size: number of data points in a block.
        score: returns the information of each code of the data points in a slice, (K, size).
    """

    size: int
    score: Callable[[slice], Tensor]


def of_gaussians(group: Group, q: DiagonalGaussians, codes: Tensor, scored: Rows) -> Block:
    """Return a block that scores codes of diagonal Gaussians by matrix products.

    Args:
        group: the processes.
        q: the posteriors of this process's data points.
        codes: K samples from each of n of them, (K, n, d).
        scored: the rows of these n in q.
    """
    extents = group.gather(Extent.of(q.loc, q.scale, codes) if len(q.loc) else None)
    counts = [0 if extent is None else int(extent.count) for extent in extents]
    extent = Extent.of_all([extent for extent in extents if extent is not None])
    extent = Extent(*(each.to(q.loc.device) for each in vars(extent).values()))
    alone = group.num_processes == 1 and q.loc.device.type == "cpu"
    size = _CODES_OF_A_THREAD * torch.get_num_threads() if alone else _CODES

    own_loc, own_scale = q.loc[scored], q.scale[scored]
    blocks = zip(*(each.split(_GAUSSIANS_AT_A_TIME) for each in (q.loc, q.scale)), strict=True)
    kept = [Gaussians(*some, extent.center) for some in blocks]

    def everyone() -> Iterator[Gaussians]:
        for source, count in enumerate(counts):
            for number, start in enumerate(range(0, count, _GAUSSIANS_AT_A_TIME)):
                if source == group.rank:
                    own = kept[number]
                    if group.num_processes > 1:
                        group.broadcast(torch.stack([own.loc, own.scale]), source)
                    yield own
                else:
                    size = min(_GAUSSIANS_AT_A_TIME, count - start)
                    received = q.loc.new_empty(2, size, q.loc.shape[1])
                    yield Gaussians(*group.broadcast(received, source), extent.center)

    def anywhere(here: bool) -> bool:
        return bool(group.sum(torch.tensor(int(here))))

    def score(rows: slice) -> Tensor:
        z = codes[:, rows]
        log_own = Normal(own_loc[rows], own_scale[rows]).log_prob(z).sum(2)
        found = log_sums(
            everyone, z.flatten(0, 1), log_own.flatten(), extent, anywhere, group.check
        )
        return math.log(sum(counts)) - found.reshape(log_own.shape)

    return Block(max(1, size // len(codes)), score)


def of_guide(
    group: Group,
    guide: Program,
    batches: Minibatches,
    codes: dict[str, Tensor],
    log_guide: Tensor,
    *,
    index: Tensor,
    num_data: int,
    num_to_score: int,
    plate_nesting: int,
    vectorize_particles: bool,
) -> Block:
    """Return a block that scores codes by running the guide on them.

    Args:
        group: the processes.
        guide: program of q(z|x).
        batches: all N data points, in the same order at each pass.
        codes: codes of n data points by latent site, each ``(K, n, *inner plates, *event)``.
        log_guide: log q(z|x_n) of each code under the posterior of its own data point, (K, n).
        index: the number of each of the n data points among the N, (n,).
        num_data: N.
        num_to_score: how many of the n data points will be scored.
        plate_nesting: the number of batch dimensions that the guide uses.
        vectorize_particles: score many codes in one run of the guide.
    """
    # Running the guide costs more than a density per pair.
    size = max(1, LOG_DENSITIES_AT_A_TIME // (100 * batches.batch_size) // len(log_guide))
    announce = _announcer(len(log_guide) * num_to_score, num_data)

    def score(rows: slice) -> Tensor:
        log_own = log_guide[:, rows].double()
        if not log_own.numel():
            return log_own
        some = {name: value[:, rows].flatten(0, 1) for name, value in codes.items()}
        total = torch.full_like(log_own.flatten(), -math.inf)
        own = index[rows].to(log_own.device).repeat(len(log_own)).unsqueeze(1)
        scored_own, start = torch.zeros_like(total), 0
        for batch in batches:
            group.check()
            scores = guide_log_prob(
                guide,
                batch,
                some,
                plate_nesting=plate_nesting,
                vectorize_particles=vectorize_particles,
            )
            total = torch.logaddexp(total, scores.double().logsumexp(1))
            numbers = torch.arange(start, start + len(batch[0]), device=own.device)
            scored_own += torch.where(own == numbers, scores.double(), 0.0).sum(1)
            start += len(batch[0])
            announce(scores.numel())
        require_one_density(log_own.flatten(), scored_own)
        return log_own + math.log(num_data) - total.reshape(log_own.shape)

    return Block(size, score)


def _announcer(num_codes: int, num_data: int) -> Callable[[int], None]:
    """Return a function to call with the number of pairs after each run of the guide.

    It warns once if the first runs show that all pairs together take long.
    """
    start, pairs, estimated = time.perf_counter(), 0, False

    def announce(more: int) -> None:
        nonlocal pairs, estimated
        pairs += more
        seconds = time.perf_counter() - start
        if estimated or seconds < _MEASURED:
            return
        estimated = True
        if (whole := seconds * num_codes * num_data / pairs) > _LONG:
            warn_user(
                f"ELBO surgery scores {num_codes:,} codes under {num_data:,} posteriors by running "
                f"the guide, which takes about {_duration(whole)}. Call pv.elbo_surgery with a "
                "smaller num_scored, or pass fewer data points"
            )

    return announce


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 100 else f"{minutes / 60:.0f} hours"


def score_all(
    group: Group,
    block: Block,
    noise: Tensor,
    information: Tensor,
    done: Tensor,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Score the codes of all data points, block by block.

    Blocks that are done in every process are skipped. An interrupt leaves the results of the
    current block unchanged. The random numbers of a block do not depend on the blocks that are
    skipped. Scoring uses random numbers for the order of a shuffled stream.

    Args:
        group: the processes.
        block: the scoring.
        noise: of each code of this process's n data points, (K, n).
        information: moments of the information of each data point's codes, with the noise, changed
            in place, (n, 2).
        done: whether a data point has a result, changed in place, (n,).
        advance: called with the number of data points of a block, summed over all processes.
    """
    starts = range(0, len(done), block.size)
    to_do = torch.tensor([not done[start : start + block.size].all() for start in starts])
    shares = group.gather((len(done), to_do))
    counts = [count for count, _ in shares]
    for number in range(-(-max(counts) // block.size)):
        seed = int(torch.randint(2**62, ()))
        rows = slice(number * block.size, (number + 1) * block.size)
        if any(bool(flags[number]) for _, flags in shares if number < len(flags)):
            with seeded(seed):
                information[rows] = moments(block.score(rows).to(noise), noise[:, rows])
            done[rows] = True
        advance(sum(len(range(*rows.indices(count))) for count in counts))
