"""Run a pair with K particles: once, with an extra dimension, or once for each particle."""

from __future__ import annotations

import itertools
import warnings
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae._programs.pair_trace import PairTrace, Program
from pyro_vae._utils.identity import ProgramMap
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.random import restored_generators

Vectorize = bool | Literal["fold"] | None

# By model, then by guide: True for a pair that cannot take the particles' dimension.
_needs_single_runs = ProgramMap()


def run_particles(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict[str, Any],
    num_particles: int,
    *,
    plate_nesting: int | None,
    vectorize_particles: Vectorize,
    **options: Any,
) -> list[PairTrace]:
    """Run a pair with K particles; return one run of K, or K runs of one.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        args: positional arguments of both programs.
        kwargs: keyword arguments of both programs.
        num_particles: K.
        plate_nesting: see :func:`pyro_vae.terms`.
        vectorize_particles: see :func:`pyro_vae.terms`.
        options: further options of :class:`PairTrace`.

    Raises:
        ValueError: The pair breaks the contract, or must run at once and cannot.
    """
    if num_particles > 1 and plate_nesting is None and vectorize_particles is not False:
        layout = particle_options(model, guide, args, kwargs, vectorize_particles)
        plate_nesting, vectorize_particles = layout.values()
    at_once = num_particles > 1 and vectorize_particles is not False
    if at_once and vectorize_particles == "fold":
        options["folded"] = True
    return [
        run_pair(
            model,
            guide,
            args,
            kwargs,
            num_particles=count,
            plate_nesting=plate_nesting,
            **options,
        )
        for count in ([num_particles] if at_once else [1] * num_particles)
    ]


def run_pair(
    model: Program, guide: Program, args: tuple, kwargs: dict[str, Any], **options: Any
) -> PairTrace:
    """Run a pair; if it fails on NaN or infinite arguments, say so in the error."""
    try:
        return PairTrace(model, guide, args, kwargs, **options)
    except ValueError as error:
        for number, column in enumerate(args):
            name = "x" if number == 0 else f"covariate {number} of x"
            if isinstance(column, Tensor) and not torch.isfinite(column).all():
                raise ValueError(
                    f"{name} has NaN or infinite values, and the pair cannot run on them: "
                    f"{first_line(error)}"
                ) from error
        raise


def particle_options(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict[str, Any] | None = None,
    vectorize_particles: Vectorize = None,
    *,
    may_fold: bool = False,
) -> dict[str, Any]:
    """Return ``plate_nesting`` and ``vectorize_particles`` for runs of a pair with particles.

    Both programs run to count the batch dimensions that their plates use. Unless one run for each
    particle is wanted, a second run has a number of particles that differs from every plate size.
    It fails if a program moves the particles to the dimension of a plate.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        args: positional arguments of both programs.
        kwargs: keyword arguments of both programs.
        vectorize_particles: see :func:`pyro_vae.terms`.
        may_fold: whether particles may become rows of the batch, if the programs cannot take a
            dimension of particles. Both must be in evaluation mode.

    Raises:
        ValueError: The programs cannot run with a dimension of particles, and must.

    Warns:
        UserWarning: The programs cannot run with a dimension of particles. Once for each pair.
    """
    kwargs = kwargs or {}
    with restored_generators(), torch.no_grad(), poutine.block():
        trace = run_pair(model, guide, args, kwargs)
        nesting = trace.plate_nesting
        single = _needs_single_runs.get(model, ProgramMap()).get(guide)
        if vectorize_particles in (False, "fold"):
            return {"plate_nesting": nesting, "vectorize_particles": vectorize_particles}
        if vectorize_particles is None and single and not may_fold:
            return {"plate_nesting": nesting, "vectorize_particles": False}
        count = next(k for k in itertools.count(2) if k not in trace.plate_sizes)
        try:
            PairTrace(model, guide, args, kwargs, num_particles=count, plate_nesting=nesting)
        except Exception as error:  # networks raise errors of any type at a shape that they lack
            if vectorize_particles:
                raise ValueError(
                    "model and guide run, but not with a leading dimension of particles: "
                    f"{first_line(error)}. Let their networks accept any leading dimensions, or "
                    "pass vectorize_particles=False."
                ) from error
            if may_fold and _folds(model, guide, args, kwargs):
                return {"plate_nesting": nesting, "vectorize_particles": "fold"}
            _warn_of_single_runs(model, guide, error)
            return {"plate_nesting": nesting, "vectorize_particles": False}
    return {"plate_nesting": nesting, "vectorize_particles": True}


def _folds(model: Program, guide: Program, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Return whether copies of rows in one batch have the densities of separate runs.

    The pair runs on two copies of each row. Then each copy runs alone, with the same latents.
    """
    try:
        both = PairTrace(model, guide, args, kwargs, num_particles=2, folded=True)
        factors = [*both.model.values(), *both.guide.values()]
        if any(not factor.local and not factor.observed for factor in factors):
            return False
        for copy in range(2):
            alone = PairTrace(model, both.guide_of_copy(copy), args, kwargs)
            for folded, single in ((both.model, alone.model), (both.guide, alone.guide)):
                for name, factor in single.items():
                    expected = factor.log_prob[0]
                    found = folded[name].log_prob[copy]
                    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
                        return False
    except Exception:  # errors of user code at another number of rows, or of a density
        return False
    return True


def _warn_of_single_runs(model: Program, guide: Program, error: Exception) -> None:
    by_guide = _needs_single_runs.get(model) or ProgramMap()
    if guide in by_guide:
        return
    by_guide[guide] = True
    _needs_single_runs[model] = by_guide
    warnings.warn(
        "model and guide cannot run with a leading dimension of particles "
        f"({type(error).__name__}: {first_line(error)}). Each of K particles gets a run of its "
        "own, which takes about K times as long. Let the networks accept any leading dimensions, "
        "or pass vectorize_particles=False to hide this warning.",
        stacklevel=2,
    )
