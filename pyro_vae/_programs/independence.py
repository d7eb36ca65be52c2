"""Check that the densities of a data point do not depend on the latents of other data points."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae._programs.constant_noise import ConstantNoise
from pyro_vae._programs.pair_trace import PairTrace, Program
from pyro_vae._programs.particles import are_close
from pyro_vae._programs.sites import data_frame
from pyro_vae._programs.trial_runs import OUT_OF_MEMORY, trial_run

_ROWS = 34  # rows that are checked; few inner plates have this size


def check_independence(who: str, model: Program, guide: Program, batch: tuple[Tensor, ...]) -> None:
    """Raise ValueError if the latents of some data points change the densities of others.

    The pair runs again with other samples in every second row, and in rows that are chosen at
    random. The densities of the other rows must stay equal. A single row is not checked.

    Args:
        who: the estimator, the first words of the message.
        model: program of p(x, z), in evaluation mode.
        guide: program of q(z|x), in evaluation mode.
        batch: a minibatch.

    Raises:
        ValueError: A density depends on the latents of another data point.
    """
    with trial_run(model, guide):
        batch = _few_rows(model, guide, batch)
        run, other = (PairTrace(model, guide, batch) for _ in range(2))
        if (size := run.batch_size) < 2:
            return
        second = torch.arange(size) % 2 == 1
        chosen = torch.randperm(size, generator=torch.Generator().manual_seed(0)) < size // 2
        for changed in (second, ~second, chosen):
            kept, mixed = (~changed).nonzero()[:, 0], _mixed(run, other, changed)
            found = PairTrace(model, run.guide_at(mixed), batch)
            if _different_site(run, found, kept) is None:
                continue
            with ConstantNoise():  # the programs may draw other random numbers
                before, after = (
                    PairTrace(model, run.guide_at(values), batch)
                    for values in (run.drawn_values(), mixed)
                )
            if (site := _different_site(before, after, kept)) is None:
                continue
            raise ValueError(
                f"{who} weighs each data point by itself, but the log-density of {site} at one "
                "data point depends on the latents of other data points in the minibatch. So the "
                "data points have no log p(x) of their own. Remove operations along the plate of "
                "the data points, such as a mean over the minibatch."
            )


def _few_rows(model: Program, guide: Program, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the first rows of a minibatch, or all rows if the pair does not run on a few."""
    few = tuple(column[:_ROWS] for column in batch)
    try:
        with trial_run():
            PairTrace(model, guide, few)
    except OUT_OF_MEMORY:
        raise
    except Exception:  # a program for one number of rows may raise any error
        return batch
    return few


def _mixed(run: PairTrace, other: PairTrace, changed: Tensor) -> dict[str, Tensor]:
    """Return the samples of a run, with those of another run in some rows."""
    values, others = run.drawn_values(), other.drawn_values()
    for name, value in values.items():
        site, another = run.guide[name].site, others.get(name)
        if data_frame(site) is None or another is None or another.shape != value.shape:
            continue
        dim = data_frame(site).dim - site["fn"].event_dim
        if value.dim() >= -dim and value.shape[dim] == run.batch_size:
            rows = changed.to(value.device).reshape(-1, *[1] * (-dim - 1))
            values[name] = torch.where(rows, another, value)
    return values


def _different_site(run: PairTrace, other: PairTrace, kept: Tensor) -> str | None:
    """Return the name of a site whose densities differ in two runs at some rows, or None."""
    unscored = {*run.unscored, *other.unscored}
    for role, factors, others, left_out in (
        ("model", run.model, other.model, set()),
        ("guide", run.guide, other.guide, unscored),
    ):
        for name in factors.keys() & others.keys() - left_out:
            if not factors[name].local:
                continue
            if not are_close(*(each[name].log_prob[:, kept] for each in (others, factors))):
                return f"the {role}'s site {name!r}"
    return None
