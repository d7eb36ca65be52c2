"""Check all values of the data against the support of the site that observes them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae._programs.pair_trace import Factor, PairTrace
from pyro_vae._programs.sites import (
    Site,
    inside_support,
    mask_of,
    support_bounds,
    values_outside_support,
)
from pyro_vae.datasets._columns import Column, finite_rows
from pyro_vae.datasets._minibatches import Batch, Minibatches
from pyro_vae.datasets._sparse_rows import SparseRows

_VALUES_AT_A_TIME = 2**20  # of a sparse column

Run: TypeAlias = Callable[[Batch], PairTrace]


def check_supports(run: Run, trace: PairTrace, batch: Batch, batches: Minibatches) -> bool:
    """Check all in-memory values that a site observes unchanged against its support.

    If the program computes the bounds of a support from the minibatch, the bounds differ for other
    rows. Such values are checked later, in each minibatch.

    Args:
        run: a function that runs the pair on a minibatch, with validation on.
        trace: the run on the first minibatch.
        batch: the first minibatch.
        batches: the data.

    Returns:
        Whether every local observed site was checked.

    Raises:
        ValueError: A value is outside the support of its site.
    """
    columns = batches.columns_to_validate
    if columns is None:
        return False
    extremes: list[PairTrace] | None = None
    checked = set()
    finite = torch.stack([finite_rows(column) for column in columns]).all(0)
    observed = [*_observed_columns(trace, batch)]
    for factor, number in observed:
        if (bounds := support_bounds(factor.site)) is not None:
            if _inside(factor.site, number, batches) is None:
                continue
            if extremes is None:
                masks = [_inside(each.site, n, batches) for each, n in observed]
                masks = [m for m in masks if m is not None and m.shape == finite.shape]
                extremes = _runs_on_extremes(run, batches, finite, masks)
            others = [support_bounds(each.model[factor.name].site) for each in extremes]
            if not others or not all(_same(bounds, other) for other in others):
                continue
        if not _all_values_inside(factor.site, columns[number]):
            for start, block in batches.blocks():
                rows = finite[start : start + len(block[number])]
                outside = values_outside_support(factor.site, block[number], rows, start=start)
                if outside is not None:
                    raise ValueError(outside)
        checked.add(factor.name)
    return all(
        factor.name in checked or factor.is_factor
        for factor in trace.model.values()
        if factor.observed and factor.local
    )


def _inside(site: Site, number: int, batches: Minibatches) -> Tensor | None:
    """Return whether each row of a column is inside a site's support; see `inside_support`."""
    found = [inside_support(site, block[number]) for _, block in batches.blocks()]
    return None if any(each is None for each in found) else torch.cat(found)


def _all_values_inside(site: Site, column: Column) -> bool:
    """Return whether all values of a sparse column are inside a support of single numbers.

    The values of sparse rows are zero and those in memory, so that no row has to become dense.
    """
    if not isinstance(column, SparseRows):
        return False
    support = site["fn"].support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support.event_dim or support_bounds(site) is not None:
        return False
    parts = (part.to(column.dtype) for part in column.values.split(_VALUES_AT_A_TIME))
    zero = torch.zeros(1, dtype=column.dtype, device=column.device)
    return all(bool(support.check(part).all()) for part in (zero, *parts))


def _runs_on_extremes(
    run: Run, batches: Minibatches, finite: Tensor, inside: Sequence[Tensor]
) -> list[PairTrace]:
    """Run a pair on the rows with the least and the largest sum of a column, each repeated.

    Bounds that depend on the data differ between these runs. If such a row is outside its own
    bounds, the extreme rows are chosen among those inside the first minibatch's bounds. If the
    pair fails on such a minibatch, the result is empty.

    Args:
        run: a function that runs the pair on a minibatch, with validation on.
        batches: the data.
        finite: a mask of the rows without NaN and infinite values.
        inside: for each observed site, a mask of the rows inside its support at the first
            minibatch.
    """
    try:
        return _runs_on_copies(run, batches, _extreme_rows(batches, finite))
    except ValueError as error:
        if "outside the support of site" not in str(error):
            return []
    rows = _extreme_rows(batches, torch.stack([finite, *inside]).all(0))
    with contextlib.suppress(ValueError):
        return _runs_on_copies(run, batches, rows)
    return []


def _extreme_rows(batches: Minibatches, among: Tensor) -> list[int]:
    rows = among.nonzero()[:, 0]
    if not len(rows):
        return []
    of_blocks = [
        [column.reshape(len(column), -1).sum(1, dtype=torch.float64) for column in block]
        for _, block in batches.blocks()
    ]
    sums = map(torch.cat, zip(*of_blocks, strict=True))
    picks = (torch.argmin, torch.argmax)
    return list({rows[pick(each[rows])].item(): None for each in sums for pick in picks})


def _runs_on_copies(run: Run, batches: Minibatches, rows: Sequence[int]) -> list[PairTrace]:
    """Run a pair on one minibatch per row, made of copies of that row."""
    size = min(batches.batch_size, batches.num_data)
    devices = [batches.device] if batches.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        return [run(tuple(column[[row] * size] for column in batches.columns)) for row in rows]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and not isinstance(a, Tensor) and a == b


def _is_same(column: Any, value: Tensor) -> bool:
    """Return whether a value is a column itself, and not computed from it."""
    if not isinstance(column, Tensor) or column.shape != value.shape:
        return False
    same_memory = column.data_ptr() == value.data_ptr() and column.stride() == value.stride()
    return column is value or (same_memory and column.dtype == value.dtype)


def _observed_columns(trace: PairTrace, batch: tuple[Any, ...]) -> Iterator[tuple[Factor, int]]:
    """Yield the observed sites whose value is a column of the batch, with the column's index.

    Masked sites are left out, because masked rows of the column may hold any values.
    """
    for factor in trace.model.values():
        value = factor.site["value"]
        if not factor.observed or mask_of(factor.site) is not None:
            continue
        for number, column in enumerate(batch):
            if _is_same(column, value):
                yield factor, number
                break
