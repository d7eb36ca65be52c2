"""Run a pair with K particles: once, with an extra dimension, or once for each particle."""

from __future__ import annotations

import itertools
import warnings
import weakref
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_vae._programs.constant_noise import ConstantNoise
from pyro_vae._programs.data_plate import resized
from pyro_vae._programs.evaluation import evaluation_mode
from pyro_vae._programs.flags import flags_of
from pyro_vae._programs.pair_trace import PairTrace, Program
from pyro_vae._programs.sites import refuse_mismatch
from pyro_vae._programs.trial_runs import OUT_OF_MEMORY, trial_run
from pyro_vae._utils.identity import ProgramMap
from pyro_vae._utils.messages import first_line

Vectorize = bool | Literal["fold"] | None

# By model, then by guide: True for a pair that cannot take the particles' dimension.
_needs_single_runs = ProgramMap()
# By model, then by guide: the state of a pair whose particles were compared with single runs.
_compared = ProgramMap()


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
    unknown = plate_nesting is None or vectorize_particles is None
    if num_particles > 1 and unknown and vectorize_particles is not False:
        layout = _compared_once(model, guide, args, kwargs, vectorize_particles)
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
    """Run a pair; if it fails on NaN, or on the shape of a site, say so in the error."""
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
        if options.get("num_particles", 1) == 1 and args and isinstance(args[0], Tensor):
            refuse_mismatch(error, args[0])
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
    particle is wanted, further runs compare particles in one run with single runs, at the same
    noise and on two numbers of rows. None of the runs has an effect on the pair.

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
    with trial_run(model, guide):
        trace = run_pair(model, guide, args, kwargs)
        nesting = trace.plate_nesting
        single = _needs_single_runs.get(model, ProgramMap()).get(guide)
        if vectorize_particles in (False, "fold"):
            return {"plate_nesting": nesting, "vectorize_particles": vectorize_particles}
        if vectorize_particles is None and single and not may_fold:
            return {"plate_nesting": nesting, "vectorize_particles": False}
        try:
            _compare(model, guide, args, kwargs, trace, insist=bool(vectorize_particles))
        except OUT_OF_MEMORY:
            raise
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


def _compared_once(
    model: Program, guide: Program, args: tuple, kwargs: dict[str, Any], vectorize: Vectorize
) -> dict[str, Any]:
    """Return :func:`particle_options`, from an earlier call if nothing in the pair has changed.

    Modes of modules, flags that the programs refer to by name, and shapes are compared.
    """
    flags, found = flags_of(model, guide)
    state = (
        vectorize,
        [(type(a), _shape_of(a)[1:]) for a in (*args, *kwargs.values())],
        bool(args) and _shape_of(args[0])[:1] == (1,),
        flags,
    )
    by_guide = _compared.get(model) or ProgramMap()
    before, references, layout = by_guide.get(guide, (None, [], {}))
    if state != before or [reference() for reference in references] != found:
        layout = particle_options(model, guide, args, kwargs, vectorize)
        by_guide[guide] = state, [weakref.ref(module) for module in found], layout
        _compared[model] = by_guide
    return layout


def _shape_of(argument: Any) -> tuple[int, ...]:
    """Return the shape of an argument, () if it has none, as a nested tensor."""
    is_nested = isinstance(argument, Tensor) and argument.is_nested
    return () if is_nested else tuple(getattr(argument, "shape", ()))


class _OtherValuesError(ValueError):
    """Particles in one run have other log-densities than in single runs."""


def _compare(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict[str, Any],
    single: PairTrace,
    *,
    insist: bool,
) -> None:
    """Raise an error unless particles in one run have the values of single runs.

    They also run together on another number of rows, if the pair runs on it. A layer may fit the
    dimension of particles by chance, because it is as wide as the batch.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        args: positional arguments of both programs.
        kwargs: keyword arguments of both programs.
        single: a run of the pair.
        insist: whether values that differ in training mode alone are accepted, such as those of
            a batch normalization over all particles.

    Raises:
        Exception: A program cannot run with particles, or the values differ.
    """
    inputs, rows = (args, kwargs), single.batch_size
    other = rows - 1 if rows > 2 else rows + 1
    taken = {other, *_sizes(inputs, single)}
    count = next(k for k in itertools.count(2) if k not in taken)
    if not _equals_single_runs(model, guide, inputs, single, count):
        try:  # the programs may draw other random numbers, as dropout does
            _compare_at(model, guide, inputs, single, count)
        except _OtherValuesError:
            if not insist:
                raise
            with evaluation_mode(model, guide):
                _compare_at(model, guide, inputs, single, count)
    inputs = resized(inputs, rows, other)
    options = {"num_particles": count, "plate_nesting": single.plate_nesting}
    try:
        with trial_run():
            PairTrace(model, guide, *inputs, **options)
    except OUT_OF_MEMORY:
        raise
    except Exception:
        if _runs_on(model, guide, inputs):
            raise


def _runs_on(model: Program, guide: Program, inputs: Any) -> bool:
    """Return whether a pair runs on some arguments."""
    try:
        with trial_run():
            PairTrace(model, guide, *inputs)
    except OUT_OF_MEMORY:
        raise
    except Exception:  # a program for one number of rows may raise any error
        return False
    return True


def _equals_single_runs(
    model: Program, guide: Program, inputs: Any, single: PairTrace, count: int
) -> bool:
    """Return whether a run with particles, at the latents of single runs, has their values.

    False is not certain. The programs may draw other random numbers, such as those of dropout.
    """
    nesting, values = single.plate_nesting, {}
    with trial_run():
        alone = [single, *(PairTrace(model, guide, *inputs) for _ in range(count - 1))]
    drawn = [run.drawn_values() for run in alone]
    if any(each.keys() != drawn[0].keys() for each in drawn):
        return False
    for name in drawn[0]:
        particles = [each[name] for each in drawn]
        missing = nesting + single.guide[name].site["fn"].event_dim - particles[0].dim()
        if missing < 0 or len({value.shape for value in particles}) > 1:
            return False
        values[name] = torch.stack(particles)[(slice(None), *[None] * missing)]
    options = {"num_particles": count, "plate_nesting": nesting}
    with trial_run():
        together = PairTrace(model, single.guide_at(values), *inputs, **options)
    return all(_difference(together, run, number) is None for number, run in enumerate(alone))


def _compare_at(model: Program, guide: Program, inputs: Any, single: PairTrace, count: int) -> None:
    """Raise :class:`_OtherValuesError` if a particle has other values than in a single run.

    Random numbers of the programs, except for the latents, are constants.
    """
    options = {"num_particles": count, "plate_nesting": single.plate_nesting}
    with trial_run():
        drawn = PairTrace(model, guide, *inputs, **options)
    with trial_run(), ConstantNoise():
        together = PairTrace(model, drawn.guide_at(drawn.drawn_values()), *inputs, **options)
    unscored = bool(together.unscored)
    for particle in range(count):
        with trial_run(), ConstantNoise():
            alone = PairTrace(model, drawn.guide_of_particle(particle, single), *inputs)
        unscored |= bool(alone.unscored)
        if (name := _difference(together, alone, particle)) is not None:
            raise _OtherValuesError(_differs(name))
    if unscored:  # the densities of the guide, at equal noise instead of equal latents
        with trial_run(), ConstantNoise():
            together = PairTrace(model, guide, *inputs, **options)
        with trial_run(), ConstantNoise():
            alone = PairTrace(model, guide, *inputs)
        for particle in range(count):
            if (name := _difference(together, alone, particle)) is not None:
                raise _OtherValuesError(_differs(name))


def _differs(name: str) -> str:
    return f"the log-density of site {name!r} differs from that of a run for this particle alone"


def _difference(together: PairTrace, alone: PairTrace, particle: int) -> str | None:
    """Return the name of a site whose values for a particle differ from a single run, or None."""
    unscored = {*together.unscored, *alone.unscored}
    for found, expected in ((together.model, alone.model), (together.guide, alone.guide)):
        for name in found.keys() | expected.keys():
            if name in unscored and found is together.guide:
                continue
            if name not in found or name not in expected:
                return name
            values = found[name].log_prob[particle], expected[name].log_prob[0]
            if not are_close(*values):
                return name
    return None


def are_close(found: Tensor, expected: Tensor) -> bool:
    """Return whether log-densities are equal up to rounding, relative to the largest."""
    if found.shape != expected.shape:
        return False
    loose = torch.is_autocast_enabled() or found.is_cuda or found.dtype.itemsize < 4
    finite = expected[expected.isfinite()].abs()
    scale = 1.0 + (finite.max().item() if len(finite) else 0.0)
    tolerance = (1e-3 if loose else 1e-5) * scale
    return torch.allclose(found, expected, rtol=0.0, atol=tolerance, equal_nan=True)


def _sizes(inputs: Any, trace: PairTrace) -> set[int]:
    """Return the sizes of plates, and of the dimensions of arguments and latents."""
    args, kwargs = inputs
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    tensors += trace.drawn_values().values()
    return trace.plate_sizes.union(*(tensor.shape for tensor in tensors))


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
            if _difference(both, alone, copy) is not None:
                return False
    except OUT_OF_MEMORY:
        raise
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
